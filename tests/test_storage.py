"""Folders on the disk and elsewhere: what is listed, and in which order files become visible."""

import os
from datetime import UTC, datetime

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from madm_utils import remote_data, storage
from madm_utils.cli import UserError
from madm_utils.prediction_report import Processes, Report
from madm_utils.storage import Entry, LocalStorage, RemoteStorage, Unwritable, open_input, open_storage


@pytest.fixture
def memory():
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_local_folder_is_listed(tmp_path):
    """Regular files in visible folders, links to them included; a file is as new as its place."""
    for name in ("b/2.png", "b/.hidden.png", ".cache/3.png", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    os.utime(tmp_path / "a.png", (0, 0))
    files = LocalStorage(tmp_path).files()
    assert list(files) == ["a.png", "b/2.png", "link.png"]
    assert files["a.png"].size == 3
    assert files["a.png"].modified == (tmp_path / "a.png").stat().st_ctime > 1e9
    assert LocalStorage(tmp_path / "new").files() == {}


def test_remote_folder_is_listed(memory):
    memory.pipe({"/x/b/2.png": b"22", "/x/.hidden/1.png": b"1", "/x/a.png": b"1", "/xy/c.png": b"1"})
    source, files = open_input("memory://x/", "--input")
    assert list(files) == ["a.png", "b/2.png"] and files["b/2.png"].size == 2
    assert files["a.png"].modified == memory.info("/x/a.png")["created"].timestamp()
    assert source.read("b/2.png") == b"22" and source.read("b/2.png", 1) == b"2"
    source, files = open_input("memory://x/a.png", "--input")
    assert list(files) == ["a.png"] and source.address("a.png") == "memory://x/a.png"
    with pytest.raises(UserError, match=r"memory://x/gone.png: no such file \(any more\)"):
        source.read("gone.png")


def test_times_of_every_kind_of_storage_are_understood():
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    for info in ({"LastModified": moment}, {"updated": "2026-01-02T00:00:00+00:00"}, {"mtime": moment.timestamp()}):
        assert storage._entry({"size": 5, **info}) == Entry(5, moment.timestamp())
    assert storage._entry({"created": 1.0, "mtime": 3.0, "size": None}) == Entry(None, 3.0)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_last_file_stands_for_the_others(kind, tmp_path, memory, monkeypatch):
    """When an older set of files is replaced and that fails, its last file is gone; what is not replaced goes, too."""
    target = LocalStorage(tmp_path) if kind == "local" else RemoteStorage("memory://out", "--output_dir")
    target.write({"sub/color": b"old", "sub/label": b"old"})
    assert {name: target.read(name) for name in target.files()} == {"sub/color": b"old", "sub/label": b"old"}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(remote_data, "PAUSES", ())
        patch.setattr(storage, "replacing", fail)
        patch.setattr(MemoryFileSystem, "pipe_file", fail)
        with pytest.raises(Unwritable, match="No space left on device"):
            target.write({"sub/color": b"new", "sub/label": b"new"}, ["sub/label", "sub/color"])
    assert list(target.files()) == ["sub/color"]
    target.write({"sub/color": b"new", "sub/label": b"new"}, ["sub/label", "sub/color", "sub/gone"])
    assert target.read("sub/label") == b"new"
    target.write({"sub/label": b"newer"}, ["sub/label", "sub/color"])
    assert {name: target.read(name) for name in target.files()} == {"sub/label": b"newer"}
    target.write({}, ["sub/label"])
    assert not target.files()


def test_a_web_address_is_one_image():
    pytest.importorskip("aiohttp")
    source, files = open_input("https://example.org/a/street.png?size=1", "--input")
    assert list(files) == ["street.png?size=1"] and source.address(*files) == "https://example.org/a/street.png?size=1"


def test_unknown_addresses_are_named():
    with pytest.raises(UserError, match=r"--output_dir parchment://x cannot be opened: Protocol not known"):
        open_storage("parchment://x", "--output_dir")


def test_a_process_that_ended_early_is_told_of(monkeypatch, capsys):
    processes = object.__new__(Processes)
    processes.count, processes._group = 3, None
    assert processes.gather(Report(5, done=5)).tell(0, "out") == 0
    processes._group = "group"

    def lose(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_gather_object", lose)
    report = processes.gather(Report(5, done=5))
    assert report.status == "stopped" and report.tell(1, "out", "process 1 of 3") == 1
    said = capsys.readouterr()
    assert "process 1 of 3: 5 of 6 images predicted, 1 done before" in said.out
    assert "error: 2 processes ended without a report; the same command goes on where it stopped" in said.err


def test_many_failures_are_told_in_part(capsys):
    report = Report(30, done=5, failed={f"{k:02}.png": f"{k:02}.png: broken" for k in range(25)})
    assert report.tell(0, "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "25 failed:" and lines[1] == "  00.png: broken"
    assert lines[21:] == ["  and 5 more (summary.json)"]
