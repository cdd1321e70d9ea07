"""Prepared data on a local server that speaks the Hub's protocol: upload, and reading it back.

The client reads `HF_ENDPOINT` when it is imported, so it runs in processes of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, Repo
from huggingface_hub import DatasetCard

import prepare_datasets
from madm_utils.dataset_card import CardSplit
from madm_utils.dataset_upload import updated_card, write_shards
from madm_utils.prepared_data import Metadata

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "summary": "Research use only; not to be passed on.",
    "url": "https://x.org/terms",
    "redistribution": False,
}


def prepare(folder: Path, seed: int) -> Path:
    numbers = ("--num_train", 4, "--num_test", 2, "--resolution", 64, "--seed", seed, "--num_proc", 1)
    prepare_datasets.main([str(a) for a in ("--dataset", "synthetic", "--output_dir", folder, *numbers)])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of prepared data."""
    return prepare(tmp_path_factory.mktemp("prepared"), seed=0)


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def client(hub: HubServer, code: str, folder: Path, **environment: object) -> str:
    """Run `code` against the server; returns what it printed."""
    own = {"PYTHONPATH": ROOT, "HF_HOME": folder / "hf", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "OMP_NUM_THREADS": "1",
           **environment}  # fmt: skip
    env = os.environ | hub.environment() | {name: str(value) for name, value in own.items()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=folder)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-5000:]
    assert "hf_Secret" not in printed
    return done.stdout


def test_upload_and_batches_from_there(hub, data, tmp_path):
    """What arrives is what was sent; plain `datasets` reads it; batches are those of the local folder in whatever way
    the data come, of the commit that was opened, and later without a connection."""
    other = prepare(tmp_path / "other", seed=1)
    printed = client(
        hub,
        """
import os
from pathlib import Path
import datasets, huggingface_hub, torch
from torch.utils.data import DataLoader
from madm_utils import dataset_upload
from madm_utils.dataset_card import CardSplit
from madm_utils.dataset_upload import push_prepared
from madm_utils.datasets import AdaptationDataset
from madm_utils.split_rows import ParquetRows
from madm_utils.tasks import TASKS

data, other = Path(os.environ["DATA"]), Path(os.environ["OTHER"])
dataset_upload.ROW_GROUP_BYTES = 1
print("address", push_prepared(data, ["synthetic_rgb"], "x", shard_bytes=20_000))
push_prepared(data, ["synthetic_depth"], "me/x", shard_bytes=20_000)

rows = datasets.load_dataset("me/x", "synthetic_rgb", split="train")
here = datasets.load_from_disk(str(data / "synthetic_rgb/train"))
assert rows.features == here.features
undecoded = datasets.Image(decode=False)
rows, here = (r.cast_column("image", undecoded).cast_column("label", undecoded) for r in (rows, here))
assert rows.to_list() == here.to_list()

def batches(place, **options):
    dataset = AdaptationDataset(place, TASKS["synthetic_to_depth"], 64, 8, 3, rare_class_min_pixels=10, **options)
    return dataset, lambda **loader: list(DataLoader(dataset, batch_size=4, collate_fn=dataset.collate, **loader))

def same(expected, actual):
    keys = ("source_image", "source_label", "target_image")
    assert len(expected) == len(actual) == 2
    assert all(torch.equal(one[key], two[key]) for one, two in zip(expected, actual) for key in keys)

_, expected = batches(str(data))
streamed, read = batches("me/x", streaming=True)
assert isinstance(streamed._source, ParquetRows)
same(expected(), read())
same(expected(), read(num_workers=2))
same(expected(), batches("hf://datasets/me/x@main")[1]())
huggingface_hub.constants.HF_HUB_OFFLINE = True
same(expected(), batches("me/x")[1]())  # from the cache
huggingface_hub.constants.HF_HUB_OFFLINE = False

push_prepared(other, ["synthetic_rgb", "synthetic_depth"], "me/x")
same(expected(), read())  # of the commit that was opened
same(batches(str(other))[1](), batches("me/x", streaming=True)[1]())
print("done")
""",
        tmp_path,
        DATA=data,
        OTHER=other,
        HF_TOKEN=WRITE_TOKEN,
    )
    assert f"address {hub.url}/datasets/me/x" in printed and printed.endswith("done\n")
    repo = hub.repos["datasets/me/x"]
    assert repo.private and repo.commits == [f"Add synthetic_{name}: train, test" for name in ("rgb", "depth")] * 2
    assert set(repo.files) == {"README.md"} | {
        f"synthetic_{name}/{split}/{file}"
        for name in ("rgb", "depth")
        for split in ("train", "test")
        for file in ("metadata.json", "data-00000-of-00001.parquet")
    }  # the shards of the first upload are gone
    card = DatasetCard(repo.files["README.md"].decode())
    assert [config["config_name"] for config in card.data.configs] == ["synthetic_rgb", "synthetic_depth"]
    assert card.text.count("{} |".format(json.loads(repo.files["synthetic_rgb/train/metadata.json"])["content"])) == 1
    before = repo.earlier[list(repo.earlier)[2]]
    assert sum(".parquet" in path for path in before) > 4
    assert before["synthetic_rgb/train/metadata.json"] == (data / "synthetic_rgb/train/metadata.json").read_bytes()


