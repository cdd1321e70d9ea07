"""A small Hugging Face Hub on the loopback interface, for tests.

It speaks what `huggingface_hub` uses for creating repositories, commits (NDJSON) with regular and LFS files, lists and
downloads (whole or by range), keeps everything in memory, and can be told to misbehave. Point `HF_ENDPOINT` at
`HubServer.url`, and set `HF_HUB_DISABLE_XET=1`: Xet storage has a protocol of its own, which is not spoken here.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WRITE_TOKEN, READ_TOKEN = "hf_SecretOfTheWriter", "hf_SecretOfTheReader"
USER = "me"


def git_sha(data: bytes) -> str:
    """The id that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """One repository: its files on `main`, what they were at earlier commits, and the messages of its commits."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    earlier: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return hashlib.sha1("\n".join(["", *self.commits]).encode()).hexdigest()

    def at(self, revision: str) -> dict[str, bytes] | None:
        """Files of a commit or of `main`."""
        return self.files if revision in ("main", self.sha) else self.earlier.get(revision)


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches `pattern`.

    `action` is a status code, `drop` (the connection is closed in the middle of the body) or `hold` (no answer before
    `HubServer.released` is set).
    """

    pattern: str
    action: int | str
    times: int


class HubServer(ThreadingHTTPServer):
    """Serves in a thread of its own while its `with` block lasts."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        """By `user/name`, datasets by `datasets/user/name`, Spaces by `spaces/user/name`."""
        self.variables: dict[str, dict[str, str]] = {}
        """Variables of the Spaces, by the same names."""
        self.ranges: list[tuple[str, int]] = []
        """File and number of bytes of every answer to a range request."""
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.released = threading.Event()
        self.held = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Clients that have gone are part of the tests."""

    def fail(self, pattern: str, action: int | str, times: int = 1) -> None:
        self.faults.append(Fault(pattern, action, times))

    def environment(self) -> dict[str, str]:
        """Variables of a process that shall use this server and nothing of the user's account."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    # --- plumbing ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(line)
            fault = next((f for f in self.server.faults if f.times and re.search(f.pattern, line)), None)
            if fault:
                fault.times -= 1
        if fault and fault.action == "drop":
            self.rfile.read(min(100, int(self.headers.get("Content-Length", 100))))
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        if fault and fault.action == "hold":
            self.server.held.set()
            self.server.released.wait()
        elif fault:
            self._json({"error": "told to fail"}, fault.action)
            return
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, line):
                answer(self, body, *match.groups())
                return
        self._json({"error": f"unknown request {line}"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._reply(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after having refused the request."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and token not in (WRITE_TOKEN, READ_TOKEN)):
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif write and token != WRITE_TOKEN:
            self._json({"error": "You don't have the rights to write"}, 403)
        else:
            return repo
        return None

    # --- requests ----------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITE_TOKEN, READ_TOKEN):
            message = "Invalid credentials in Authorization header"
            self._json({"error": message}, 401, X_Error_Message=message)
            return
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if token != WRITE_TOKEN or not name.startswith(f"{USER}/"):
            self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
            return
        key = f"{wanted['type']}s/{name}" if wanted.get("type") in ("dataset", "space") else name
        with self.server.lock:
            exists = key in self.server.repos
            if not exists:
                self.server.repos[key] = Repo(private=wanted.get("visibility") == "private")
        self._json({"url": f"{self.server.url}/{key}", "id": name}, 409 if exists else 200)

    def info(self, _: bytes, name: str, revision: str | None = None) -> None:
        if (repo := self._repo(name)) and (found := self._files(repo, revision)) is not None:
            files = [{"rfilename": path} for path in found]
            sha = revision if revision in repo.earlier else repo.sha
            answer = {"id": "/".join(name.split("/")[-2:]), "sha": sha, "private": repo.private, "siblings": files}
            self._json(answer)

    def set_variable(self, body: bytes, name: str) -> None:
        if self._repo(name, write=True):
            wanted = json.loads(body)
            self.server.variables.setdefault(name, {})[wanted["key"]] = wanted["value"]
            self._json({wanted["key"]: {"key": wanted["key"], "value": wanted["value"]}})

    def tree(self, _: bytes, name: str, revision: str, folder: str | None = None) -> None:
        if not (repo := self._repo(name)) or (files := self._files(repo, revision)) is None:
            return
        start = f"{folder}/" if folder else ""
        recursive = "recursive=true" in self.path.lower()
        entries = {}
        for path, data in files.items():
            if not path.startswith(start):
                continue
            if not recursive and "/" in path[len(start) :]:
                child = start + path[len(start) :].split("/")[0]
                entries[child] = {"type": "directory", "path": child, "size": 0, "oid": git_sha(child.encode())}
                continue
            entries[path] = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
            if path in repo.large:
                oid = hashlib.sha256(data).hexdigest()
                entries[path]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        if folder and not entries:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        else:
            self._json(list(entries.values()))

    def preupload(self, body: bytes, name: str) -> None:
        if repo := self._repo(name, write=True):
            answers = []
            for file in json.loads(body)["files"]:
                path = file["path"]
                answer = {"path": path, "shouldIgnore": False}
                answer["uploadMode"] = "lfs" if path.endswith((".safetensors", ".parquet")) else "regular"
                if path in repo.files:
                    data = repo.files[path]
                    answer["oid"] = hashlib.sha256(data).hexdigest() if path in repo.large else git_sha(data)
                answers.append(answer)
            self._json({"files": answers})

    def batch(self, body: bytes, name: str) -> None:
        if self._repo(name, write=True):
            objects = []
            for wanted in json.loads(body)["objects"]:
                known = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.server.objects:
                    address = f"{self.server.url}/storage/{wanted['oid']}"
                    known["actions"] = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
                objects.append(known)
            self._json({"objects": objects, "transfer": "basic"})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json({"error": "the content is not what was announced"}, 400)
            return
        self.server.objects[oid] = body
        self._reply(b"")

    def verify(self, body: bytes, oid: str) -> None:
        whole = len(self.server.objects.get(oid, b"")) == json.loads(body)["size"]
        self._json({}, 200 if whole else 404)

    def commit(self, body: bytes, name: str) -> None:
        if not (repo := self._repo(name, write=True)):
            return
        lines = [json.loads(line) for line in body.splitlines()]
        values = {kind: [line["value"] for line in lines if line["key"] == kind] for kind in {x["key"] for x in lines}}
        missing = [v["path"] for v in values.get("lfsFile", ()) if v["oid"] not in self.server.objects]
        if missing or values.keys() - {"header", "file", "lfsFile", "deletedFile"}:
            self._json({"error": f"bad commit: {missing or list(values)}"}, 400)
            return
        parent = values["header"][0].get("parentCommit")
        if parent not in (None, repo.sha):
            self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        with self.server.lock:
            repo.earlier[repo.sha] = dict(repo.files)
            for value in values.get("deletedFile", ()):
                del repo.files[value["path"]]
                repo.large.discard(value["path"])
            for value in values.get("file", ()):
                repo.files[value["path"]] = base64.b64decode(value["content"])
            for value in values.get("lfsFile", ()):
                repo.files[value["path"]] = self.server.objects[value["oid"]]
                repo.large.add(value["path"])
            repo.commits.append(values["header"][0]["summary"])
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def check_card(self, body: bytes) -> None:
        whole = json.loads(body)["content"].startswith("---\n")
        self._json({} if whole else {"errors": [{"message": "no metadata"}]}, 200 if whole else 400)

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        if not (repo := self._repo(name)) or (files := self._files(repo, revision)) is None:
            return
        commit = repo.sha if revision == "main" else revision
        data = files.get(path)
        if data is None:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        tag = hashlib.sha256(data).hexdigest() if path in repo.large else git_sha(data)
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
            self.server.ranges.append((path, stop - start))
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._reply(data[start:stop], 206, **headers)
        else:
            self._reply(data, **headers)

    def _files(self, repo: Repo, revision: str | None) -> dict[str, bytes] | None:
        """Files of a revision, or None after having refused the request."""
        files = repo.at(revision or "main")
        if files is None:
            self._json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        return files


_NAME = r"((?:datasets/|spaces/)?[\w.-]+/[\w.-]+)"
_API = r"/api/(?:models/|(?=datasets/|spaces/))"  # the kind of a dataset or Space stays in its name
_ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.check_card),
    (rf"GET {_API}{_NAME}(?:/revision/([\w.-]+))?", _Handler.info),
    (rf"GET {_API}{_NAME}/tree/([\w.-]+)(?:/(.+))?", _Handler.tree),
    (rf"POST {_API}{_NAME}/variables", _Handler.set_variable),
    (rf"POST {_API}{_NAME}/preupload/main", _Handler.preupload),
    (rf"POST {_API}{_NAME}/commit/main", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /storage/(\w+)", _Handler.store),
    (r"POST /storage/(\w+)/verify", _Handler.verify),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([\w.-]+)/(.+)", _Handler.resolve),
)
