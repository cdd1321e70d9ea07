"""Prepared data that lies elsewhere: on the Hugging Face Hub, or at any address that fsspec understands.

`--data_dir` may be

    data                          a local folder
    user/name                     a dataset repository on the Hub, unless there is such a folder
    hf://datasets/user/name@v1    the same at a revision, or a folder in it
    s3://bucket/data, ...         what fsspec has a package for

and holds `<dataset>/<split>/` with `metadata.json` and Arrow or Parquet files. Data of the Hub is that of one commit,
found out when it is opened: whatever is pushed meanwhile, a training sees the same images to its end.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from madm_utils.cli import UserError
from madm_utils.hub import may_pass

if TYPE_CHECKING:
    import fsspec

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

PAUSES = (1.0, 5.0, 20.0)
"""Seconds before each further try of a read that failed; the Hub's client has tried several times by then."""
_DEFECTS = (AssertionError, AttributeError, LookupError, NameError, TypeError)
"""Errors of ours, not of data or networks."""


class DataError(UserError):
    """Data that cannot be read; keeps its own message when a loader process hands it on inside a traceback."""

    def __init__(self, message: str):
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


# --- places ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that fsspec reads. `/` leads to what is below, as with a `Path`."""

    url: str
    snapshot: Path | None = None
    """Of a folder on the Hub, at a fixed commit: its copy in the Hub's cache, which holds every `metadata.json`."""

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url}/{name}", self.snapshot and self.snapshot / name)

    def __str__(self) -> str:
        return self.url

    def read_text(self, name: str) -> str:
        """Content of a file in this folder."""
        if self.snapshot is not None:
            return patiently(self.url, lambda: (self.snapshot / name).read_text(encoding="utf-8"))
        return patiently(f"{self.url}/{name}", lambda: fsspec_of(self.url).cat_file(f"{self.url}/{name}").decode())

    def file_urls(self) -> list[str]:
        """Addresses of the files in this folder, sorted."""
        names = patiently(self.url, lambda: [e["name"] for e in _entries(self.url) if e["type"] == "file"])
        return [f"{self.url}/{name.rsplit('/', 1)[-1]}" for name in sorted(names)]

    def download(self) -> Path:
        """Complete the copy of a folder on the Hub; returns it. Needs no connection when it is complete already."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import parse_hf_uri

        at = parse_hf_uri(self.url)
        if not any(self.snapshot.glob("*.parquet")):
            logger.info(f"downloading {self.url}, once; --streaming trains without a copy")
        options = {"repo_type": "dataset", "revision": at.revision, "allow_patterns": f"{at.path_in_repo}/*"}
        patiently(self.url, lambda: snapshot_download(at.id, **options))
        return self.snapshot


def locate(data_dir: str | Path | RemoteFolder) -> Path | RemoteFolder:
    """What `--data_dir` means. What has been located, or is a `Path`, stays as it is.

    Raises:
        UserError: a repository that does not exist or may not be read, or an address of an unknown kind.
    """
    if not isinstance(data_dir, str):
        return data_dir
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it reports every request
    if "://" not in data_dir:
        name = re.fullmatch(r"(?!\.{1,2}/)[\w.-]+/[\w.-]+(@\S+)?", data_dir)
        hub = name and not Path(data_dir).exists()
        return _hub_folder(f"hf://datasets/{data_dir}", data_dir) if hub else Path(data_dir)
    url = data_dir.rstrip("/")
    if url.startswith("hf://datasets/"):
        return _hub_folder(url, url)
    file_system = fsspec_of(url)
    if "file" in file_system.protocol:
        return Path(file_system._strip_protocol(url))
    return RemoteFolder(url)


def _hub_folder(url: str, given: str) -> RemoteFolder:
    """A folder on the Hub at its present commit, with the metadata of all splits in the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        at = parse_hf_uri(url)
    except HfUriError as error:
        raise UserError(f"--data_dir {given}: {_one_line(error)}") from None
    below = f"{at.path_in_repo.strip('/')}/" if at.path_in_repo.strip("/") else ""
    files = f"{below}*metadata.json"
    what = f"--data_dir {given}" if "://" in given else f"--data_dir {given} (no such folder, so a dataset on the Hub)"
    snapshot = patiently(
        what, lambda: snapshot_download(at.id, repo_type="dataset", revision=at.revision, allow_patterns=files)
    )
    commit = Path(snapshot).name
    return RemoteFolder(f"hf://datasets/{at.id}@{commit}/{below}".rstrip("/"), Path(snapshot) / below)


def list_folders(folder: Path | RemoteFolder) -> list[str]:
    """Names of the folders in `folder`, sorted; none when it does not exist."""
    local = folder if isinstance(folder, Path) else folder.snapshot
    if local is not None:
        return sorted(path.name for path in local.glob("[!.]*") if path.is_dir())
    try:
        names = patiently(folder.url, lambda: [e["name"] for e in _entries(folder.url) if e["type"] == "directory"])
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in names)


def fsspec_of(url: str, flag: str = "--data_dir") -> "fsspec.AbstractFileSystem":
    """The file system of an address, which `flag` gave.

    Raises:
        UserError: of an unknown kind, or its package is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{flag} {url} cannot be opened: {_one_line(error)}. Known are local folders, datasets on the Hub "
            "(hf://datasets/user/name) and what fsspec has a package for, e.g. s3:// with `pip install s3fs`"
        ) from None


def _entries(url: str) -> list[dict[str, Any]]:
    return fsspec_of(url).ls(url, detail=True)


# --- failures --------------------------------------------------------------------------------------------------------


def patiently(where: str, action: Callable[[], Result]) -> Result:
    """The result of `action`, tried again after a pause when the reason of a failure may pass.

    Raises:
        DataError: it has failed for good; the message names `where` and what to do. Its cause is the failure.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except (UserError, MemoryError):
            raise
        except Exception as error:  # file systems raise what their network libraries raise
            found = _behind(error)
            if isinstance(found, _DEFECTS) and not type(found).__module__.startswith("pyarrow"):
                raise
            lasting = isinstance(found, (FileNotFoundError, PermissionError)) or not may_pass(found)
            if pause is None or lasting:
                raise DataError(f"{where} {_explained(found)}") from found
            logger.warning(f"{where}: {_one_line(found)}; trying again in {pause:g} s")
            time.sleep(pause)


def _behind(error: Exception) -> Exception:
    """What stopped the Hub's client or `datasets`, where they report no more than that they were stopped."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    while error.__cause__ is not None and (
        isinstance(error, (IncompleteSnapshotError, LocalEntryNotFoundError))
        or type(error).__module__.startswith("datasets.")
    ):
        error = error.__cause__
    return error


def _explained(error: Exception) -> str:
    """What is wrong and what to do, to follow the name of the place."""
    import pyarrow as pa
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    reason, status = _one_line(error), getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub; unset it, or download the data before"
    if isinstance(error, GatedRepoError):
        return "is gated: accept its terms on its page on the Hub, and log in (`hf auth login`, or HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "does not exist on the Hub, or may not be read with this token: check the name, and log in for a private "
            "one (`hf auth login`, or HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return "does not exist: the repository has no such revision"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"may not be read ({reason}); check the token or the credentials"
    if isinstance(error, FileNotFoundError) or status == 404:
        return f"does not exist ({reason}); check the address"
    if isinstance(error, (pa.ArrowException, UnicodeDecodeError)) or "page integrity" in reason:
        return f"is damaged ({reason}); prepare the data and put it there again"
    return f"cannot be read ({reason}); check the address and the network"


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
