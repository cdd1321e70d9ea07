"""Listing and reading raw files: folders and every kind of archive alike, and one message for each unsafe one."""

import io
import multiprocessing
import os
import pickle
import random
import re
import resource
import struct
import tarfile
import zipfile
from contextlib import contextmanager

import pytest
from raw_trees import tar_tree, zip_tree

from madm_utils import raw_archives
from madm_utils.cli import UserError
from madm_utils.raw_files import RawPath, RawTree

CONTENT = {
    "a/one.png": b"first picture",
    "a/two.png": random.Random(0).randbytes(30_000),
    "b/c/empty.txt": b"",
    "top.json": b"{}" * 5000,
}
CENTRAL = b"PK\x01\x02"
FLAGS, METHOD, PACKED, UNPACKED = 8, 10, 20, 24


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENT.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "data"


def refused(message: str, raw_dir, scratch=None) -> None:
    """The folder itself raises the message; for an archive in it, it is kept, and nothing of the archive is used."""
    try:
        tree = RawTree.open(raw_dir, scratch)
    except UserError as error:
        assert re.search(message, str(error))
    else:
        (found,) = tree.unusable.values()
        assert re.search(message, found) and not tree.files
        (archive,) = tree.unusable
        with pytest.raises(UserError, match=message):
            RawTree.open(raw_dir / archive, scratch)
        with pytest.raises(UserError, match=message):
            tree.check_archives("")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_folder_and_archives_are_read_alike(folder, tmp_path, kind):
    raw = tmp_path / "raw"
    if kind == "folder":
        raw = folder.parent
    elif kind == "zip":
        zip_tree(folder, raw / "any.zip")
    else:
        tar_tree(folder, raw / f"any.{kind}", {"tar": "w", "tgz": "w:gz"}.get(kind) or f"w:{kind[4:]}")
    tree = RawTree.open(raw, tmp_path / "scratch")
    assert list(tree.files) == sorted(f"data/{name}" for name in CONTENT)
    for name, content in CONTENT.items():
        file = pickle.loads(pickle.dumps(tree.files[f"data/{name}"]))
        assert file.read_bytes() == content and file.size == len(content)
        assert file.name == name.rpartition("/")[2]
        local = file.local_file(tmp_path / "local")
        assert local.read_bytes() == content
        assert (local == folder / name) if kind == "folder" else (local.parent == tmp_path / "local")
    shown = str(tree.files["data/a/one.png"])
    assert shown == (f"{folder}/a/one.png" if kind == "folder" else f"{raw}/any.{kind}!data/a/one.png")


def test_members_appear_where_the_archive_lies(folder, tmp_path):
    zip_tree(folder, tmp_path / "raw/deep/er/any.zip")
    assert "deep/er/data/a/one.png" in RawTree.open(tmp_path / "raw").files
    assert "data/a/one.png" in RawTree.open(tmp_path / "raw/deep/er/any.zip").files


def test_backslashes_and_dots_of_careless_programs(tmp_path):
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as file:
        file.writestr("data\\a\\one.png", b"1")
        file.writestr("./data/two.png", b"2")
    tree = RawTree.open(tmp_path)
    assert {path: file.read_bytes() for path, file in tree.files.items()} == {
        "data/a/one.png": b"1", "data/two.png": b"2"
    }  # fmt: skip
    assert tree.files["data/a/one.png"].name == "one.png"


