"""Every key of the config as a page: what the dataclasses say of it, and what the options set it to.

``python -m blip2x.config.reference > docs/config.md`` writes the page; a test holds it to the dataclasses.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from blip2x.config.auto import CONF_FOLDER
from blip2x.config.compose import compose_dict
from blip2x.config.run import RunConfig

_HEAD = """\
# All keys

Made from the dataclasses in `blip2x/config` by `python -m blip2x.config.reference > docs/config.md`; a test fails where this
page is behind them. Each key can be set on the command line (`optim.lr=1e-4`), in an experiment file (`conf/experiment`), or
in a group's file; `python runners/run.py --cfg job` prints what a command composes, and `--help` lists the options of each
group. The column *value* is what the named option sets; what a data set or an experiment sets otherwise is in `conf/recipe`
and `conf/experiment`.
"""
_GROUPS = (  # in the order of the page
    "task",
    "model",
    "model/vision",
    "model/qformer",
    "model/language",
    "dataset",
    "parallelism",
    "optim",
    "precision",
    "logger",
    "paths",
)
_TELLING = ("opt2.7b", "coco", "sharding2", "fp32")  # options to show of those of one schema
_GROUP_CLASSES = {"vision", "qformer", "language"}  # fields with sections of their own
_NAMES = {"None": "null", "True": "true", "False": "false"}  # of Python, in YAML


@dataclasses.dataclass(frozen=True)
class Key:
    """A key, or one inside of it."""

    name: str
    type: str
    meaning: str


def reference() -> str:
    """The page, as Markdown."""
    parts = [_HEAD, "## The run itself\n", *_table(_own_keys(), compose_dict([]), "")]
    with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        for group in _GROUPS:
            parts.append(f"## `{group}`\n")
            for kind, option in _shown(group):
                cls, place = _schemas(group)[kind], group.replace("/", ".")
                if group == "logger":  # of which there may be several
                    place += f".{kind}"
                parts.append(f"### `{group}={option}`\n\n{_docstring(cls)}\n")
                parts += _table(keys_of(cls), OmegaConf.select(compose(f"{group}/{option}"), place), f"{place}.")
    return "\n".join(parts)


def keys_of(cls: type) -> list[Key]:
    """The keys of a config dataclass, those of its base classes first; of a dataclass inside it, each of its keys."""
    hints, comments = get_type_hints(cls), _comments(cls)
    found = []
    for field in dataclasses.fields(cls):
        if field.name == "kind":
            continue
        inner = next((part for part in _parts(hints[field.name]) if dataclasses.is_dataclass(part)), None)
        if inner is None:
            found.append(Key(field.name, _shown_type(hints[field.name]), comments[field.name]))
        elif field.name not in _GROUP_CLASSES:
            between = "." if inner is hints[field.name] else ".<name>." if get_origin(hints[field.name]) is dict else "[]."
            found += [Key(f"{field.name}{between}{key.name}", key.type, key.meaning) for key in keys_of(inner)]
    return found


def _own_keys() -> list[Key]:
    groups = {group.split("/")[0] for group in _GROUPS}
    return [key for key in keys_of(RunConfig) if key.name.split(".")[0] not in groups]


def _shown(group: str) -> Iterator[tuple[str, str]]:
    """Each schema of the group with one of its options: its namesake, a telling one, or the first."""
    options = sorted(path.stem for path in (CONF_FOLDER / group).glob("*.yaml"))
    for kind in sorted(_schemas(group)):
        of_kind = [option for option in options if _kind(group, option) == kind]
        if of_kind:
            yield kind, next((option for option in of_kind if option in (kind, *_TELLING)), of_kind[0])


@cache
def _kind(group: str, option: str) -> str | None:
    """The schema that an option fills: the one in its own defaults, or in those that it goes on from."""
    for entry in OmegaConf.load(CONF_FOLDER / group / f"{option}.yaml").get("defaults", []):
        name = entry if isinstance(entry, str) else ""
        if name.startswith("/schema/"):
            return name.removesuffix("@_here_").rpartition("/")[2]
        if name not in ("", "_self_") and (CONF_FOLDER / group / f"{name}.yaml").is_file():
            return _kind(group, name)
    return None


@cache
def _schemas(group: str) -> dict[str, type]:
    """The dataclasses of a group by the name of their schema."""
    store = ConfigStore.instance()
    files = [name for name in store.list(f"schema/{group}") if name.endswith(".yaml")]
    return {name.removesuffix(".yaml"): OmegaConf.get_type(store.load(f"schema/{group}/{name}").node) for name in files}


def _table(keys: list[Key], values: DictConfig, prefix: str) -> list[str]:
    rows = [f"| `{prefix}{key.name}` | {key.type} | {_value(values, key.name)} | {key.meaning} |" for key in keys]
    return ["| key | type | value | meaning |", "|---|---|---|---|", *rows, ""]


def _value(values: Any, name: str) -> str:
    if "<" in name or "[" in name:  # of something that the option names itself
        return ""
    for part in name.split("."):
        if OmegaConf.is_missing(values, part):
            return "has to be given"
        node = values._get_node(part)
        values = node if OmegaConf.is_config(node) and not node._is_none() else node._value()  # a reference stays one
    if isinstance(values, (DictConfig, ListConfig)):
        values = OmegaConf.to_container(values, enum_to_str=True)
    text = values.value if isinstance(values, Enum) else _NAMES.get(str(values), str(values))
    return f"`{textwrap.shorten(text, 60, placeholder=' ...')}`".replace("|", "\\|") if text else '`""`'


def _shown_type(hint: Any) -> str:
    names = {str: "text", bool: "true or false", int: "integer", float: "number", Any: "any"}
    parts = [part for part in _parts(hint) if part is not type(None)]
    optional = len(parts) < len(_parts(hint))
    if get_origin(hint) is list:
        shown = f"list of {_shown_type(get_args(hint)[0])}"
    elif isinstance(parts[0], type) and issubclass(parts[0], Enum):
        shown = " \\| ".join(member.value for member in parts[0])
    elif get_origin(parts[0]) is list:
        shown = _shown_type(parts[0])
    else:
        shown = names.get(parts[0], str(parts[0]))
    return f"{shown} or null" if optional else shown


def _parts(hint: Any) -> tuple[Any, ...]:
    """What a hint is made of: the members of a union, the values of a list or a dict, or itself."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return get_args(hint)
    return (get_args(hint)[-1],) if origin in (list, dict) else (hint,)


def _comments(cls: type) -> dict[str, str]:
    """What stands beside or above each field in the source of `cls` and its bases."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if dataclasses.is_dataclass(part):
            found |= _comments_in(textwrap.dedent(inspect.getsource(part)))
    return found


def _comments_in(source: str) -> dict[str, str]:
    lines: dict[int, tuple[bool, str]] = {}  # line -> (whether the comment has it for itself, the comment)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = (token.line.strip().startswith("#"), token.string.lstrip("# "))
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above = node.lineno - 1
            while lines.get(above, (False, ""))[0]:
                above -= 1
            told = [lines[line][1] for line in range(above + 1, node.end_lineno + 1) if line in lines]
            found[node.target.id] = " ".join(told).replace("|", "\\|")
    return found


def _docstring(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split())


if __name__ == "__main__":
    print(reference(), end="")
