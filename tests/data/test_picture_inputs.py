import os
from pathlib import Path

import pytest

from blip2x.data.picture_inputs import list_pictures
from blip2x.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with files that are empty: nothing opens them."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "p/b.jpg",
        "p/a.PNG",
        "p/deep/er/c.webp",
        "p/notes.txt",
        "p/film.mpg",
        "p/icon.ico",
        "p/._b.jpg",
        "p/.cache/x.jpg",
        "q[1].gif",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_a_folder_is_searched_to_the_bottom_in_order_without_what_is_hidden(folder):
    assert list_pictures(["p"]) == ["p/a.PNG", "p/b.jpg", "p/deep/er/c.webp"]
    assert list_pictures([str(folder / "p/deep")]) == [str(folder / "p/deep/er/c.webp")]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("p/*", ["p/a.PNG", "p/b.jpg"]),  # neither the text nor the folder
        ("p/?.jpg", ["p/b.jpg"]),
        ("p/[a-b].*", ["p/a.PNG", "p/b.jpg"]),
        ("**/*.webp", ["p/deep/er/c.webp"]),
        ("p/**", ["p/a.PNG", "p/b.jpg", "p/deep/er/c.webp"]),
    ],
)
def test_patterns(folder, pattern, found):
    assert list_pictures([pattern]) == found


def test_a_file_is_taken_whatever_it_is_called(folder):
    assert list_pictures(["p/notes.txt", "q[1].gif"]) == ["p/notes.txt", "q[1].gif"]  # brackets are no pattern then


def test_a_name_that_is_not_utf_8_is_shown_and_refused(folder):
    Path(os.fsdecode(b"p/caf\xe9.jpg")).touch()
    with pytest.raises(UserError, match=r"^task\.inputs: p/caf\\xe9\.jpg has a name that is not UTF-8; rename it$"):
        list_pictures(["p"])


def test_home_is_known(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert list_pictures(["~/p/b.jpg", "~/p/*.PNG"]) == [f"{folder}/p/b.jpg", f"{folder}/p/a.PNG"]


def test_each_picture_comes_once_where_it_was_first_named(folder):
    (folder / "link.jpg").symlink_to(folder / "p/b.jpg")
    url = "HTTP://host/x.jpg?a=1"
    given = [url, "link.jpg", "p/../p/b.jpg", str(folder / "p/b.jpg"), "p", url]
    assert list_pictures(given) == [url, "link.jpg", "p/a.PNG", "p/deep/er/c.webp"]


def test_linked_folders_are_followed_but_not_in_circles(folder):
    (folder / "p/deep/up").symlink_to(folder / "p")
    (folder / "linked").symlink_to(folder / "p/deep/er")
    assert list_pictures(["p"]) == ["p/a.PNG", "p/b.jpg", "p/deep/er/c.webp"]
    assert list_pictures(["linked"]) == ["linked/c.webp"]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("p/no.jpg", "there is no file or folder 'p/no.jpg' in "),
        ("/no/where.jpg", "there is no file or folder '/no/where.jpg'$"),
        ("empty", "folder empty has no picture in it or below it"),
        ("p/*.tif", r"'p/\*.tif' matches no picture"),
        ("p/*.txt", r"'p/\*.txt' matches no picture"),
        ("ftp://host/x.jpg", "ftp://host/x.jpg cannot be fetched; an address starts with http"),
        ("", "there is no file or folder ''"),
    ],
)
def test_what_is_not_there_is_named(folder, entry, sentence):
    with pytest.raises(UserError, match=sentence):
        list_pictures(["p/b.jpg", entry])


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UserError, match=f"folder {Path('p')} cannot be read: Permission denied"):
        list_pictures(["p"])
