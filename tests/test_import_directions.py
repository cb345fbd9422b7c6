"""Imports go downward only; see the map in README.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "blip2x"
LEVELS = [  # from the top; names on one line do not import each other
    {"api"},
    {"tasks"},
    {"engine", "objectives", "metrics", "generation"},
    {"models", "data", "losses", "optim"},
    {"parallel"},
    {"config", "registry", "errors", "startup", "transfer", "pages"},
]
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}
WITHIN_LAST = {("config", "registry"), *((part, "errors") for part in ("config", "registry", "startup", "transfer"))}


def imports(path: Path) -> set[str]:
    """The parts of blip2x that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "blip2x" else [f"blip2x.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("blip2x.")}
    return found


def allowed(importer: str, imported: str) -> bool:
    return importer == imported or LEVEL[imported] > LEVEL[importer] or (importer, imported) in WITHIN_LAST


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        assert not imports(path)
        return
    upward = sorted(name for name in imports(path) if not allowed(part, name))
    assert not upward, f"{path.name} ({part}) imports {upward}, which stand above it or beside it"


def test_the_rule_can_fail():
    assert not allowed("losses", "models") and not allowed("config", "engine") and allowed("tasks", "engine")
