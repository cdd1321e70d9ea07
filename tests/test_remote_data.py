"""Data elsewhere: the same samples as from the local folder, one request per row, and what is said when it fails."""

import io
import json
import logging
import pickle
import shutil
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from tiny_model import base_folder
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

import eval_madm
import prepare_datasets
import train_madm
from madm_utils import dataset_upload, remote_data
from madm_utils.cli import UserError
from madm_utils.dataset_upload import write_shards
from madm_utils.datasets import AdaptationDataset, EvaluationDataset
from madm_utils.prepared_data import open_split
from madm_utils.remote_data import RemoteFolder, locate
from madm_utils.split_rows import ParquetRows
from madm_utils.tasks import TASKS

TASK = TASKS["synthetic_to_depth"]
SPLITS = ("synthetic_rgb/train", "synthetic_depth/train", "synthetic_depth/test")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of prepared data."""
    folder = tmp_path_factory.mktemp("prepared")
    numbers = ("--num_train", 5, "--num_test", 2, "--resolution", 64, "--num_proc", 1)
    prepare_datasets.main([str(a) for a in ("--dataset", "synthetic", "--output_dir", folder, *numbers)])
    return folder


@pytest.fixture(scope="module")
def parquet(data, tmp_path_factory) -> Path:
    """The same as Parquet: several shards, a row group for each image."""
    folder = tmp_path_factory.mktemp("parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_upload, "ROW_GROUP_BYTES", 1)
        for split in SPLITS:
            assert len(list(write_shards(data / split, folder / split, shard_bytes=5_000))) > 1
            shutil.copy(data / split / "metadata.json", folder / split)
    return folder


class UnsteadyFile(io.BytesIO):
    """A file that is read over a network: every read is a request, which fails when it is told to."""

    def __init__(self, path: str, content: bytes):
        super().__init__(content)
        self.path = path

    def read(self, size: int = -1) -> bytes:
        if Unsteady.failures:
            raise Unsteady.failures.pop(0)
        content = super().read(size)
        Unsteady.reads.append((self.path, len(content)))
        return content


class Unsteady(MemoryFileSystem):
    """A file system of such files: the next reads raise what is in `failures`."""

    protocol = "unsteady"
    store: dict = {}
    pseudo_dirs = [""]
    failures: list[Exception] = []
    reads: list[tuple[str, int]] = []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("unsteady://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        return UnsteadyFile(path, self.cat_file(path))


fsspec.register_implementation("unsteady", Unsteady)


@pytest.fixture
def unsteady(parquet, monkeypatch):
    """The Parquet data behind a network, without waiting between the tries."""
    monkeypatch.setattr(remote_data, "PAUSES", (0.0, 0.0))
    Unsteady.failures, Unsteady.reads = [], []
    return put(parquet, "unsteady://bucket/data")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Cache of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache/downloads")
    return tmp_path / "cache"


def put(folder: Path, url: str) -> str:
    """Make `url` a copy of the folder."""
    system = fsspec.core.url_to_fs(url)[0]
    if system.exists(url):
        system.rm(url, recursive=True)
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def adaptation(data_dir, **options) -> AdaptationDataset:
    return AdaptationDataset(data_dir, TASK, 64, 12, seed=3, rare_class_min_pixels=10, **options)


def batches(dataset, **options) -> list[dict]:
    return list(DataLoader(dataset, batch_size=4, collate_fn=dataset.collate, **options))


def assert_equal(expected: list[dict], actual: list[dict]) -> None:
    """Equal in every bit."""
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = np.array_equal(value, other[key])  # tensors, arrays and lists of names
            assert same, key


# --- the same samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["streamed", "local parquet", "parquet cached", "arrow cached"])
def test_training_batches_are_those_of_the_local_folder(kind, data, parquet, cache):
    local = adaptation(data)
    assert isinstance(local._source, datasets.Dataset)
    where = {
        "streamed": lambda: put(parquet, "memory://bucket/data"),
        "local parquet": lambda: parquet,
        "parquet cached": lambda: put(parquet, "memory://bucket/data"),
        "arrow cached": lambda: put(data, "memory://bucket/data"),
    }[kind]()
    remote = adaptation(where, streaming=kind == "streamed")
    assert isinstance(remote._source, datasets.Dataset if "cached" in kind else ParquetRows)
    assert remote.fingerprints == local.fingerprints
    assert remote.sampler.probabilities == local.sampler.probabilities
    assert_equal(batches(local), batches(remote))
    if kind == "streamed":  # in loader processes, after this one has read from the files
        assert_equal(batches(local), batches(remote, num_workers=2, multiprocessing_context="fork"))
        assert not cache.exists()


def test_a_part_of_the_images_is_the_same_part(data, parquet):
    url = put(parquet, "memory://bucket/data")
    options = {"max_train_samples": 3, "rare_class_sampling": False}
    local, remote = adaptation(data, **options), adaptation(url, streaming=True, **options)
    assert remote.num_source == remote.num_target == 3
    assert_equal(batches(local), batches(remote))


def test_evaluation_is_that_of_the_local_folder(data, parquet):
    url = put(parquet, "memory://bucket/data")
    local, remote = (EvaluationDataset(place, TASK, "test", 64, "native", url == place) for place in (data, url))
    assert [remote.file_name(i) for i in range(2)] == [local.file_name(i) for i in range(2)]
    for i in range(2):
        assert torch.equal(local[i]["image"], remote[i]["image"]) and torch.equal(
            local[i]["label"], remote[i]["label"]
        )


def test_rows_are_those_of_the_arrow_files(data, parquet, tmp_path):
    """Values and types of all columns, of our shards and of those that `datasets` writes itself."""
    split = "synthetic_rgb/train"
    expected, _ = open_split(data / split)
    plain = tmp_path / "plain.parquet"
    datasets.load_from_disk(str(data / split)).to_parquet(plain, batch_size=2)
    shards = sorted(map(str, (parquet / split).glob("*.parquet")))
    for rows in (ParquetRows.open(shards), ParquetRows.open([str(plain)])):
        assert rows.column_names == expected.column_names and len(rows) == len(expected) == 5
        assert [rows[i] for i in (3, 0, 4, 4, 1, 2)] == [expected[i] for i in (3, 0, 4, 4, 1, 2)]
        assert rows["class_pixel_counts"] == expected["class_pixel_counts"][:]
        some = pickle.loads(pickle.dumps(rows)).select([4, 1]).select_columns(["file_name", "label"])
        assert len(some) == 2 and some[1] == {name: expected[1][name] for name in ("file_name", "label")}
        assert some["file_name"] == [expected[4]["file_name"], expected[1]["file_name"]]
        assert [row["file_name"] for row in some] == some["file_name"]
        with pytest.raises(IndexError):
            some[2]
    loaded = datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == datasets.load_from_disk(str(data / split)).features  # images and names of classes


def test_one_request_per_row(unsteady):
    """Of no more bytes than its image and label, and a few for the pages around them."""
    rows, _ = open_split(locate(unsteady) / "synthetic_rgb" / "train", streaming=True)
    assert len(Unsteady.reads) == len({path for path, _ in Unsteady.reads}) > 2  # the footer of each shard
    rows = rows.select_columns(["image", "label", "file_name"])
    Unsteady.reads.clear()
    for index in (2, 0, 2, 2):
        row = rows[index]
        size = sum(len(row[name]["bytes"]) for name in ("image", "label"))
        [(_, read)] = Unsteady.reads
        assert size < read < size + 1000
        assert rows[index] == row and len(Unsteady.reads) == 1  # its row group is still there
        rows[(index + 1) % 5]
        Unsteady.reads.clear()


def test_training_and_evaluation(data, parquet, tmp_path):
    """The scripts take an address and --streaming; the run records what it was trained on, and goes on with the same
    data from another place."""
    url = put(parquet, "memory://bucket/data")
    flags = "--task synthetic_to_depth --resolution 64 --projection_channels 32 --bottleneck_channels 32 --streaming"
    flags += " --head_channels 16 --rank 4 --rare_class_min_pixels 10 --report_to none --validate_on test"
    paths = ("--data_dir", url, "--output_dir", tmp_path / "run", "--pretrained_model_name_or_path", base_folder())
    argv = [*flags.split(), "--dataloader_num_workers", "0", *map(str, paths)]
    assert train_madm.main([*argv, "--max_train_steps", "1"]) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["settings"]["data_dir"] == url and record["settings"]["streaming"] is True
    for split in SPLITS[:2]:
        assert record["data"][split] == json.loads((parquet / split / "metadata.json").read_text())["fingerprint"]
    argv = [flag for flag in argv if flag != "--streaming"]
    argv[argv.index(url)] = str(data)
    assert train_madm.main([*argv, "--max_train_steps", "2", "--resume_from_checkpoint", "latest"]) == 0
    paths = ("--model_path", tmp_path / "run", "--data_dir", url, "--output_dir", tmp_path / "scores")
    eval_madm.main([*map(str, paths), "--streaming", "--dataloader_num_workers", "0"])
    assert json.loads((tmp_path / "scores/metrics.json").read_text())["num_images"] == 2


# --- places ----------------------------------------------------------------------------------------------------------


def test_what_data_dir_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/name").mkdir(parents=True)
    for local in ("data", "user/name", "./name", "../name", "/abs/name", "a/b/c", "user/"):
        assert locate(local) == Path(local)
    assert locate(Path("other/name")) == Path("other/name")
    assert locate(f"file://{tmp_path}/user/") == tmp_path / "user"
    assert locate("memory://bucket/data/") == RemoteFolder("memory://bucket/data")
    assert str(locate("memory://bucket/data") / "d" / "train") == "memory://bucket/data/d/train"


def test_streaming_of_local_data_changes_nothing(data):
    rows, _ = open_split(data / "synthetic_rgb/train", streaming=True)
    assert isinstance(rows, datasets.Dataset)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data_dir", "message"),
    [
        ("user/name", r"--data_dir user/name \(no such folder, so a dataset on the Hub\) is not in the cache, and "),
        ("hf://datasets/user/name@v1", r"--data_dir hf://datasets/user/name@v1 is not in the cache, and HF_HUB_OFF"),
        ("hf://datasets/user", r"--data_dir hf://datasets/user: .*hf://"),
        ("parchment://x", r"parchment://x cannot be opened: Protocol not known: parchment.*Known are local folders"),
        ("memory://nowhere", r"memory://nowhere/synthetic_rgb/train does not exist \(.*holds no split\)"),
    ],
)
def test_places_that_do_not_exist(data_dir, message):
    with pytest.raises(UserError, match=message):
        adaptation(data_dir, streaming=True)


def test_a_missing_package_is_named():
    if "s3fs" in {d.name for d in __import__("importlib.metadata").metadata.distributions()}:
        pytest.skip("s3fs is installed")
    with pytest.raises(UserError, match=r"s3://bucket/data cannot be opened: .*s3fs.*pip install s3fs"):
        adaptation("s3://bucket/data")


def test_missing_split_lists_what_is_there(parquet):
    url = put(parquet, "memory://bucket/data")
    message = r"data/synthetic_depth/val does not exist \(.* the splits test, train\).* --push_to_hub --hub_dataset_id"
    with pytest.raises(UserError, match=message):
        EvaluationDataset(url, TASK, "val", 64, streaming=True)


def test_streaming_arrow_files_is_refused(data):
    url = put(data, "memory://bucket/arrow")
    with pytest.raises(UserError, match=r"rgb/train holds Arrow files, .* leave --streaming out, or put Parquet"):
        adaptation(url, streaming=True)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("metadata.json", lambda content: b"{", "metadata.json cannot be read as metadata"),
        ("metadata.json", lambda content: None, "train/metadata.json does not exist"),
        ("data-00000-of-", lambda content: content[:-20], "data-00000-of-.*parquet is damaged .*put it there again"),
        ("data-00000-of-", lambda content: None, r"holds \d images with columns .*says 5 images"),
        ("data-0", lambda content: None, "holds neither Parquet nor Arrow files"),
    ],
)
def test_damaged_places(file, change, message, parquet):
    url = put(parquet, "memory://bucket/damaged")
    system = fsspec.filesystem("memory")
    for path in system.glob(f"{url}/synthetic_rgb/train/{file}*"):
        content = change(system.cat_file(path))
        system.rm_file(path) if content is None else system.pipe_file(path, content)
    with pytest.raises(UserError, match=message):
        adaptation(url, streaming=True)


def test_changed_bytes_are_noticed(parquet, monkeypatch):
    """Not every image format would: the pages have checksums. A loader process hands on the message, not more."""
    monkeypatch.setattr(remote_data, "PAUSES", ())
    url = put(parquet, "memory://bucket/changed")
    system = fsspec.filesystem("memory")
    for path in system.glob(f"{url}/synthetic_depth/train/*.parquet"):
        content = bytearray(system.cat_file(path))
        content[len(content) // 3] ^= 1
        system.pipe_file(path, bytes(content))
    message = r"^memory://bucket/changed/synthetic_depth/train/data-.*parquet is damaged .*put it there again$"
    with pytest.raises(UserError, match=message) as stop:
        batches(adaptation(url, streaming=True))
    with pytest.raises(UserError, match=message):
        ExceptionWrapper((stop.type, stop.value, stop.tb), "in DataLoader worker process 0").reraise()


def test_failures_that_pass_are_survived(unsteady, data, caplog):
    remote = adaptation(unsteady, streaming=True)
    Unsteady.failures = [ConnectionResetError("reset by peer"), TimeoutError()]
    with caplog.at_level(logging.WARNING):
        assert_equal(batches(adaptation(data)), batches(remote))
    assert not Unsteady.failures
    assert "parquet: reset by peer; trying again in 0 s" in caplog.text and "TimeoutError" in caplog.text


@pytest.mark.parametrize(
    ("error", "tries", "message"),
    [
        (ConnectionResetError("reset by peer"), 3, r"cannot be read \(reset by peer\); check the address and the net"),
        (PermissionError("Forbidden"), 1, r"may not be read \(Forbidden\); check the token or the credentials"),
        (FileNotFoundError("gone"), 1, r"does not exist \(gone\); check the address"),
    ],
)
def test_failures_that_last(error, tries, message, unsteady):
    remote = adaptation(unsteady, streaming=True)
    Unsteady.failures = [error] * 5
    with pytest.raises(UserError, match=r"^unsteady://bucket/data/synthetic_\w+/train/data-0.*parquet " + message):
        remote[0]
    assert len(Unsteady.failures) == 5 - tries
    Unsteady.failures = []
    assert remote[0]["corrupt"] == []


def test_a_defect_is_not_taken_for_a_failure(unsteady):
    remote = adaptation(unsteady, streaming=True)
    Unsteady.failures = [AttributeError("typo")]
    with pytest.raises(AttributeError, match="typo"):
        remote[0]


def test_an_image_that_does_not_decode_is_replaced(data, tmp_path):
    """As it is in local data: by the same draw."""
    rows = datasets.load_from_disk(str(data / "synthetic_depth/train"))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    broken = rows.map(lambda row, i: {"image": {"bytes": b"x", "path": None}} if i == 2 else {}, with_indices=True)
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    shutil.rmtree(folder / "synthetic_depth/train")
    broken.cast_column("image", datasets.Image()).save_to_disk(str(folder / "synthetic_depth/train"))
    shutil.copy(data / "synthetic_depth/train/metadata.json", folder / "synthetic_depth/train")
    for split in SPLITS:
        list(write_shards(folder / split, tmp_path / "parquet" / split))
        shutil.copy(data / split / "metadata.json", tmp_path / "parquet" / split)
    local = batches(adaptation(folder))
    assert any(batch["corrupt"] for batch in local)
    assert_equal(local, batches(adaptation(put(tmp_path / "parquet", "memory://bucket/broken"), streaming=True)))


def test_fingerprints_are_those_of_the_metadata(unsteady, data):
    expected = json.loads((data / "synthetic_rgb/train/metadata.json").read_text())["fingerprint"]
    dataset = adaptation(unsteady, streaming=True, target=False)
    assert dataset.fingerprints == {"synthetic_rgb/train": expected}
    assert np.isclose(sum(dataset.sampler.probabilities), 1)
