"""Folders of files, on the disk, on the Hugging Face Hub, or wherever fsspec reads and writes.

A folder is listed once, with what tells whether a file is the same as before. Files are read and written whole: what
has been written is complete, or not there.
"""

import contextlib
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from madm_utils.cli import UserError
from madm_utils.files import check_writable, replacing
from madm_utils.remote_data import DataError, fsspec_of, patiently

COMMITS_PER_HOUR = 30
"""To a repository on the Hub, which limits them; of all processes together."""
FILES_PER_COMMIT = 3000
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""After these, no other file can be written either."""
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "uploaded_at", "created")


@dataclass(frozen=True)
class Entry:
    """A file in the list of its folder."""

    size: int | None
    """Bytes; None where the storage does not say."""
    modified: float | None = None
    """Seconds since 1970 at which the content was last written or put under this name; None: not known."""
    sha256: str | None = None
    """Digest of the content, where the storage has one at hand."""


class Unwritable(UserError):
    """Nothing more can be written; `lost` are files that were taken and have not arrived."""

    def __init__(self, message: str, lost: tuple[str, ...] = ()):
        super().__init__(message)
        self.lost = lost


class LocalStorage:
    """A folder on a disk, which need not exist yet."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def address(self, name: str) -> str:
        """What people call the file `name`."""
        return str(self.root / name)

    def files(self) -> dict[str, Entry]:
        """Files in the folder and below: name relative to it, with `/` -> entry; sorted, hidden ones left out."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                with contextlib.suppress(OSError):  # gone meanwhile
                    if path.is_file():
                        found[path.relative_to(self.root).as_posix()] = _local_entry(path)
        return dict(sorted(found.items()))

    def read(self, name: str, start: int = 0) -> bytes:
        """Content of a file from byte `start` on.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with open(self.root / name, "rb") as file:
                file.seek(start)
                return file.read()
        except FileNotFoundError:
            raise UserError(f"{self.address(name)}: no such file (any more)") from None
        except OSError as error:
            raise UserError(f"{self.address(name)}: cannot be read ({error.strerror})") from None

    def write(self, files: Mapping[str, bytes], earlier: Sequence[str] = ()) -> None:
        """Write files, the last one when the others are complete, in place of earlier ones.

        Args:
            files: name -> content.
            earlier: names of files that are there. Those without a new content are removed, and so is, before any
                other is written, the one of the last file's name.

        Raises:
            Unwritable: neither these nor any other can be written.
            UserError: these cannot be written.
        """
        name = ""
        try:
            for name in _outdated(files, earlier):
                (self.root / name).unlink(missing_ok=True)
            for name, content in files.items():
                path = self.root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
        except OSError as error:
            kind = Unwritable if error.errno in _DISK_ERRORS else UserError
            raise kind(f"cannot write {self.address(name)} ({error.strerror})") from None

    def flush(self) -> None:
        """Have all that was written arrive."""


class RemoteStorage:
    """A folder that fsspec reads and writes. The methods are those of `LocalStorage`."""

    def __init__(self, url: str, flag: str):
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self.file_system = fsspec_of(self.url, flag)
        self.root = url_to_fs(self.url)[1].rstrip("/")
        self._made: set[str] = set()

    def __str__(self) -> str:
        return self.url

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def files(self) -> dict[str, Entry]:
        self.file_system.invalidate_cache()
        listed = patiently(self.url, lambda: self.file_system.find(self.root, detail=True))
        names = {path[len(self.root) :].lstrip("/"): info for path, info in listed.items()}
        return {name: _entry(info) for name, info in sorted(names.items()) if not re.search(r"(^|/)\.", name)}

    def read(self, name: str, start: int = 0) -> bytes:
        where, path = self.address(name), f"{self.root}/{name}"
        try:
            return patiently(where, lambda: self.file_system.cat_file(path, start=start or None))
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise UserError(f"{where}: no such file (any more)") from None
            raise

    def write(self, files: Mapping[str, bytes], earlier: Sequence[str] = ()) -> None:
        try:
            for name in _outdated(files, earlier):
                where = f"{self.root}/{name}"
                if patiently(self.address(name), lambda: self.file_system.exists(where)):  # noqa: B023
                    patiently(self.address(name), lambda: self.file_system.rm_file(where))  # noqa: B023
            for name, content in files.items():
                self._make_folder(name)
                where = f"{self.root}/{name}"
                patiently(self.address(name), lambda: self.file_system.pipe_file(where, content))  # noqa: B023
        except DataError as error:
            raise Unwritable(f"cannot write to {self.url}: {error}") from None

    def flush(self) -> None:
        pass

    def _make_folder(self, name: str) -> None:
        """Object stores have no folders, but e.g. SFTP does."""
        parent = f"{self.root}/{name}".rsplit("/", 1)[0]
        if parent not in self._made:
            patiently(self.url, lambda: self.file_system.makedirs(parent, exist_ok=True))
            self._made.add(parent)


