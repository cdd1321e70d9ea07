"""Interrupted, shared and repeated preparation ends in the same Arrow files; what goes wrong loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from raw_trees import labels, picture, save

import prepare_datasets
from madm_utils.cli import UserError
from madm_utils.conversion import SceneConversion

SCRIPT = Path(prepare_datasets.__file__)
COUNT = 40
"""Training images: three chunks of 16."""


def write_fmb(raw: Path, count: int = COUNT) -> Path:
    """FMB whose training images are constant, image i of value i."""
    for i in range(count):
        save(raw / f"FMB/train/Infrared/{i:05d}.png", np.full((6, 8), i))
    save(raw / "FMB/test/Infrared/00043.png", picture(0, 6, 8))
    save(raw / "FMB/test/Label/00043.png", labels(0, [1, 2], 6, 8))
    return raw


def prepare(raw: Path, out: Path, *flags: object, num_proc: int = 1) -> int:
    command = ["--dataset", "fmb", "--raw_dir", raw, "--output_dir", out, "--num_proc", num_proc, *flags]
    return prepare_datasets.main([str(part) for part in command])


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_fmb(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """Files of the dataset, prepared in one go."""
    out = tmp_path_factory.mktemp("whole")
    prepare(raw, out)
    return files(out)


def test_chunks_are_one_dataset_in_order(raw, tmp_path):
    prepare(raw, tmp_path)
    folder = tmp_path / "fmb/train"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"data-{i:05d}-of-00003.arrow" for i in range(3)), "dataset_info.json", "metadata.json", "state.json"
    ]  # fmt: skip
    data = datasets.load_from_disk(str(folder))
    assert [np.asarray(image)[0, 0] for image in data["image"]] == list(range(COUNT))
    assert data["frame"][:] == [f"{i:05d}" for i in range(COUNT)]
    test = datasets.load_from_disk(str(tmp_path / "fmb/test"))
    names = test.features["classes"].feature.names
    assert [names[c] for c in test[0]["classes"]] == ["road", "sidewalk"]
    metadata = json.loads((tmp_path / "fmb/test/metadata.json").read_text())
    assert metadata["images_per_class"][:4] == [0, 1, 1, 0]


def test_several_processes_write_the_same_files(raw, whole, tmp_path):
    prepare(raw, tmp_path, num_proc=2)
    assert files(tmp_path) == whole


def test_a_killed_run_goes_on_and_ends_in_the_same_files(tmp_path):
    """SIGKILL after the first finished chunk; the drawn scenes take long enough to be caught in the middle.

    Two processes start the work, one goes on with it, and one makes all of it for comparison.
    """
    flags = ["--dataset", "synthetic_rgb", "--num_train", "48", "--num_test", "1", "--resolution", "96"]

    def command(name: str, num_proc: int = 1) -> list[str]:
        return [*flags, "--output_dir", str(tmp_path / name), "--num_proc", str(num_proc)]

    process = subprocess.Popen([sys.executable, str(SCRIPT), *command("killed", 2)])
    partial = tmp_path / "killed/synthetic_rgb/.train.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("data-*.json")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()  # only the main process: its workers have to notice
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("data-*.arrow")}
    assert finished and not (tmp_path / "killed/synthetic_rgb/train").exists()
    while any_process_in(partial) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert prepare_datasets.main(command("killed")) == 0
    assert prepare_datasets.main(command("whole")) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    folder = tmp_path / "killed/synthetic_rgb/train"
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished  # not made again


def any_process_in(folder: Path) -> bool:
    """Whether a process still has a file below `folder` open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(folder) in os.readlink(link):
                return True
        except OSError:
            continue
    return False


