from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile

import pytest

from blip2x.errors import UserError
from blip2x.transfer import unpack as module
from blip2x.transfer.unpack import Size, measure, unpack
from tests.data.layouts import tarred, zipped

TWO = {"pictures/a.jpg": b"aa", "pictures/more/b.jpg": b"bbb", "other/c.jpg": b"c"}
MAKERS = {
    "zip": zipped,
    "tar": tarred,
    "tar.gz": lambda members: tarred(members, "w:gz"),
    "tar.xz": lambda members: tarred(members, "w:xz"),
}


@pytest.fixture
def give(tmp_path):
    """`give(content)`: the archive of that content, and the folder to unpack into."""

    def write(content, name="x.zip"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name, tmp_path / "out"

    return write


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", MAKERS)
def test_members_come_out_and_others_stay_in(kind, give):
    archive, folder = give(MAKERS[kind](TWO), f"x.{kind}")
    written = []
    assert unpack(archive, folder, ["pictures"], members=2, at=written.append) == Size(2, 5)
    assert files(folder) == ["pictures/a.jpg", "pictures/more/b.jpg"] and written == [2, 5]
    assert (folder / "pictures/a.jpg").read_bytes() == b"aa" and os.listdir(folder) == ["pictures"]


def test_single_files_and_inner_paths(give):
    archive, folder = give(zipped({"a.json": b"1", "b.json": b"2", "x/y/c.json": b"3", "x/y/cd.json": b"4"}))
    assert unpack(archive, folder, ["a.json", "x/y/c.json"]) == Size(2, 2)
    assert files(folder) == ["a.json", "x/y/c.json"]


@pytest.mark.parametrize(
    "name",
    ["/etc/x", "../x", "p/../../x", "p/..", "C:x", "c:/x", "p\\..\\..\\x", "\\\\host\\x", "p/\x1bx", "p/x\n"],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_no_member_leaves_the_folder(name, kind, give):
    archive, folder = give(MAKERS[kind]({"p/a": b"1", name: b"2"}))
    with pytest.raises(UserError, match=r"would go elsewhere; the archive is not unpacked"):
        unpack(archive, folder, ["p"])
    assert files(folder.parent) == ["x.zip"]


@pytest.mark.parametrize(
    "names",
    [("p/a", "p/A"), ("p/a", "P/b"), ("p/a", "p/a"), ("p/a", "p/a/b"), ("p/a/b", "p/a"), ("p/stra\u00dfe", "p/STRASSE")],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_two_members_are_one_file(names, kind, give):
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as file:
            for name in names:
                file.writestr(name, b"1")
    else:
        with tarfile.open(fileobj=content, mode="w") as file:
            for name in names:
                file.addfile(tarfile.TarInfo(name))
    archive, folder = give(content.getvalue())
    with pytest.raises(UserError, match="are one file on some systems"):
        unpack(archive, folder, ["p"])
    assert files(folder.parent) == ["x.zip"]


TYPES = {
    "symbolic": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
}


@pytest.mark.parametrize("kind", TYPES)
def test_links_and_devices_in_tar_files(kind, give):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        info = tarfile.TarInfo("p/x")
        info.type, info.linkname = TYPES[kind], "/etc/passwd"
        file.addfile(info)
    archive, folder = give(content.getvalue())
    with pytest.raises(UserError, match="'p/x' is a link or a device"):
        unpack(archive, folder, ["p"])
    assert files(folder.parent) == ["x.zip"]


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_zip_files(mode, give):
    archive, folder = give(_with_mode(mode))
    with pytest.raises(UserError, match="'p/x' is a link or a device"):
        unpack(archive, folder, ["p"])


def test_setuid(give):
    archive, folder = give(_with_mode(stat.S_IFREG | 0o4755))
    with pytest.raises(UserError, match=r"setuid"):
        unpack(archive, folder, ["p"])
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        info = tarfile.TarInfo("p/x")
        info.mode = 0o2755
        file.addfile(info)
    archive, folder = give(content.getvalue())
    with pytest.raises(UserError, match=r"setuid"):
        unpack(archive, folder, ["p"])


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_folders_that_give_their_group_to_what_is_in_them(kind, give):
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as file:
            info = zipfile.ZipInfo("p/")
            info.external_attr = (stat.S_IFDIR | 0o2775) << 16
            file.writestr(info, b"")
            file.writestr("p/x", b"1")
    else:
        with tarfile.open(fileobj=content, mode="w") as file:
            info = tarfile.TarInfo("p")
            info.type, info.mode = tarfile.DIRTYPE, 0o2775
            file.addfile(info)
            info = tarfile.TarInfo("p/x")
            info.size = 1
            file.addfile(info, io.BytesIO(b"1"))
    archive, folder = give(content.getvalue())
    assert unpack(archive, folder, ["p"]) == Size(1, 1) and not (folder / "p").stat().st_mode & stat.S_ISGID


def _with_mode(mode):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        info = zipfile.ZipInfo("p/x")
        info.external_attr = mode << 16
        file.writestr(info, b"/etc/passwd")
    return content.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_bombs(kind, give, monkeypatch):
    archive, folder = give(MAKERS[kind]({"p/zeros": bytes(3 * 2**20)}))
    monkeypatch.setattr(module, "_CHUNK", 2**16)
    with pytest.raises(UserError, match=r"becomes more than 1.0 MB, 100 times its size"):
        unpack(archive, folder, ["p"])
    assert files(folder.parent) == ["x.zip"]


def test_what_a_header_says_of_the_size_does_not_matter(give):
    """The bytes are counted: a zip whose headers announce one byte fails at its checksum, and no more is written."""
    content = bytearray(zipped({"p/zeros": bytes(2**21)}))
    for place in (content.index(b"PK\x03\x04") + 22, content.index(b"PK\x01\x02") + 24):
        content[place : place + 4] = (1).to_bytes(4, "little")
    archive, folder = give(bytes(content))
    with pytest.raises(UserError, match="broken, or no archive"):
        unpack(archive, folder, ["p"])


def test_too_many_members(give, monkeypatch):
    monkeypatch.setattr(module, "MAX_MEMBERS", 2)
    archive, folder = give(zipped(TWO))
    with pytest.raises(UserError, match="more than 2 members"):
        unpack(archive, folder, ["pictures"])


def test_a_wrong_count_and_what_is_lacking(give):
    archive, folder = give(zipped(TWO))
    with pytest.raises(UserError, match="holds 2 files, but 3 were expected"):
        unpack(archive, folder, ["pictures"], members=3)
    with pytest.raises(UserError, match="has no train2014; is it the right file"):
        unpack(archive, folder, ["pictures", "train2014"])
    assert files(folder.parent) == ["x.zip"]


@pytest.mark.parametrize("kind", MAKERS)
def test_broken_archives(kind, give):
    content = MAKERS[kind]({"p/x": os.urandom(5000), "p/y": os.urandom(5000)})
    archive, folder = give(content[: len(content) // 2])
    with pytest.raises(UserError, match="broken, or no archive"):
        unpack(archive, folder, ["p"])
    assert files(folder.parent) == ["x.zip"]


@pytest.mark.parametrize("damage", ["header", "end"])
def test_a_tar_with_a_damaged_header_is_not_taken_for_a_shorter_one(damage, give):
    content = bytearray(tarred({f"p/{at}": b"1" for at in range(4)}))
    if damage == "header":
        content[2 * 1024 + 150] ^= 1  # the third member's checksum
    else:
        del content[4 * 1024 :]  # all members are whole, but nothing says that they are all
    archive, folder = give(bytes(content), "x.tar")
    with pytest.raises(UserError, match="broken, or no archive"):
        unpack(archive, folder, ["p"])
    assert files(folder.parent) == ["x.tar"]


def test_a_name_that_cannot_be_decoded_and_one_that_has_no_end(give):
    content = zipped({"p/\xe4": b"1"})
    archive, folder = give(content.replace("p/\xe4".encode(), b"p/\xff\xff"))
    with pytest.raises(UserError, match="broken, or no archive"):
        unpack(archive, folder, ["p"])
    archive, folder = give(zipped({"p/" + "d/" * 600 + "x": b"1"}))
    with pytest.raises(UserError, match="a member's name has 1,203 characters, more than 1,024: 'p/d/"):
        unpack(archive, folder, ["p"])
    assert files(folder.parent) == ["x.zip"]


def test_an_empty_folder_makes_room(give, tmp_path):
    archive, folder = give(zipped(TWO))
    (folder / "pictures/more").mkdir(parents=True)
    (folder / "pictures/.DS_Store").write_bytes(b"x")
    (folder / "pictures/a.jpg").touch()
    assert unpack(archive, folder, ["pictures"]) == Size(2, 5)
    (tmp_path / "elsewhere").mkdir()
    (folder / "other").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cannot be unpacked into .*symbolic link"):
        unpack(archive, folder, ["other"])
    assert (folder / "other").is_symlink()


def test_no_archive_and_an_encrypted_one(give):
    archive, folder = give(b"<html>not found</html>")
    with pytest.raises(UserError, match="broken, or no archive"):
        unpack(archive, folder, ["p"])
    content = bytearray(zipped({"p/x": b"1"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive, folder = give(bytes(content))
    with pytest.raises(UserError, match="p/x is encrypted"):
        unpack(archive, folder, ["p"])


def test_a_killed_unpacking_is_not_taken_for_a_whole_one(give):
    archive, folder = give(zipped({f"p/{at}": b"1" for at in range(50)}))
    code = (
        "import sys, time; from pathlib import Path; from blip2x.transfer.unpack import unpack; "
        "at = lambda written: written == 20 and (print('here', flush=True), time.sleep(60)); "
        "unpack(Path(sys.argv[1]), Path(sys.argv[2]), ['p'], at=at)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(archive), str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.kill()
    process.wait()
    assert not (folder / "p").exists() and (folder / ".x.zip.unpacking").is_dir()
    assert unpack(archive, folder, ["p"], members=50) == Size(50, 50) and os.listdir(folder) == ["p"]


def test_killed_between_two_names_it_goes_on(give, monkeypatch):
    archive, folder = give(zipped({"a": b"1", "b": b"2"}))
    rename, moved = type(archive).rename, []

    def once(self, target):
        moved.append(self.name)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(archive), "rename", once)
        unpack(archive, folder, ["a", "b"])
    assert (folder / "a").is_file() and not (folder / "b").exists()
    monkeypatch.setattr(module, "_extract", lambda *_: 1 / 0)  # all has been taken out before
    assert unpack(archive, folder, ["a", "b"]) == Size(2, 2) and files(folder) == ["a", "b"]


def test_what_is_in_its_place_stays(give):
    archive, folder = give(zipped({"a": b"theirs", "b": b"2"}))
    folder.mkdir()
    (folder / "a").write_bytes(b"mine")
    unpack(archive, folder, ["a", "b"])
    assert (folder / "a").read_bytes() == b"mine" and files(folder) == ["a", "b"]


def test_an_exception_of_whoever_watches_leaves_nothing_behind(give):
    archive, folder = give(zipped(TWO))
    with pytest.raises(ZeroDivisionError):
        unpack(archive, folder, ["pictures"], at=lambda written: 1 / 0)
    assert files(folder.parent) == ["x.zip"]


def test_measure(tmp_path):
    assert measure(tmp_path / "no") == Size(0, 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_bytes(b"123")
    assert measure(tmp_path) == Size(1, 3) and measure(tmp_path / "a/x") == Size(1, 3)
    for name in (".DS_Store", "._x", "Thumbs.db", ".hidden/x"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"12345")
    (tmp_path / "a/nowhere").symlink_to(tmp_path / "no")
    (tmp_path / "a/round").symlink_to(tmp_path)
    assert measure(tmp_path) == Size(1, 3)
    (tmp_path / "a/link").symlink_to(tmp_path / "a/x")  # a folder of links to the pictures of another program
    assert measure(tmp_path) == Size(2, 6) and measure(tmp_path / "a/link") == Size(1, 3)
    (tmp_path / "a/link").unlink()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert measure(tmp_path / "b") == Size(1, 3)  # a data folder may be a link to another disk


def test_a_folder_with_other_things_is_not_removed(give):
    archive, folder = give(zipped(TWO))
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures/.notes").write_text("mine")
    with pytest.raises(UserError, match=r"pictures has none of the files that belong there, but .*/\.notes; move that away"):
        unpack(archive, folder, ["pictures"])
    assert (folder / "pictures/.notes").read_text() == "mine"
