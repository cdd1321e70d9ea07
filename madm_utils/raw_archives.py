"""One file of a raw dataset, on disk or in a zip or tar archive, and the listing of such archives.

Members are read in place; nothing is unpacked under a name that an archive chose.

Archives come from elsewhere, so each is checked as a whole before anything of it is used: no absolute names or names
with `..`, no links, devices, encrypted or sparse members, no declared size or compression beyond the limits below.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from madm_utils.cli import UserError
from madm_utils.files import replacing

MAX_MEMBER_BYTES = 64 << 30
"""Unpacked size of one member; event recordings have gigabytes, all of DSEC's for training 125 GB together."""
MAX_READ_BYTES = 1 << 30
"""What `RawPath.read_bytes` takes into memory: pictures, labels, polygons; recordings go through `local_file`."""
MAX_COMPRESSION_RATIO = 200
"""Unpacked size over packed size. Pictures and recordings are compressed already, polygons shrink to about a tenth."""
RATIO_FREE_BYTES = 16 << 20
"""Members up to this size may have any compression ratio: they cannot do harm."""
MAX_MEMBERS = 4_000_000
CHUNK_BYTES = 4 << 20

COMPRESSED_TARS: dict[str, Callable[..., BinaryIO]] = {
    ".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.bz2": bz2.open, ".tbz2": bz2.open,
    ".tar.xz": lzma.open, ".txz": lzma.open,
}  # fmt: skip
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
IGNORED_FOLDER = "__MACOSX"
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, KeyError)


@dataclass(frozen=True)
class RawPath:
    """One file of a raw dataset: on disk, or a member of a zip or tar archive.

    It can be pickled and read in any process; a zip archive is opened once per process.
    """

    container: Path
    """The file itself, or the archive that holds it."""
    member: str | None = None
    """Name inside the archive, as the archive spells it."""
    size: int = 0
    """Bytes, unpacked."""
    offset: int | None = None
    """Where the bytes of a tar member begin."""
    unpacked: Path | None = None
    """Of a compressed tar: the decompressed copy that is read in its place."""

    @classmethod
    def on_disk(cls, path: Path) -> "RawPath":
        """The file `path`, with its present size."""
        return cls(path, size=path.stat().st_size)

    @property
    def name(self) -> str:
        """Last component of the path."""
        return self.container.name if self.member is None else _member_parts(self.member)[-1]

    def __str__(self) -> str:
        return str(self.container) if self.member is None else f"{self.container}!{self.member}"

    def read_bytes(self) -> bytes:
        """Return the whole file.

        Raises:
            UserError: it is damaged, cannot be read, has another size than when it was listed, or is too large.
        """
        if self.size > MAX_READ_BYTES:
            raise UserError(
                f"{self}: {self.size} bytes are too many for a picture or a label; at most {MAX_READ_BYTES} are read"
            )
        return b"".join(self._chunks())

    def local_file(self, scratch: Path) -> Path:
        """Return a file on disk with these bytes: the file itself, or a new private one in `scratch`.

        The caller deletes a file in `scratch`.

        Raises:
            UserError: as `read_bytes`, whatever the size.
        """
        if self.member is None:
            return self.container
        scratch.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=scratch, prefix="member-", suffix=f"-{self.name}")
        try:
            with open(descriptor, "wb") as file:
                for chunk in self._chunks():
                    file.write(chunk)
        except BaseException:
            os.unlink(name)
            raise
        return Path(name)

    def _chunks(self) -> Iterator[bytes]:
        """The bytes in pieces, `size` of them in all."""
        left = self.size
        try:
            with self._open() as file:
                while left and (chunk := file.read(min(left, CHUNK_BYTES))):
                    left -= len(chunk)
                    yield chunk
                longer = bool(file.read(1)) if self.offset is None else False
        except _DAMAGED as error:
            raise UserError(f"{self} cannot be read ({error}); {self._remedy()}") from None
        if left or longer:
            found = f"more than {self.size}" if longer else str(self.size - left)
            raise UserError(f"{self} holds {found} bytes, {self.size} when it was listed; {self._remedy()}")

    def _open(self) -> BinaryIO:
        if self.member is None:
            return open(self.container, "rb")
        if self.offset is None:
            return _zip_file(self.container).open(self.member)
        file = open(self.unpacked or self.container, "rb")
        file.seek(self.offset)
        return file

    def _remedy(self) -> str:
        if self.member is None:
            return "copy the file again"
        return "the archive is damaged or was changed: download it again"


def is_archive(name: str) -> bool:
    """Whether a file of this name is opened as an archive."""
    return name.lower().endswith((".zip", ".tar", *COMPRESSED_TARS))


def list_archive(archive: Path, scratch: Path | None = None) -> dict[str, RawPath]:
    """POSIX path -> file of every member that is not hidden.

    Raises:
        UserError: the archive is damaged or unsafe; the message names it and the member.
    """
    name = archive.name.lower()
    try:
        if name.endswith(".zip"):
            return _list_zip(archive)
        compressed = next((open_ for suffix, open_ in COMPRESSED_TARS.items() if name.endswith(suffix)), None)
        return _list_tar(archive, _decompress(archive, compressed, scratch) if compressed else None)
    except _DAMAGED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{archive} cannot be read as an archive ({error}); it is damaged, incomplete or something else: download "
            "it again, or move it out of --raw_dir if it is not needed"
        ) from None


