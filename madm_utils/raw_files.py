"""The files of a raw dataset, unpacked on disk or still inside the archives their owners ship.

`RawTree.open` lists a folder: its files, and the members of its archives as if they were unpacked beside them.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from madm_utils.cli import UserError
from madm_utils.raw_archives import RawPath, is_archive, is_hidden, list_archive, shown_name

__all__ = ["RawPath", "RawTree"]

UNSUPPORTED_ARCHIVES = (".rar", ".7z", ".tar.zst", ".tar.lz4")


@dataclass(frozen=True)
class RawTree:
    """Every file below a raw folder, archives included."""

    raw_dir: Path
    files: dict[str, RawPath]
    """POSIX path below `raw_dir` -> file, sorted by path."""
    conflicts: dict[str, tuple[RawPath, RawPath]] = field(default_factory=dict)
    """Paths that two archives hold with different sizes; `files` has the first."""
    unusable: dict[str, str] = field(default_factory=dict)
    """POSIX path of a damaged or unsafe archive below `raw_dir` -> what is wrong with it. Nothing of it is used."""
    scratch: Path | None = None
    """Folder for what has to be unpacked."""

    @classmethod
    def open(cls, raw_dir: Path, scratch: Path | None = None) -> "RawTree":
        """List the folder (or the single archive) `raw_dir`.

        Hidden files and what macOS adds to archives are left out. Linked folders and files on disk are followed. A
        file on disk counts before one of the same path in an archive.

        Args:
            raw_dir: folder or archive.
            scratch: folder for decompressed copies of compressed tar archives, which cannot be read at random; a copy
                that is there from an earlier call is used again. `None`: such archives are refused.

        Raises:
            UserError: `raw_dir` does not exist or cannot be listed, holds a file whose name is not UTF-8, or is itself
                a damaged or unsafe archive. Other such archives may not matter, see `unusable`.
        """
        files: dict[str, RawPath] = {}
        conflicts: dict[str, tuple[RawPath, RawPath]] = {}
        archives: list[tuple[str, Path]] = []
        unusable: dict[str, str] = {}
        if raw_dir.is_file() and is_archive(raw_dir.name):
            archives.append(("", raw_dir))
        elif not raw_dir.is_dir():
            kind = "is a file and no archive" if raw_dir.exists() else "does not exist"
            raise UserError(f"raw folder {raw_dir} {kind}; --raw_dir is the folder (or archive) that holds the data")
        else:
            for path, found in _walk(raw_dir):
                if is_archive(found.name):
                    archives.append((path.rpartition("/")[0], found.container))
                else:
                    files[path] = found
        on_disk = set(files)
        for parent, archive in archives:
            try:
                members = list_archive(archive, scratch)
            except UserError as error:
                if archive == raw_dir:
                    raise
                unusable[f"{parent}/{archive.name}" if parent else archive.name] = str(error)
                continue
            for name, found in members.items():
                path = f"{parent}/{name}" if parent else name
                if path not in files:
                    files[path] = found
                elif path not in on_disk and found.size != files[path].size:
                    conflicts[path] = (files[path], found)
        return cls(raw_dir, dict(sorted(files.items())), conflicts, unusable, scratch)

    def check_archives(self, root: str) -> None:
        """Raise `UserError` if an archive that lies below `root` (ends in `/`, or is empty) cannot be used."""
        for path, message in self.unusable.items():
            if path.startswith(root):
                raise UserError(message)

    def archives_note(self) -> str:
        """What is wrong with archives, to add to a message about missing files; empty where nothing is."""
        if not self.unusable:
            return ""
        return " What is missing may be in archives that cannot be used: " + "; ".join(self.unusable.values())

    def describe(self, limit: int = 20) -> str:
        """The first names in the folder, for messages."""
        names = {path.partition("/")[0] for path in self.files}
        if self.raw_dir.is_dir():
            names |= {child.name for child in self.raw_dir.iterdir() if not is_hidden((child.name,))}
        shown = sorted(
            f"{name} (cannot be opened: unpack it)" if name.lower().endswith(UNSUPPORTED_ARCHIVES) else name
            for name in names
        )
        more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
        return ", ".join(shown[:limit]) + more if shown else "nothing"


def _walk(raw_dir: Path) -> Iterator[tuple[str, RawPath]]:
    """Files below `raw_dir` with their POSIX paths; links are followed, but no folder is entered twice."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); check its permissions")

    entered = set()
    for folder, subfolders, names in os.walk(raw_dir, followlinks=True, onerror=fail):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((state.st_dev, state.st_ino))
        below = Path(folder).relative_to(raw_dir).as_posix()
        prefix = "" if below == "." else f"{below}/"
        subfolders[:] = sorted(name for name in subfolders if not is_hidden((name,)))
        for name in sorted(names):
            path = Path(folder, name)
            try:
                state = path.stat()
            except OSError:  # a link to nowhere; a label or picture that is missed is reported by its name
                continue
            if stat.S_ISREG(state.st_mode) and not is_hidden((name,)):
                _check_utf_8(raw_dir, prefix + name)
                yield prefix + name, RawPath(path, size=state.st_size)


def _check_utf_8(raw_dir: Path, path: str) -> None:
    """Refuse a name that cannot be stored as text; Python represents its bytes by lone surrogates."""
    if shown_name(path) != path:
        raise UserError(
            f"the name of {shown_name(path)} in {raw_dir} is not UTF-8; rename it (convmv renames whole folders), or "
            "move it out"
        )
