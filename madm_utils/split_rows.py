"""Rows of a prepared split: of memory-mapped Arrow files, or of Parquet files, here or elsewhere."""

import base64
import io
import os
import pickle
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from madm_utils.cli import UserError
from madm_utils.remote_data import RemoteFolder, fsspec_of, patiently

if TYPE_CHECKING:
    import datasets
    import pyarrow
    import pyarrow.parquet

COLUMNS_KEY = "prepared_columns"
"""Entry of a shard's footer: `WHOLE_COLUMNS` of all its rows, as base64 of a Parquet table."""
WHOLE_COLUMNS = ("file_name", "class_pixel_counts")
"""Columns that are asked for as a whole, before any row: rare-class sampling needs them."""
_OPEN_SHARDS = 8
"""Shards whose footer a process keeps parsed, about 5 MB each."""


def open_rows(folder: Path | RemoteFolder, cache_name: str, streaming: bool) -> "datasets.Dataset | ParquetRows":
    """Rows of a prepared split.

    Local Arrow files are memory-mapped and local Parquet files read in place, with and without `streaming`. Of files
    elsewhere, `streaming` fetches rows of Parquet when they are asked for; otherwise everything is downloaded, once:
    a repository into the Hub's cache, other files into that of `datasets`.

    Args:
        folder: of the split.
        cache_name: names what is cached, and must change with the content.
        streaming: keep no copy on the disk.

    Raises:
        UserError: Arrow files cannot be streamed.
        Exception: whatever the libraries raise at broken files.
    """
    import datasets

    if isinstance(folder, RemoteFolder) and folder.snapshot is not None and not streaming:
        folder = folder.download()
    local = isinstance(folder, Path)
    files = sorted(map(str, folder.glob("*"))) if local else folder.file_urls()
    shards = {kind: [file for file in files if file.endswith(f".{kind}")] for kind in ("arrow", "parquet")}
    if shards["arrow"] or not shards["parquet"]:
        if local:
            return datasets.load_from_disk(str(folder))
        if not shards["arrow"]:
            raise UserError(f"{folder} holds neither Parquet nor Arrow files; copy the whole prepared folder there")
        if streaming:
            raise UserError(
                f"{folder} holds Arrow files, of which single rows cannot be fetched; leave --streaming out, or put "
                "Parquet files there: prepare_datasets.py --push_to_hub makes them on the Hub"
            )
    elif local or streaming:
        return ParquetRows.open(shards["parquet"])
    kind = "arrow" if shards["arrow"] else "parquet"
    options = {"name": cache_name, "data_files": {"split": shards[kind]}, "split": "split"}
    return patiently(str(folder), lambda: datasets.load_dataset(kind, **options))


class ParquetRows:
    """Rows of Parquet shards, read one by one when they are asked for; as much of a `datasets.Dataset` as is used.

    A row costs one request, of its row group. The shards' footers are read when they are opened; `WHOLE_COLUMNS` come
    with them. Memory holds the footers (about 600 bytes per row group) and one row group.

    Picklable, and fit for processes that were forked: each opens the files itself.
    """

    def __init__(self, shards: "_Shards", indices: np.ndarray, column_names: Sequence[str]):
        self._shards, self._indices, self.column_names = shards, indices, list(column_names)

    @classmethod
    def open(cls, urls: Sequence[str]) -> "ParquetRows":
        """Open shards, in the order of their rows.

        Raises:
            DataError: one cannot be read.
        """
        shards = _Shards(urls)
        return cls(shards, np.arange(shards.num_rows), shards.column_names)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: int | str) -> Any:
        """A row as a dictionary, images as `{"bytes", "path"}`; or all values of one of `WHOLE_COLUMNS`, as a list."""
        if isinstance(key, str):
            return self._shards.whole[key].take(self._indices).to_pylist()
        return self._shards.row(int(self._indices[key]), self.column_names)

    def select(self, indices: Iterable[int]) -> "ParquetRows":
        """The rows of these positions."""
        return ParquetRows(self._shards, self._indices[np.fromiter(indices, np.int64)], self.column_names)

    def select_columns(self, column_names: Sequence[str]) -> "ParquetRows":
        """The same rows with fewer columns; what is left out is not fetched."""
        return ParquetRows(self._shards, self._indices, column_names)