class HubStorage(RemoteStorage):
    """A folder in a repository on the Hub. Large files are uploaded at once; commits make them appear, many at a time.

    Args:
        url: hf://datasets/user/name/folder, or the like.
        flag: that gave it.
        num_processes: that commit to the repository.
    """

    def __init__(self, url: str, flag: str, num_processes: int = 1):
        from huggingface_hub import HfApi

        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it reports every request
        super().__init__(url, flag)
        self.api = HfApi(endpoint=self.file_system.endpoint, token=self.file_system.token)
        self._interval = 3600 / COMMITS_PER_HOUR * num_processes
        self._lock = threading.Lock()
        self._waiting: list[Any] = []
        self._last = time.monotonic()

    def check_writable(self) -> None:
        """Raise `UserError` unless the repository exists and may be written to; nothing is sent."""
        from huggingface_hub import CommitOperationAdd

        self.file_system.invalidate_cache()  # which holds missing repositories, too
        try:
            self._call(self.api.preupload_lfs_files, [CommitOperationAdd("README.md", b"-")])
        except DataError as error:
            raise UserError(
                f"--output_dir {error}. It has to exist, and the token needs the right to write; a new one: hf repos "
                "create USER/NAME --type dataset --private"
            ) from None

    def write(self, files: Mapping[str, bytes], earlier: Sequence[str] = ()) -> None:
        """Take files for the next commit, which has all of them or none."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        folder = self._place().path_in_repo
        added = [CommitOperationAdd(f"{folder}/{name}".lstrip("/"), content) for name, content in files.items()]
        removed = [CommitOperationDelete(f"{folder}/{name}".lstrip("/")) for name in earlier if name not in files]
        try:
            if added:
                self._call(self.api.preupload_lfs_files, added)
        except DataError as error:
            raise Unwritable(f"cannot write to {self.url}: {error}") from None
        with self._lock:
            self._waiting += [*added, *removed]
            due = time.monotonic() - self._last > self._interval or len(self._waiting) >= FILES_PER_COMMIT
        if due:
            self.flush()

    def flush(self) -> None:
        from huggingface_hub import CommitOperationAdd

        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._last = time.monotonic()
        if not waiting:
            return
        added = tuple(file.path_in_repo for file in waiting if isinstance(file, CommitOperationAdd))
        removed = len(waiting) - len(added)
        message = f"Add {len(added)} files of predictions" + (f", remove {removed}" if removed else "")
        try:
            self._call(self.api.create_commit, waiting, commit_message=message)
        except DataError as error:
            raise Unwritable(f"cannot write to {self.url}: {error}", added) from None

    def _call(self, request: Any, operations: list[Any], **options: Any) -> None:
        def call() -> None:
            place = self._place()
            request(place.repo_id, operations, repo_type=place.repo_type, revision=place.revision, **options)

        patiently(self.url, call)

    def _place(self) -> Any:
        return self.file_system.resolve_path(self.root)


Storage = LocalStorage | RemoteStorage


def open_storage(address: str, flag: str, num_processes: int = 1) -> Storage:
    """The folder at a local path or an address that fsspec understands; nothing is read or created.

    Args:
        address: path, or e.g. hf://datasets/user/name/folder, s3://bucket/folder.
        flag: that gave it, for messages.
        num_processes: that write to it.

    Raises:
        UserError: an address of an unknown kind.
    """
    if "://" not in address:
        return LocalStorage(Path(address))
    kind = address.split("://", 1)[0]
    if kind == "hf" and not address.startswith("hf://buckets"):
        return HubStorage(address, flag, num_processes)
    storage = RemoteStorage(address, flag)
    return LocalStorage(Path(storage.root)) if "file" in storage.file_system.protocol else storage


def open_input(address: str, flag: str) -> tuple[Storage, dict[str, Entry]]:
    """The folder at `address` with all its files, or the folder of the file at `address` with this one.

    Raises:
        UserError: nothing there.
    """
    folder, _, name = address.rstrip("/").rpartition("/")
    if address.startswith(("http://", "https://")):  # has files, but no list of them
        return RemoteStorage(folder, flag), {name: Entry(None)}
    storage = open_storage(address, flag)
    if isinstance(storage, LocalStorage):
        if storage.root.is_file():
            return LocalStorage(storage.root.parent), {storage.root.name: _local_entry(storage.root)}
        if not storage.root.is_dir():
            raise UserError(f"{flag} {address}: no such file or folder")
        return storage, storage.files()
    info = patiently(f"{flag} {address}", lambda: storage.file_system.info(storage.root))
    return (open_storage(folder, flag), {name: _entry(info)}) if info["type"] == "file" else (storage, storage.files())


def open_output(address: str, num_processes: int) -> Storage:
    """The folder at `address`, to which so many processes are going to write.

    Raises:
        UserError: an address of an unknown kind, or one that cannot be written to.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(f"--output_dir {address}: nothing can be written to a web address; give another folder")
    storage = open_storage(address, "--output_dir", num_processes)
    if isinstance(storage, LocalStorage):
        check_writable(storage.root)
    return storage


def _outdated(files: Mapping[str, bytes], earlier: Sequence[str]) -> list[str]:
    """Which of the earlier files must be gone before the first of `files` is written."""
    return [name for name in earlier if name not in files or name == list(files)[-1]]


def _local_entry(path: Path) -> Entry:
    status = path.stat()
    # A file that was moved or copied here may be old, but it is new under this name: `st_ctime`.
    return Entry(status.st_size, max(status.st_mtime, status.st_ctime))


def _entry(info: Mapping[str, Any]) -> Entry:
    """What fsspec's file systems, each in its own words, tell about a file."""
    times = [_seconds(info[key]) for key in _TIMES if info.get(key) is not None]
    return Entry(info.get("size"), max(times, default=None), getattr(info.get("lfs"), "sha256", None))


def _seconds(moment: datetime | str | float) -> float:
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment)
    return moment.timestamp() if isinstance(moment, datetime) else float(moment)
