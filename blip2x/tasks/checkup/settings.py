"""Where each value of the config comes from."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from typing import Any

from blip2x.config.origin import COMMAND_LINE, flat, options, origins
from blip2x.engine.folders import write_whole
from blip2x.tasks.checkup.examined import Examined
from blip2x.tasks.checkup.findings import Findings

FILE = "config_origin.csv"


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
    against = [
        key
        for key, origin in found.items()
        if origin.source == COMMAND_LINE and origin.differed and (origin.before or "").startswith("conf/experiment/")
    ]
    if against:
        text = f"{', '.join(against)} {'is' if len(against) == 1 else 'are'} not as the experiment says"
        out.look("experiment", text, "figures that it reproduces may not be reached; leave them out if that is not meant")
    out.record = {"options": chosen, "values": {key: {"value": values[key], "from": found[key].source} for key in values}}
    return out


def _text(value: Any) -> str:
    """As it is typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