def test_hidden_files_are_left_out(folder, tmp_path):
    for name in (".DS_Store", "a/.hidden.png", "__MACOSX/a/one.png", ".git/x"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    zip_tree(folder, tmp_path / "raw/any.zip")
    tar_tree(folder, tmp_path / "tar/any.tar")
    assert sorted(RawTree.open(folder).files) == sorted(CONTENT)
    for raw in ("raw", "tar"):
        assert len(RawTree.open(tmp_path / raw).files) == len(CONTENT)


def test_links_on_disk_are_followed_once(folder, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/linked").symlink_to(folder)
    (folder / "b/loop").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/nowhere").symlink_to(tmp_path / "missing")
    assert sorted(RawTree.open(tmp_path / "raw").files) == sorted(f"linked/{name}" for name in CONTENT)


def test_disk_before_archive_and_archives_that_differ(folder, tmp_path):
    zip_tree(folder, tmp_path / "raw/x.zip", folder)
    (tmp_path / "raw/top.json").write_bytes(b"changed")
    (folder / "a/one.png").write_bytes(b"another content")
    tar_tree(folder, tmp_path / "raw/y.tar")
    zip_tree(folder, tmp_path / "raw/z.zip", folder)
    tree = RawTree.open(tmp_path / "raw")
    assert tree.files["top.json"].read_bytes() == b"changed"
    assert tree.files["a/one.png"].read_bytes() == CONTENT["a/one.png"]
    assert list(tree.conflicts) == ["a/one.png"]
    assert [file.container.name for file in tree.conflicts["a/one.png"]] == ["x.zip", "z.zip"]


def _read(file: RawPath, expected: bytes) -> bool:
    return all(file.read_bytes() == expected for _ in range(200))


def test_forked_processes_do_not_share_a_file_position(folder, tmp_path):
    for archive in (zip_tree(folder, tmp_path / "raw/any.zip"), tar_tree(folder, tmp_path / "tar/any.tar")):
        files = RawTree.open(archive.parent).files
        one, two = files["data/a/one.png"], files["data/a/two.png"]
        one.read_bytes()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            running = pool.starmap_async(_read, [(one, CONTENT["a/one.png"]), (two, CONTENT["a/two.png"])])
            assert _read(two, CONTENT["a/two.png"])
            assert running.get(60) == [True, True]


# --- Unsafe archives


def make_zip(path, name: str, content: bytes = b"x", **attributes):
    info = zipfile.ZipInfo("placeholder")
    info.filename = name
    info.compress_type = zipfile.ZIP_DEFLATED
    for key, value in attributes.items():
        setattr(info, key, value)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("good.png", b"1")
        file.writestr(info, content)
    return path


def patch(path, field: int, value: bytes):
    """Overwrite a field of the last entry in the list of contents."""
    content = bytearray(path.read_bytes())
    start = content.rindex(CENTRAL) + field
    content[start : start + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:\\evil.png"])
def test_names_that_lead_out_of_the_archive(tmp_path, name):
    make_zip(tmp_path / "bad.zip", name)
    refused(rf"bad.zip: {re.escape(name)} leads out of the archive's folder; .* Download it again", tmp_path)
    (tmp_path / "bad.zip").unlink()
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        file.addfile(tarfile.TarInfo(name))
    refused(rf"bad.tar: {re.escape(name)} leads out", tmp_path)


def test_zip_with_a_link(tmp_path):
    make_zip(tmp_path / "bad.zip", "link.png", external_attr=0o120777 << 16)
    refused("bad.zip: link.png is a link", tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "is a link"),
        (tarfile.LNKTYPE, "is a link"),
        (tarfile.CHRTYPE, "is a sparse file or a device"),
        (tarfile.FIFOTYPE, "is a sparse file or a device"),
        (tarfile.GNUTYPE_SPARSE, "is a sparse file or a device"),
    ],
)
def test_tar_with_what_is_no_plain_file(tmp_path, kind, message):
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        info = tarfile.TarInfo("odd.png")
        info.type, info.linkname = kind, "/etc/passwd"
        file.addfile(info)
    refused(f"bad.tar: odd.png {message}", tmp_path)


def test_encrypted_and_unknown_compression(tmp_path):
    patch(make_zip(tmp_path / "bad.zip", "secret.png"), FLAGS, struct.pack("<H", 1))
    refused("bad.zip: secret.png is encrypted", tmp_path)
    patch(make_zip(tmp_path / "bad.zip", "odd.png"), METHOD, struct.pack("<H", 9))
    refused("bad.zip: odd.png has the unknown compression method 9", tmp_path)


def test_bombs(tmp_path, monkeypatch):
    bomb = bytes(40 << 20)
    make_zip(tmp_path / "bomb.zip", "zeros.png", bomb)
    refused("bomb.zip: zeros.png unpacks to more than 200 times its size", tmp_path)
    # An entry that claims less than it holds is read no further than its claim.
    patch(tmp_path / "bomb.zip", UNPACKED, struct.pack("<I", 5))
    with pytest.raises(UserError, match="bomb.zip!zeros.png cannot be read .*download it again"):
        RawTree.open(tmp_path).files["zeros.png"].read_bytes()
    (tmp_path / "bomb.zip").unlink()
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz", compresslevel=1) as file:
        info = tarfile.TarInfo("zeros.png")
        info.size = len(bomb)
        file.addfile(info, io.BytesIO(bomb))
    refused("bomb.tar.gz: its content unpacks to more than 200 times its size", tmp_path, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    (tmp_path / "bomb.tar.gz").unlink()
    monkeypatch.setattr(raw_archives, "MAX_MEMBER_BYTES", 1000)
    make_zip(tmp_path / "large.zip", "large.png", bytes(1001))
    refused("large.zip: large.png unpacks to 1001 bytes, more than 1000", tmp_path)
    make_zip(tmp_path / "large.zip", "large.png", bytes(1000))
    monkeypatch.setattr(raw_archives, "MAX_MEMBERS", 1)
    refused("large.zip holds more than 1 files", tmp_path)


def test_names_that_are_not_utf_8(tmp_path):
    (tmp_path / "raw/caf\udce9").mkdir(parents=True)
    RawTree.open(tmp_path / "raw")
    (tmp_path / "raw/caf\udce9/one.png").touch()
    with pytest.raises(UserError, match=r"the name of caf\\udce9/one.png in .*raw is not UTF-8; rename it"):
        RawTree.open(tmp_path / "raw")
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.GNU_FORMAT) as file:
        file.addfile(tarfile.TarInfo("caf\udce9.png"))
    with pytest.raises(UserError, match=r"bad.tar: caf\\udce9.png has a name that is not UTF-8"):
        RawTree.open(tmp_path / "bad.tar")


def test_what_is_wrong_with_archives_is_kept(folder, tmp_path):
    zip_tree(folder, tmp_path / "raw/good.zip")
    (tmp_path / "raw/a").mkdir()
    make_zip(tmp_path / "raw/a/evil.zip", "../evil.png")
    (tmp_path / "raw/damaged.tar").write_bytes(b"damaged")
    tree = RawTree.open(tmp_path / "raw")
    assert list(tree.files) == sorted(f"data/{name}" for name in CONTENT)
    assert set(tree.unusable) == {"a/evil.zip", "damaged.tar"}
    note = (
        r" What is missing may be in archives that cannot be used: .*(evil.zip: |damaged.tar cannot).*; .*(evil|dam)"
    )
    assert re.fullmatch(note + ".*", tree.archives_note())
    tree.check_archives("data/")
    with pytest.raises(UserError, match="evil.zip: ../evil.png leads out"):
        tree.check_archives("a/")
    assert RawTree.open(folder).archives_note() == ""


# --- Damaged archives


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_truncated_zip(folder, tmp_path, keep):
    archive = zip_tree(folder, tmp_path / "raw/any.zip")
    archive.write_bytes(archive.read_bytes()[:keep])
    refused(
        r"any.zip cannot be read as an archive \(.*\); it is damaged, incomplete .*download it again", archive.parent
    )


@pytest.mark.parametrize("keep", [0, 700, 2048, 10_000, -10_000])
def test_truncated_tar(folder, tmp_path, keep):
    archive = tar_tree(folder, tmp_path / "raw/any.tar")
    content = archive.read_bytes()
    archive.write_bytes(content[:keep] if keep >= 0 else content.rstrip(b"\0")[:30_000])
    refused("any.tar cannot be read as an archive", archive.parent)


def test_tar_with_a_damaged_header_in_the_middle(folder, tmp_path):
    archive = tar_tree(folder, tmp_path / "raw/any.tar")
    content = bytearray(archive.read_bytes())
    with tarfile.open(archive) as file:
        start = file.getmember("data/top.json").offset
    content[start : start + 100] = b"\xff" * 100
    archive.write_bytes(content)
    refused(r"any.tar cannot be read as an archive \(damaged or cut off after 3 files, at byte", archive.parent)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_truncated_compressed_tar(folder, tmp_path, kind):
    archive = tar_tree(folder, tmp_path / f"raw/any.tar.{kind}", f"w:{kind}")
    archive.write_bytes(archive.read_bytes()[:-5000])
    refused(rf"any.tar.{kind} cannot be read as an archive", archive.parent, tmp_path / "scratch")
    archive.write_bytes(b"no archive at all")
    refused(rf"any.tar.{kind} cannot be read as an archive", archive.parent, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_damaged_member(folder, tmp_path):
    archive = zip_tree(folder, tmp_path / "raw/any.zip")
    content = bytearray(archive.read_bytes())
    place = content.index(CONTENT["a/two.png"][1000:1100])  # random bytes are stored as they are
    content[place] ^= 0xFF
    archive.write_bytes(content)
    files = RawTree.open(archive.parent).files
    assert files["data/a/one.png"].read_bytes() == CONTENT["a/one.png"]
    damaged = files["data/a/two.png"]
    with pytest.raises(UserError, match=r"any.zip!data/a/two.png cannot be read \(.*download it again"):
        damaged.read_bytes()
    with pytest.raises(UserError, match="two.png cannot be read"):
        damaged.local_file(tmp_path / "local")
    assert list((tmp_path / "local").iterdir()) == []


def test_files_that_changed_or_are_too_large(folder, tmp_path, monkeypatch):
    files = RawTree.open(folder).files
    (folder / "a/one.png").write_bytes(b"short")
    (folder / "top.json").write_bytes(CONTENT["top.json"] + b"more")
    (folder / "a/two.png").unlink()
    for name, message in (
        ("a/one.png", "one.png holds 5 bytes, 13 when it was listed; copy the file again"),
        ("top.json", "top.json holds more than 10000 bytes, 10000 when it was listed"),
        ("a/two.png", r"two.png cannot be read \(.*No such file.*\); copy the file again"),
    ):
        with pytest.raises(UserError, match=message):
            files[name].read_bytes()
    monkeypatch.setattr(raw_archives, "MAX_READ_BYTES", 10)
    with pytest.raises(UserError, match="one.png: 13 bytes are too many for a picture"):
        files["a/one.png"].read_bytes()


# --- Compressed tar archives are decompressed once


def test_compressed_tar_needs_a_folder_and_is_decompressed_once(folder, tmp_path):
    archive = tar_tree(folder, tmp_path / "raw/any.tar.gz", "w:gz")
    refused("any.tar.gz is a compressed tar, which cannot be read in place; unpack it, or", tmp_path / "raw")
    RawTree.open(tmp_path / "raw", tmp_path / "scratch")
    (copy,) = (tmp_path / "scratch").iterdir()
    state = copy.stat()
    RawTree.open(tmp_path / "raw", tmp_path / "scratch")
    assert [(path, path.stat().st_mtime_ns) for path in copy.parent.iterdir()] == [(copy, state.st_mtime_ns)]
    os.utime(archive, ns=(1, 1))  # another archive under the same name gets a copy of its own
    RawTree.open(tmp_path / "raw", tmp_path / "scratch")
    assert len(list(copy.parent.iterdir())) == 2


@contextmanager
def small_files(size: int):
    """No file can grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_decompressed_copy(folder, tmp_path):
    tar_tree(folder, tmp_path / "raw/any.tar.gz", "w:gz")
    with small_files(10_000):
        refused("any.tar.gz: no room for its decompressed copy in .*scratch", tmp_path / "raw", tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


# --- The raw folder itself


def test_raw_folder_that_is_none(folder, tmp_path):
    refused("raw folder .*nowhere does not exist; --raw_dir is the folder", tmp_path / "nowhere")
    refused("raw folder .*top.json is a file and no archive", folder / "top.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_folder_without_permission(folder):
    (folder / "b").chmod(0)
    try:
        refused(r"b cannot be listed \(Permission denied\); check its permissions", folder)
    finally:
        (folder / "b").chmod(0o700)


def test_description_for_messages(folder, tmp_path):
    assert RawTree.open(folder).describe() == "a, b, top.json"
    assert RawTree.open(folder).describe(limit=1) == "a and 2 more"
    zip_tree(folder, tmp_path / "raw/any.zip")
    (tmp_path / "raw/SYNTHIA.rar").touch()
    expected = "SYNTHIA.rar (cannot be opened: unpack it), any.zip, data"
    assert RawTree.open(tmp_path / "raw").describe() == expected
    (tmp_path / "empty").mkdir()
    assert RawTree.open(tmp_path / "empty").describe() == "nothing"