def test_interrupt_says_how_to_go_on(raw, tmp_path):
    command = [sys.executable, SCRIPT, "--dataset", "synthetic_rgb", "--output_dir", tmp_path, "--num_proc", "1",
               "--num_train", "2000", "--resolution", "96"]  # fmt: skip
    # A shell's background job ignores Ctrl-C and passes that on; the test may run in one.
    obey = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True, preexec_fn=obey)
    while not list(tmp_path.glob("*/.*.partial/data-*.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "interrupted" in errors and "same command" in errors


def test_interrupt_that_compiled_code_drops_still_stops(tmp_path, monkeypatch, capsys):
    """numpy's `Generator.choice` drops a Ctrl-C that reaches Python within it, here always and not now and then."""
    convert, made = SceneConversion.__call__, []

    def pressed_in_the_third(self, item, scratch):
        made.append(item)
        if len(made) == 3:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return convert(self, item, scratch)

    monkeypatch.setattr(SceneConversion, "__call__", pressed_in_the_third)
    command = ["--dataset", "synthetic_rgb", "--output_dir", str(tmp_path), "--num_train", "8", "--resolution", "32"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert prepare_datasets.main([*command, "--num_proc", "1"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(made) == 3 and "same command" in capsys.readouterr().err
    assert not (tmp_path / "synthetic_rgb/train").exists()


# --- Shares


def test_shares_of_several_machines_merge_to_the_same_files(raw, whole, tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    for share, out in (("1/3", here), ("3/3", here), ("2/3", there)):
        assert prepare(raw, out, "--shard", share) == 0
    assert "share 2/3 is done" in capsys.readouterr().out
    merge = ["--dataset", "fmb", "--output_dir", str(here), "--merge"]
    with pytest.raises(UserError, match=r"fmb train: 1 of 3 shards are missing .*first data-00001-of-00003.arrow"):
        prepare_datasets.main(merge)
    assert prepare_datasets.main([*merge, str(there)]) == 0
    assert files(here) == whole


def test_a_share_without_work_leaves_that_of_others(raw, tmp_path):
    """The test split is one chunk, which is share 1's: share 2 has nothing to do there while share 1 is at work."""
    prepare(raw, tmp_path, "--shard", "1/2")
    before = files(tmp_path / "fmb/.test.partial")
    prepare(raw, tmp_path, "--shard", "2/2")
    after = files(tmp_path / "fmb/.test.partial")
    assert {name: after[name] for name in before} == before
    prepare(raw, tmp_path / "other", "--shard", "8/8")  # no chunk of any split
    assert (tmp_path / "other/fmb/.train.partial/plan.json").exists()


def test_merge_needs_every_split_of_the_command(tmp_path):
    raw = write_fmb(tmp_path / "raw")
    (raw / "FMB/test/Infrared/00043.png").write_bytes(b"not an image")
    prepare(raw, tmp_path / "out", "--shard", "2/2")
    with pytest.raises(UserError, match="00043.png cannot be read"):
        prepare(raw, tmp_path / "out", "--shard", "1/2")
    merge = ["--dataset", "fmb", "--output_dir", str(tmp_path / "out"), "--merge"]
    with pytest.raises(UserError, match="fmb test: 1 of 1 shards are missing"):
        prepare_datasets.main(merge)
    assert not (tmp_path / "out/fmb/train").exists()


def test_merge_finds_shares_of_other_settings_and_damaged_ones(raw, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    prepare(raw, here, "--shard", "1/2")
    prepare(raw, there, "--shard", "2/2", "--store_resolution", "6x8")
    merge = ["--dataset", "fmb", "--output_dir", str(here), "--merge"]
    with pytest.raises(UserError, match=r"other files or settings .*stored_size: \[512, 683\] -> \[6, 8\]"):
        prepare_datasets.main([*merge, str(there)])
    shutil.rmtree(there)
    prepare(raw, there, "--shard", "2/2")
    damaged = there / "fmb/.train.partial/data-00001-of-00003.arrow"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"data-00001-of-00003.arrow was damaged .*run its share"):
        prepare_datasets.main([*merge, str(there)])
    with pytest.raises(UserError, match="nothing to merge: no share of --shard in .*nowhere"):
        prepare_datasets.main([*merge[:3], str(tmp_path / "nowhere"), "--merge"])


# --- Runs that cannot go on


def test_work_with_other_settings_is_kept_until_it_is_given_up(raw, tmp_path):
    prepare(raw, tmp_path, "--shard", "1/2")
    before = files(tmp_path)
    with pytest.raises(
        UserError, match=r"interrupted run .*with other settings: stored_size: \[512, 683\] -> None.*--overwrite"
    ):
        prepare(raw, tmp_path, "--store_resolution", "native")
    assert {name: content for name, content in files(tmp_path).items() if "lock" not in name} == {
        name: content for name, content in before.items() if "lock" not in name
    }
    prepare(raw, tmp_path, "--store_resolution", "native", "--overwrite")
    assert datasets.load_from_disk(str(tmp_path / "fmb/train"))[0]["image"].size == (8, 6)


def test_a_mended_file_costs_only_its_own_chunk(tmp_path):
    raw = write_fmb(tmp_path / "raw")
    bad = raw / "FMB/train/Infrared/00035.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(UserError, match="00035.png cannot be read as an image"):
        prepare(raw, tmp_path / "out")
    partial = tmp_path / "out/fmb/.train.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("data-*.arrow")}
    assert sorted(finished) == ["data-00000-of-00003.arrow", "data-00001-of-00003.arrow"]
    save(bad, np.full((6, 8), 35))
    prepare(raw, tmp_path / "out")
    folder = tmp_path / "out/fmb/train"
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert len(datasets.load_from_disk(str(folder))) == COUNT


def test_work_from_files_that_were_written_again_is_done_again(tmp_path):
    """Same names and sizes, other pixels: only the time of the file tells."""
    raw = write_fmb(tmp_path / "raw")
    prepare(raw, tmp_path / "out", "--shard", "1/2")
    for i in range(COUNT):
        path = raw / f"FMB/train/Infrared/{i:05d}.png"
        Image.fromarray(np.full((6, 8), 255 - i, np.uint8)).save(path)
        os.utime(path, ns=(1, 1))
    prepare(raw, tmp_path / "out")
    data = datasets.load_from_disk(str(tmp_path / "out/fmb/train"))
    assert [np.asarray(image)[0, 0] for image in data["image"]] == [255 - i for i in range(COUNT)]


def test_fingerprint_tells_other_pixels_and_another_label_map(tmp_path):
    save(tmp_path / "images/0.png", picture(0, 6, 8, 3))
    save(tmp_path / "labels/0.png", np.full((6, 8), 7))

    def fingerprint(out: str, meaning: str) -> str:
        (tmp_path / "map.yaml").write_text(f"class_names: [road, car]\nids: {{7: {meaning}}}\n")
        command = ["--dataset", "folder", "--name", "mine", "--images", tmp_path / "images", "--num_proc", 1,
                   "--labels", tmp_path / "labels", "--label_map", tmp_path / "map.yaml",
                   "--output_dir", tmp_path / out]  # fmt: skip
        assert prepare_datasets.main([str(part) for part in command]) == 0
        return json.loads((tmp_path / out / "mine/train/metadata.json").read_text())["fingerprint"]

    first = fingerprint("a", "road")
    assert fingerprint("b", "road") == first != fingerprint("c", "car")
    with pytest.raises(UserError, match="other files or with other settings"):
        fingerprint("a", "car")
    size = (tmp_path / "images/0.png").stat().st_size
    save(tmp_path / "images/0.png", picture(1, 6, 8, 3))
    with (tmp_path / "images/0.png").open("ab") as file:
        file.write(bytes(max(0, size - file.tell())))
    assert fingerprint("d", "road") != first


def test_files_that_are_no_prepared_data_are_never_replaced(tmp_path):
    save(tmp_path / "data/thermal/train/0.png", picture(0, 6, 8, 3))
    command = ["--dataset", "folder", "--name", "thermal", "--images", tmp_path / "data/thermal/train",
               "--output_dir", tmp_path / "data", "--num_proc", 1, "--overwrite"]  # fmt: skip
    with pytest.raises(UserError, match="exists and is no prepared data .*choose another --output_dir"):
        prepare_datasets.main([str(part) for part in command])
    assert (tmp_path / "data/thermal/train/0.png").exists()


def test_skipped_files_are_recorded_and_bounded(tmp_path, capsys):
    raw = write_fmb(tmp_path / "raw")
    for i in (3, 20):
        (raw / f"FMB/train/Infrared/{i:05d}.png").write_bytes(b"not an image")
    prepare(raw, tmp_path / "out", "--on_error", "skip", "--max_errors", "2")
    metadata = json.loads((tmp_path / "out/fmb/train/metadata.json").read_text())
    assert metadata["num_images"] == COUNT - 2
    assert [skip["file"] for skip in metadata["skipped"]] == [
        "train/Infrared/00003.png", "train/Infrared/00020.png"
    ]  # fmt: skip
    data = datasets.load_from_disk(str(tmp_path / "out/fmb/train"))
    assert [np.asarray(image)[0, 0] for image in data["image"]] == [i for i in range(COUNT) if i not in (3, 20)]
    assert "(2 skipped)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"fmb train: 2 images cannot be used, more than --max_errors 1; first "
                       r"train/Infrared/00003.png: .*cannot be read as an image"):  # fmt: skip
        prepare(raw, tmp_path / "other", "--on_error", "skip", "--max_errors", "1")
    # What an earlier run has skipped is no longer good enough when images must not be left out.
    prepare(raw, tmp_path / "again", "--on_error", "skip", "--shard", "1/2")
    with pytest.raises(UserError, match="00003.png cannot be read as an image"):
        prepare(raw, tmp_path / "again")
    for path in raw.glob("FMB/train/Infrared/*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="fmb train: not one image could be used; first: .*00000.png"):
        prepare(raw, tmp_path / "none", "--on_error", "skip", "--max_errors", "1000")


def test_two_processes_do_not_prepare_the_same(raw, tmp_path):
    import filelock

    partial = tmp_path / "fmb/.train.partial"
    partial.mkdir(parents=True)
    (partial / "data-00000-of-00003.arrow.tmp").write_bytes(b"of the other process")
    busy = pytest.raises(UserError, match="another process is preparing")
    with filelock.FileLock(partial / ".1-of-1.lock"):
        with busy:
            prepare(raw, tmp_path)
        with busy:
            prepare(raw, tmp_path, "--shard", "1/2")
    with filelock.FileLock(partial / ".1-of-2.lock"):
        with busy:
            prepare(raw, tmp_path)
        prepare(raw, tmp_path, "--shard", "2/2")
    assert (partial / "data-00000-of-00003.arrow.tmp").exists()


def test_disk_full_half_way_keeps_what_is_done_and_goes_on(raw, whole, tmp_path):
    """On a file system of its own, a few pages large, which grows before the second attempt."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        rng = np.random.default_rng(0)
        noisy = tmp_path / "raw"
        write_fmb(noisy)
        for path in noisy.glob("FMB/train/Infrared/*.png"):
            save(path, rng.integers(0, 256, (96, 128)))
        flags = ("--store_resolution", "native")
        with pytest.raises(UserError, match=r"writing below .* failed \(.*[Nn]o space.*finished shards are kept"):
            prepare(noisy, small, *flags)
        assert not (small / "fmb/train").exists()
        assert list(small.glob("fmb/.train.partial/data-*.json"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        prepare(noisy, small, *flags)
        prepare(noisy, tmp_path / "large", *flags)
        assert files(small) == files(tmp_path / "large")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_output_folder_that_cannot_be_written(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; give a folder"):
        prepare(raw, tmp_path / "file/data")
    if not os.access("/sys/kernel", os.W_OK):
        pytest.skip("/sys is not there")
    with pytest.raises(UserError, match="/sys/kernel/data.* cannot be written"):
        prepare(raw, Path("/sys/kernel/data"))


def test_stored_resolution(raw, tmp_path):
    with pytest.raises(SystemExit):
        prepare(raw, tmp_path, "--store_resolution", "12")
    prepare(raw, tmp_path, "--store_resolution", "3x4")
    train = datasets.load_from_disk(str(tmp_path / "fmb/train"))
    assert train[7]["image"].size == (4, 3) and Image.Image.getpixel(train[7]["image"], (0, 0)) == 7
    assert datasets.load_from_disk(str(tmp_path / "fmb/test"))[0]["image"].size == (8, 6)  # evaluated natively
    settings = json.loads((tmp_path / "fmb/train/metadata.json").read_text())["settings"]
    assert settings["stored_size"] == [3, 4]