class _Shards:
    """Several Parquet files as one table, read by row group."""

    def __init__(self, urls: Sequence[str]):
        import pyarrow as pa

        self.urls = list(urls)
        with ThreadPoolExecutor(_OPEN_SHARDS) as threads:
            footers = list(threads.map(_read_footer, self.urls))
        self.column_names = footers[0].column_names
        self.whole = pa.concat_tables(footer.whole for footer in footers)
        self._footers = [footer.pickled for footer in footers]
        sizes = [(shard, group, n) for shard, f in enumerate(footers) for group, n in enumerate(f.group_sizes)]
        self._shard, self._group, counts = np.array(sizes, np.int64).reshape(-1, 3).T
        self._end = np.cumsum(counts)
        self._start = self._end - counts
        self.num_rows = int(counts.sum())
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_files", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        """Hold nothing open; connections must not be shared with the process this one was forked from."""
        self._process = os.getpid()
        self._files: dict[int, pyarrow.parquet.ParquetFile] = {}
        self._last: tuple[tuple[int, ...], pyarrow.Table] | None = None

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """One row. Its row group stays in memory for the next, which is often from the same."""
        if self._process != os.getpid():
            self._forget()
        position = int(np.searchsorted(self._end, index, side="right"))
        wanted = (position, *columns)
        if self._last is None or self._last[0] != wanted:
            self._last = None  # not two at a time
            shard, group = int(self._shard[position]), int(self._group[position])
            table = patiently(self.urls[shard], lambda: self._read_group(shard, group, columns))
            self._last = wanted, table
        return self._last[1].slice(index - int(self._start[position]), 1).to_pylist()[0]

    def _read_group(self, shard: int, group: int, columns: Sequence[str]) -> "pyarrow.Table":
        file = self._files.pop(shard, None) or _open_parquet(self.urls[shard], pickle.loads(self._footers[shard]))
        table = file.read_row_group(group, columns=list(columns), use_threads=False)
        self._files[shard] = file  # the last one used is the last one; a file that failed is opened again
        if len(self._files) > _OPEN_SHARDS:
            del self._files[next(iter(self._files))]
        return table


@dataclass(frozen=True)
class _Footer:
    """What is known of a Parquet file without its rows."""

    pickled: bytes
    """`pyarrow.parquet.FileMetaData`; parsed it takes ten times the memory."""
    group_sizes: list[int]
    column_names: list[str]
    whole: "pyarrow.Table"
    """Of `WHOLE_COLUMNS`, those that are there."""


def _read_footer(url: str) -> _Footer:
    import pyarrow.parquet as pq

    def read() -> _Footer:
        file = _open_parquet(url)
        metadata = file.metadata
        names = file.schema_arrow.names
        stored = (metadata.metadata or {}).get(COLUMNS_KEY.encode())
        if stored is not None:
            whole = pq.read_table(io.BytesIO(base64.b64decode(stored)))
        else:  # not written by this suite: one request per row group
            whole = file.read(columns=[name for name in WHOLE_COLUMNS if name in names])
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return _Footer(pickle.dumps(metadata), sizes, names, whole)

    return patiently(url, read)


def _open_parquet(url: str, metadata: "pyarrow.parquet.FileMetaData | None" = None) -> "pyarrow.parquet.ParquetFile":
    """A Parquet file of which exactly what is asked for is fetched, and checked against its checksums."""
    import pyarrow.parquet as pq

    file = fsspec_of(url).open(url, "rb", cache_type="none")
    return pq.ParquetFile(file, metadata=metadata, pre_buffer=True, page_checksum_verification=True)
