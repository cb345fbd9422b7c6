"""Where each value of the config comes from."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from typing import Any

from blip2x.config.compose import compose_config, override_key
from blip2x.config.origin import flat, options, origins
from blip2x.engine.folders import write_whole
from blip2x.errors import UserError
from blip2x.tasks.checkup.examined import Examined
from blip2x.tasks.checkup.findings import Findings

FILE = "config_origin.csv"
_NAMED = 5  # values in which a task is not as its experiment says
_WHERE = ("paths", "logger", "device", "threads", "parallelism")  # says where a task runs, and changes no figure


def check_settings(examined: Examined) -> Findings:
    """Show the values that are not the options' own, or all; config_origin.csv has all of them."""
    out = Findings(examined.name)
    values = flat(examined.wanted.cfg)
    found = origins(examined.wanted.cfg, examined.words, examined.givers)
    rows = [(key, _text(values[key]), origin.source, origin.before or "") for key, origin in found.items()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("key", "value", "from", "instead of"), *rows])
    write_whole(examined.run.path(examined.name, FILE), text.getvalue())
    wanted = [row for row in rows if examined.shows_all_keys or not found[row[0]].is_default]
    width = max((len(f"{key} = {value}") for key, value, *_ in wanted), default=0)
    chosen = options(examined.words)
    out.shown = [" ".join(f"{group.partition('@')[0]}={option}" for group, option in chosen.items() if "/" not in group)]
    out.shown += [f"{f'{key} = {value}':<{min(width, 60)}}  {source}" for key, value, source, _ in wanted]
    counts = Counter(origin.source if not origin.is_default else "the options' files" for origin in found.values())
    said = ", ".join(f"{count} from {source}" for source, count in counts.most_common())
    out.fine("config", f"{len(found)} values: {said}; all in {examined.name}/{FILE}")
    against = _against_experiment(values, examined.words)
    if against:
        named = ", ".join(against[:_NAMED]) + (f" and {len(against) - _NAMED} more" if len(against) > _NAMED else "")
        text = f"{named} {'is' if len(against) == 1 else 'are'} not as the experiment says"
        out.look("experiment", text, "figures that it reproduces may not be reached; leave them out if that is not meant")
    out.record = {"options": chosen, "values": {key: {"value": values[key], "from": found[key].source} for key in values}}
    return out


def _against_experiment(values: dict[str, Any], words: list[str]) -> list[str]:
    """The keys whose values are not those of the experiment alone; none where no experiment is chosen."""
    chosen = [word for word in words if override_key(word) == "experiment"]
    if not chosen:
        return []
    try:
        own = flat(compose_config([word for word in words if word in chosen or _is_where(override_key(word))]))
    except UserError:  # e.g. of model=auto, whose weights are given otherwise
        return []
    return [key for key in values if not _is_where(key) and values[key] != own.get(key)]


def _is_where(key: str) -> bool:
    """Whether it says where a task runs or what it starts from, which everybody has elsewhere."""
    return key.split(".")[0] in _WHERE or key.endswith(".weights")


def _text(value: Any) -> str:
    """As it is typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
