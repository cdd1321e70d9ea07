"""Upload of prepared data to a dataset repository on the Hugging Face Hub, as Parquet.

    README.md                                        card; lists every dataset as a configuration with its splits
    <dataset>/<split>/data-00000-of-00005.parquet    the rows, in order
    <dataset>/<split>/metadata.json                  `prepared_data.Metadata`

A `--data_dir` of the same form, so training takes the repository's id in place of a folder; and one that
`datasets.load_dataset("user/name", "cityscapes", split="train")` reads by itself.
"""

import base64
import fnmatch
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madm_utils.cli import UserError
from madm_utils.dataset_card import CARD_FILE, CardSplit, dataset_card
from madm_utils.prepared_data import METADATA_FILE, Metadata, open_split
from madm_utils.split_rows import COLUMNS_KEY, WHOLE_COLUMNS

if TYPE_CHECKING:
    import datasets
    from huggingface_hub import HfApi

SHARD_BYTES = 500_000_000
"""Largest Parquet file: what the Hub advises, and what lies in the temporary folder at a time."""
ROW_GROUP_BYTES = 256 * 1024
"""A row group gets as many rows as fit in here, at least one. It is the least that can be fetched of a file: below
this size a request takes the time of its way, not that of its bytes."""


def push_prepared(
    data_dir: Path,
    names: Sequence[str],
    repo_id: str,
    private: bool = True,
    redistribution_permitted: bool = False,
    token: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Upload prepared datasets, each in one commit that replaces what the repository has of it and keeps the others.

    Needs room for one shard in the temporary folder. Given again after an interruption, it sends only what is missing.

    Args:
        data_dir: `--output_dir` of the preparation.
        names: datasets in it; all their splits are uploaded.
        repo_id: `user/name` of the repository, created when it does not exist.
        private: create it as private, and refuse one that is not.
        redistribution_permitted: the user says that data may be uploaded whose licence forbids to pass it on.
        token: default: the one of `hf auth login`.
        shard_bytes: about the size of a Parquet file.

    Returns:
        Address of the repository.

    Raises:
        UserError: not prepared, not permitted, a wrong name or token, a public repository where a private one was
            asked for, no room, no connection.
    """
    from huggingface_hub import HfApi

    datasets = {name: _splits(data_dir, name) for name in names}
    if not redistribution_permitted:
        for metadata in (metadata for splits in datasets.values() for metadata in splits.values()):
            check_licence(metadata.dataset, metadata.licence)
    api = HfApi(token=token)
    try:
        repo_id = _create(api, repo_id, private)
        for name, splits in datasets.items():
            _push(api, repo_id, data_dir / name, splits, shard_bytes)
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises many unrelated types
        text = (" ".join(str(error).split()) or type(error).__name__)[:300]
        reason = text.replace(token.strip(), "***") if token else text  # a header that cannot be sent is quoted
        what = f"--push_to_hub: {', '.join(names)} could not be uploaded to {repo_id} ({reason}). "
        if type(error) is OSError:  # of the disk; those of the network are of types of their own
            remedy = f"Make room in {tempfile.gettempdir()}, or choose another folder with TMPDIR"
        else:
            remedy = (
                "Check --hub_dataset_id, the token (`hf auth login`, or --hub_token; it needs the right to write) and "
                "the network"
            )
        raise UserError(f"{what}{remedy}; then give the command again: what has arrived is not sent twice") from None
    return f"{api.endpoint}/datasets/{repo_id}"


def _splits(data_dir: Path, name: str) -> dict[str, Metadata]:
    """Metadata of all prepared splits of a dataset."""
    found = [path.parent for path in (data_dir / name).glob(f"[!.]*/{METADATA_FILE}")]
    if not found:
        raise UserError(f"{data_dir / name} holds no prepared data to upload; prepare {name} first")
    return {
        folder.name: Metadata.load(folder) for folder in sorted(found, key=lambda folder: _split_order(folder.name))
    }


def _split_order(split: str) -> tuple[bool, str]:
    """Training data first."""
    return split != "train", split


def check_licence(dataset: str, licence: Mapping[str, Any] | None) -> None:
    """Refuse a dataset whose owners do not let it be passed on.

    Args:
        dataset: its name.
        licence: as `Metadata` has it.
    """
    if licence is not None and not licence["redistribution"]:
        raise UserError(
            f"{dataset} may not be passed on: {licence['summary']} ({licence['url']}). That holds for converted "
            "images too. If you have the right to upload it, e.g. to a private repository for your own use, confirm "
            "that with --redistribution_permitted"
        )


def _create(api: "HfApi", repo_id: str, private: bool) -> str:
    """Create the repository unless it exists, and make sure that it can be written to; returns its full id."""
    from huggingface_hub import CommitOperationAdd

    repo_id = api.create_repo(repo_id, private=private or None, repo_type="dataset", exist_ok=True).repo_id
    # Asks how a file would be uploaded, which needs the right to write; nothing is sent.
    api.preupload_lfs_files(repo_id, [CommitOperationAdd("README.md", b"-")], repo_type="dataset")
    if private and not api.repo_info(repo_id, repo_type="dataset").private:
        raise UserError(
            f"--push_to_hub: {repo_id} exists and is public; make it private on the Hub, give another "
            "--hub_dataset_id, or upload publicly with --hub_public_repo"
        )
    return repo_id


def _push(api: "HfApi", repo_id: str, folder: Path, splits: dict[str, Metadata], shard_bytes: int) -> None:
    """Upload all splits of the dataset in `folder`: file by file, then one commit that makes them appear."""
    import pyarrow.parquet as pq
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from tqdm import tqdm

    name, files, shown = folder.name, [], {}
    with (
        tempfile.TemporaryDirectory(prefix="push-") as temporary,
        tqdm(desc=f"upload {name}", total=sum(m.num_images for m in splits.values()), unit="image") as progress,
    ):
        for split, metadata in splits.items():
            at, num_bytes = f"{name}/{split}", 0
            for path in write_shards(folder / split, Path(temporary) / split, shard_bytes):
                num_bytes += path.stat().st_size
                progress.update(pq.read_metadata(path).num_rows)
                columns = tuple(pq.read_schema(path).names)
                file = CommitOperationAdd(f"{at}/{path.name}", path)
                api.preupload_lfs_files(repo_id, [file], repo_type="dataset")
                if file.path_or_fileobj == b"":  # it has arrived; otherwise it is small and goes with the commit
                    path.unlink()
                files.append(file)
            files.append(CommitOperationAdd(f"{at}/{METADATA_FILE}", folder / split / METADATA_FILE))
            shown[at] = CardSplit(metadata, columns, num_bytes)
        # Read now, so that what another upload has added meanwhile is kept; the commit fails if one comes after this.
        parent = api.repo_info(repo_id, repo_type="dataset").sha
        there = _Uploaded(api, repo_id, parent)
        card = updated_card(there.card(), repo_id, there.splits(), shown)
        files.append(CommitOperationAdd(CARD_FILE, card.encode()))
        new = {file.path_in_repo for file in files}
        replaced = tuple(f"{at}/" for at in shown)
        stale = [path for path in there.sizes if path.startswith(replaced) and path not in new]
        files += [CommitOperationDelete(path) for path in stale]
        api.create_commit(
            repo_id,
            files,
            commit_message=f"Add {name}: {', '.join(splits)}",
            repo_type="dataset",
            parent_commit=parent,
        )


class _Uploaded:
    """What a repository holds at a commit."""

    def __init__(self, api: "HfApi", repo_id: str, commit: str):
        self._api, self._repo_id, self._at = api, repo_id, {"repo_type": "dataset", "revision": commit}
        entries = api.list_repo_tree(repo_id, recursive=True, **self._at)
        self.sizes = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
        """File -> bytes."""

    def card(self) -> str | None:
        """The repository's README.md, `None` if it has none."""
        return self._read(CARD_FILE).read_text(encoding="utf-8") if CARD_FILE in self.sizes else None

    def splits(self) -> dict[str, CardSplit]:
        """`<dataset>/<split>` -> what the card says about it; what cannot be read is left out."""
        import pyarrow.parquet as pq
        from huggingface_hub import HfFileSystem

        found, files = {}, HfFileSystem(token=self._api.token)
        for path in fnmatch.filter(self.sizes, f"*/*/{METADATA_FILE}"):
            at = path.rsplit("/", 1)[0]
            shards = fnmatch.filter(self.sizes, f"{at}/*.parquet")
            try:
                metadata = Metadata.load(self._read(path).parent)
                url = f"datasets/{self._repo_id}@{self._at['revision']}/{min(shards)}"
                with files.open(url, "rb", cache_type="none") as file:
                    columns = tuple(pq.read_schema(file).names)
            except ValueError:  # no such metadata (`UserError`), no shards, no Parquet
                continue
            found[at] = CardSplit(metadata, columns, sum(self.sizes[shard] for shard in shards))
        return found

    def _read(self, path: str) -> Path:
        return Path(self._api.hf_hub_download(self._repo_id, path, **self._at))


def write_shards(folder: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> Iterator[Path]:
    """Write a prepared split as Parquet files in `target`, one by one: each may be moved away before the next.

    The rows are those of the split, bytes unchanged. Row groups are small, for reading rows by themselves, and
    every footer has the columns that are read as a whole (`remote_data`). Memory holds one row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, _ = open_split(folder)
    features = _with_decoding(data.features)
    rows_per_group = max(1, ROW_GROUP_BYTES * len(data) // max(1, data.data.nbytes))
    num_shards = max(1, min(len(data), -(-data.data.nbytes // shard_bytes)))
    target.mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        rows = data.shard(num_shards, index, contiguous=True)
        path = target / f"data-{index:05d}-of-{num_shards:05d}.parquet"
        # Images are compressed already, and every value is different.
        writer = pq.ParquetWriter(
            path,
            features.arrow_schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        with writer:
            for batch in rows.with_format("arrow").iter(rows_per_group):
                writer.write_table(batch.cast(features.arrow_schema))
            whole = [name for name in WHOLE_COLUMNS if name in features]
            table: pa.Table = rows.select_columns(whole).with_format("arrow")[:]
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            writer.add_key_value_metadata({COLUMNS_KEY: base64.b64encode(buffer.getvalue()).decode()})
        yield path


def _with_decoding(features: "datasets.Features") -> "datasets.Features":
    """Columns that hold images say so to whoever loads them."""
    import datasets

    return datasets.Features(
        {name: datasets.Image() if isinstance(kind, datasets.Image) else kind for name, kind in features.items()}
    )


def updated_card(text: str | None, repo_id: str, there: dict[str, CardSplit], new: dict[str, CardSplit]) -> str:
    """README.md of a repository after an upload: a configuration for each dataset, and a description of all.

    Where somebody has changed the description, that stays as it is; so do further configurations and fields.

    Args:
        text: README.md as it is, `None` if there is none.
        repo_id: of the repository.
        there: `<dataset>/<split>` -> what it is, of all that the repository held before.
        new: the same of what is uploaded.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    def description(splits: dict[str, CardSplit]) -> DatasetCard:
        return dataset_card([splits[at] for at in sorted(splits, key=_order)], repo_id)

    splits, configs = there | new, {}
    for at in sorted(splits, key=_order):
        name, split = at.split("/")
        config = configs.setdefault(name, {"config_name": name, "data_files": []})
        config["data_files"].append({"split": split, "path": f"{at}/data-*.parquet"})
    card = description(splits)
    if text is not None:
        old = DatasetCard(text, ignore_metadata_errors=True)
        fields = old.data.to_dict()
        configs = {config["config_name"]: config for config in fields.get("configs", ())} | configs
        if there and old.text.strip() == description(there).text.strip():
            card.data = DatasetCardData(**(fields | card.data.to_dict()))
        else:
            card = old
    card.data.configs = list(configs.values())
    return str(card)


def _order(at: str) -> tuple[str, bool, str]:
    """Sort key of `<dataset>/<split>`: training data first."""
    name, split = at.split("/")
    return name, split != "train", split
