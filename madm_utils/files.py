"""Files and folders that are either complete or absent."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from madm_utils.cli import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` on success and is removed on failure.

    The sibling has no image suffix: name the format when saving a picture to it.
    """
    # Not only the process's number: machines that share a disk may have equal ones.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what writing below `folder` raises, e.g. because the disk is full, into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise  # no matter of the disk, e.g. a tracker without network
        raise UserError(f"cannot write in {folder} ({error}); make room or give another --output_dir") from None


def publish_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `folder`, then give it its final name, replacing an older one.

    Everything is on the disk before the name appears, so that not even a power failure leaves half a folder under it.
    When something fails, the older folder stays and the temporary one is removed.
    """
    folder = folder.absolute()  # "." has no name
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(staged: Path, folder: Path) -> None:
    """Rename the complete folder `staged` to `folder`, beside it, and remove the one it replaces.

    The disk holds all of `staged` before; when renaming fails, the older folder is there again.
    """
    folder = folder.absolute()
    earlier = folder.with_name(f".{folder.name}.tmp-{os.getpid()}-old")
    _flush(staged)
    try:
        if folder.exists():
            folder.rename(earlier)
        staged.rename(folder)
        _flush_entry(folder.parent)
    finally:
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Have the disk hold the files below `folder`, and the folders' lists of them."""
    for path in sorted(folder.rglob("*")):
        _flush_entry(path)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Raise `UserError` unless `folder` is, or can become, a folder to write to. Nothing is created."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--output_dir {folder}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: no permission to write in {existing}; give another folder")