def test_what_the_hub_and_the_licence_refuse(hub, data, tmp_path):
    """Each in one message; nothing is uploaded."""
    hub.repos["datasets/me/public"] = Repo()
    hub.repos["datasets/me/private"] = Repo(private=True)
    hub.repos["datasets/me/there"] = Repo(files={"synthetic_rgb/train/metadata.json": b"{}"})
    forbidden = tmp_path / "data/cityscapes"
    shutil.copytree(data / "synthetic_rgb", forbidden)
    metadata = Metadata.load(forbidden / "test")
    replace(metadata, dataset="cityscapes", licence=FORBIDDEN).save(forbidden / "test")
    printed = client(
        hub,
        """
import os, resource
from pathlib import Path
import prepare_datasets
from madm_utils import remote_data
from madm_utils.cli import UserError
from madm_utils.dataset_card import CardSplit
from madm_utils.dataset_upload import push_prepared
from madm_utils.remote_data import list_folders, locate
from madm_utils.prepared_data import open_split

remote_data.PAUSES = ()
data, forbidden, token = Path(os.environ["DATA"]), Path(os.environ["FORBIDDEN"]), os.environ["WRITER"]
attempts = {
    "licence": lambda: push_prepared(forbidden, ["cityscapes"], "me/x", token=token),
    "not prepared": lambda: push_prepared(data, ["fmb"], "me/x", token=token),
    "wrong token": lambda: push_prepared(data, ["synthetic_rgb"], "me/x", token="hf_wrong"),
    "read only": lambda: push_prepared(data, ["synthetic_rgb"], "me/private", token=os.environ["READER"]),
    "public": lambda: push_prepared(data, ["synthetic_rgb"], "me/public", token=token),
    "disk full": lambda: push_prepared(data, ["synthetic_rgb"], "me/full", token=token),
    "unknown": lambda: locate("me/nothing"),
    "not mine": lambda: locate("me/private"),
    "revision": lambda: locate("hf://datasets/me/public@v7"),
    "there": lambda: print("there", list_folders(locate("me/there") / "synthetic_rgb")),
    "below": lambda: print("below", list_folders(locate("hf://datasets/me/there/synthetic_rgb"))),
    "bad metadata": lambda: open_split(locate("me/there") / "synthetic_rgb" / "train", streaming=True),
}
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for name, attempt in attempts.items():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]) if name == "disk full" else unlimited)
    try:
        attempt()
    except UserError as error:
        print(f"{name}: {error}")
push_prepared(forbidden, ["cityscapes"], "me/mine", redistribution_permitted=True, token=token)
flags = "--dataset synthetic --num_train 4 --num_test 2 --resolution 64 --push_to_hub --hub_public_repo".split()
paths = ["--output_dir", str(data), "--hub_dataset_id", "me/public", "--hub_token", token]
assert prepare_datasets.main([*flags, *paths]) == 0
""",
        tmp_path,
        DATA=data,
        FORBIDDEN=tmp_path / "data",
        WRITER=WRITE_TOKEN,
        READER=READ_TOKEN,
    )
    lines = dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)
    for name, message in {
        "licence": r"cityscapes may not be passed on: Research use only; .*https://x.org/terms.*--redistribution_permit",
        "not prepared": r".*/fmb holds no prepared data to upload; prepare fmb first",
        "wrong token": r"--push_to_hub: .* could not be uploaded to me/x \(.*Invalid credentials.*--hub_dataset_id",
        "read only": r"--push_to_hub: synthetic_rgb could not be uploaded to me/private \(.*403",
        "public": r"--push_to_hub: me/public exists and is public; .*--hub_public_repo",
        "disk full": r"--push_to_hub: .* \(.*too large.*\). Make room in /.*, or choose another folder with TMPDIR",
        "unknown": r"--data_dir me/nothing \(no such folder, so a dataset on the Hub\) does not exist on the Hub,",
        "not mine": r"--data_dir me/private .* may not be read with this token: .*hf auth login",
        "revision": r"--data_dir hf://datasets/me/public@v7 does not exist: the repository has no such revision",
        "bad metadata": r"hf://datasets/me/there@\w{40}/synthetic_rgb/train/metadata.json cannot be read as metadata",
    }.items():
        assert re.match(message, lines[name]), lines[name]
    assert (
        "there ['train']" in printed
        and "below ['train']" in printed
        and f" to {hub.url}/datasets/me/public" in printed
    )
    uploaded = {name for name, repo in hub.repos.items() if repo.commits}
    assert uploaded == {"datasets/me/mine", "datasets/me/public"}
    card = DatasetCard(hub.repos["datasets/me/mine"].files["README.md"].decode())
    assert card.data.license == "other" and "Research use only; not to be passed on. <https" in card.text


