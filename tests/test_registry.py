from __future__ import annotations

import sys

import pytest

from blip2x.errors import UserError
from blip2x.registry import TASKS, Registry


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A registry over a package on disk with the kinds `square` and `broken`."""
    package = tmp_path / "shapes_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_helper.py").write_text("raise RuntimeError('helpers are not kinds')")
    (package / "broken.py").write_text("raise RuntimeError('imported too early')")
    (package / "square.py").write_text(
        "from registries import SHAPES\n@SHAPES.register('square')\ndef build(side): return side * side\n"
    )
    (tmp_path / "registries.py").write_text(
        "from blip2x.registry import Registry\nSHAPES = Registry('shape', 'shapes_package')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("registries").SHAPES
    for name in [name for name in sys.modules if name.startswith(("shapes_package", "registries"))]:
        del sys.modules[name]


def test_known_kinds_are_the_files_and_nothing_is_imported(shapes):
    assert shapes.known() == ["broken", "square"]
    assert "shapes_package.broken" not in sys.modules


def test_get_imports_the_kind_only(shapes):
    assert shapes.get("square")(3) == 9
    assert "shapes_package.broken" not in sys.modules


def test_unknown_kind_is_answered_with_the_known_ones(shapes):
    with pytest.raises(UserError, match="unknown shape 'circle'; known: broken, square"):
        shapes.get("circle")


def test_builder_in_the_wrong_module_is_refused():
    with pytest.raises(ValueError, match=r"must live in p\.k"):
        Registry("thing", "p").register("k")(test_builder_in_the_wrong_module_is_refused)


def test_tasks_are_found_by_file_name():
    assert {"caption", "pipeline", "predict", "pretrain_stage1", "pretrain_stage2", "vqa_zeroshot"} <= set(TASKS.known())