def _list_zip(archive: Path) -> dict[str, RawPath]:
    found = {}
    members = _zip_file(archive).infolist()
    _check_number(archive, len(members))
    for info in members:
        parts = _checked_parts(archive, info.filename)
        if stat.S_ISLNK(info.external_attr >> 16):
            _refuse(archive, info.filename, "is a link")
        if info.flag_bits & 0x1:
            _refuse(archive, info.filename, "is encrypted")
        if info.compress_type not in ZIP_METHODS:
            _refuse(archive, info.filename, f"has the unknown compression method {info.compress_type}")
        _check_size(archive, info.filename, info.file_size, info.compress_size)
        if not info.is_dir() and not is_hidden(parts):
            found["/".join(parts)] = RawPath(archive, info.filename, info.file_size)
    return found


def _list_tar(archive: Path, unpacked: Path | None) -> dict[str, RawPath]:
    found = {}
    with tarfile.open(unpacked or archive, "r:") as tar:
        for number, info in enumerate(tar, start=1):
            _check_number(archive, number)
            parts = _checked_parts(archive, info.name)
            if info.issym() or info.islnk():
                _refuse(archive, info.name, "is a link")
            if info.issparse() or not (info.isreg() or info.isdir()):
                _refuse(archive, info.name, "is a sparse file or a device")
            _check_size(archive, info.name, info.size, info.size)
            if info.isreg() and not is_hidden(parts):
                found["/".join(parts)] = RawPath(archive, info.name, info.size, info.offset_data, unpacked)
        # tarfile takes a damaged header for the end; the true end is a block of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut off after {len(found)} files, at byte {tar.offset}")
    return found


def _decompress(archive: Path, open_: Callable[..., BinaryIO], scratch: Path | None) -> Path:
    """Return the decompressed copy of a compressed tar in `scratch`, made now if it is not there yet."""
    if scratch is None:
        raise UserError(
            f"{archive} is a compressed tar, which cannot be read in place; unpack it, or decompress it to a .tar"
        )
    from tqdm import tqdm

    state = archive.stat()
    identity = f"{archive.absolute()} {state.st_size} {state.st_mtime_ns}"
    target = scratch / f"{archive.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.tar"
    if target.exists():
        return target
    limit = max(MAX_COMPRESSION_RATIO * state.st_size, RATIO_FREE_BYTES)
    scratch.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=state.st_size, desc=f"decompress {archive.name}", unit="B", unit_scale=True, delay=3)
    with bar, replacing(target) as temporary, open(archive, "rb") as packed, open_(packed, "rb") as source:
        with open(temporary, "wb") as copy:
            while chunk := source.read(CHUNK_BYTES):
                if copy.tell() + len(chunk) > limit:
                    _refuse(archive, "its content", f"unpacks to more than {MAX_COMPRESSION_RATIO} times its size")
                try:
                    copy.write(chunk)
                except OSError as error:
                    raise UserError(
                        f"{archive}: no room for its decompressed copy in {scratch} ({error}); make room, or unpack "
                        "the archive elsewhere"
                    ) from None
                bar.update(packed.tell() - bar.n)
    return target


def _zip_file(archive: Path) -> zipfile.ZipFile:
    """The opened archive, kept open until it changes; a forked process opens it for itself."""
    state = archive.stat()
    return _opened_zip(archive, os.getpid(), state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _opened_zip(archive: Path, *_state: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


def _member_parts(member: str) -> tuple[str, ...]:
    # Some programs write zip files with backslashes.
    return PurePosixPath(member.replace("\\", "/")).parts


def _checked_parts(archive: Path, member: str) -> tuple[str, ...]:
    parts = _member_parts(member)
    if ".." in parts or (parts and (parts[0].startswith("/") or parts[0][1:2] == ":")):
        _refuse(archive, member, "leads out of the archive's folder")
    if shown_name(member) != member:
        _refuse(archive, member, "has a name that is not UTF-8")
    return parts


def shown_name(name: str) -> str:
    """The name with bytes that are not UTF-8 written out, e.g. `caf\\udce9.png`; others stay as they are."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_hidden(parts: tuple[str, ...]) -> bool:
    """Whether a path is left out: hidden, or what macOS adds to archives."""
    return any(part.startswith(".") or part == IGNORED_FOLDER for part in parts)


def _check_number(archive: Path, number: int) -> None:
    if number > MAX_MEMBERS:
        raise UserError(f"{archive} holds more than {MAX_MEMBERS} files; refused, it is no dataset known here")


def _check_size(archive: Path, member: str, size: int, packed: int) -> None:
    if size > MAX_MEMBER_BYTES:
        _refuse(archive, member, f"unpacks to {size} bytes, more than {MAX_MEMBER_BYTES}")
    if size > RATIO_FREE_BYTES and size > MAX_COMPRESSION_RATIO * packed:
        _refuse(archive, member, f"unpacks to more than {MAX_COMPRESSION_RATIO} times its size")


def _refuse(archive: Path, member: str, reason: str) -> None:
    raise UserError(
        f"{archive}: {shown_name(member)} {reason}; such archives are not opened. Download it again from its "
        "owners, or unpack it yourself if you trust it"
    )