# --- without a server ------------------------------------------------------------------------------------------------


def test_card_lists_all_datasets_and_keeps_what_others_wrote(data):
    """Another dataset is added; new data of the first replace what is said about it, unless somebody has edited."""

    def shown(name: str, split: str, **changes) -> dict[str, CardSplit]:
        metadata = Metadata.load(data / "synthetic_rgb" / split)
        return {f"{name}/{split}": CardSplit(replace(metadata, dataset=name, **changes), ("image", "label"), 1000)}

    def config(name: str, *splits: str) -> dict:
        files = [{"split": split, "path": f"{name}/{split}/data-*.parquet"} for split in splits]
        return {"config_name": name, "data_files": files}

    one = shown("a", "test") | shown("a", "train")
    first = updated_card(None, "me/x", {}, one)
    assert 'load_dataset("me/x", "a", split="train")' in first and "--data_dir me/x" in first
    own = first.replace("configs:", "language: en\nconfigs:\n- config_name: own\n  data_files: own.csv")
    second = updated_card(own, "me/x", one, shown("b", "train"))
    third = DatasetCard(updated_card(second, "me/x", one | shown("b", "train"), shown("a", "test", num_images=77)))
    mine = {"config_name": "own", "data_files": "own.csv"}
    assert third.data.language == "en"
    assert third.data.configs == [mine, config("a", "train", "test"), config("b", "train")]
    assert "## a" in third.text and "## b" in third.text and "| test | 77 | 64x64 |" in third.text

    edited = DatasetCard(updated_card(first + "\nA remark.\n", "me/x", one, shown("b", "train")))
    assert edited.text.strip() == (DatasetCard(first).text + "\nA remark.").strip()
    assert edited.data.configs == [config("a", "train", "test"), config("b", "train")]


def test_shards_hold_the_rows_in_order(data, tmp_path):
    """However they are cut, one by one, in row groups of a bounded size."""
    folder = data / "synthetic_rgb/train"
    expected = datasets.load_from_disk(str(folder))
    for shard_bytes, count in ((1, 4), (30_000, 2), (10**9, 1)):
        names, rows = [], []
        for path in write_shards(folder, tmp_path / str(count), shard_bytes):
            names.append(path.name)
            rows.append(datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")))
            assert rows[-1].features == expected.features
            path.unlink()
        assert names == [f"data-{i:05d}-of-{count:05d}.parquet" for i in range(count)]
        assert datasets.concatenate_datasets(rows)["file_name"][:] == expected["file_name"][:]
