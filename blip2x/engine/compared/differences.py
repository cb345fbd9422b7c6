"""In which keys of their configs runs differ, and which of these say it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from blip2x.engine.compared.runs import ComparedRun, Scalar, shown

SEED = "seed"
ABSENT = "\u2013"  # of a key that a run's config does not have
# What an option of a group has of its own goes without saying where the option's name is said, unless somebody typed it
_LEADS = ("task.kind", "task.stages", "model.name", "dataset.name", "precision.name", "parallelism.kind")
_LEADS += ("model.language.kind", "model.vision.kind", "dataset.kind")


@dataclass(frozen=True)
class Key:
    """A key that not all runs have the same value of."""

    name: str
    title: str  # as short as it can be among the others
    values: tuple[str, ...]  # by run
    texts: tuple[str, ...]  # the same for readers: numbers with as few digits as tell them apart
    numbers: tuple[float, ...] | None  # by run, where all are
    lead: str | None = None  # another key whose value tells this one's

    @cached_property
    def choices(self) -> list[str]:
        """Its texts, each once, in order."""
        if self.numbers:
            return [text for _, text in sorted(dict(zip(self.numbers, self.texts, strict=True)).items())]
        return sorted(set(self.texts))


def differing(runs: Sequence[ComparedRun]) -> list[Key]:
    """The keys in which `runs` differ, those first that lead others or were typed; a run without a config says nothing."""
    known = [run for run in runs if run.config]
    names = dict.fromkeys(name for run in known for name in run.config)
    columns = {name: [run.config.get(name, ABSENT) for run in runs] for name in names}
    differ = {
        name: values
        for name, values in columns.items()
        if len({shown(value) for value, run in zip(values, runs, strict=True) if run.config}) > 1
    }
    typed = {name for run in runs for name in run.typed}
    leads = {name: None if name in typed else _lead(name, differ) for name in differ}
    order = sorted(differ, key=lambda name: (leads[name] is not None, name == SEED, name not in _LEADS))
    titles = short_titles([name for name in order if leads[name] is None]) | {n: n for n in order if leads[n] is not None}
    return [_key(name, titles[name], differ[name], leads[name]) for name in order]


def _key(name: str, title: str, values: list[Scalar], lead: str | None) -> Key:
    texts = tuple(map(shown, values))
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not numeric:
        return Key(name, title, texts, texts, None, lead)
    digits = next((n for n in range(3, 15) if len({f"{value:.{n}g}" for value in values}) == len(set(texts))), 15)
    short = tuple(shown(float(f"{value:.{digits}g}")) for value in values)
    return Key(name, title, texts, short, tuple(map(float, values)), lead)


def short_titles(names: Iterable[str]) -> dict[str, str]:
    """Each name by as few of its last parts as tell it from the others: "lr" of "optim.lr", "model" of "model.name"."""
    parts = {name: name.removesuffix(".name").removesuffix(".kind").split(".") for name in names}
    titles = {}
    for name, own in parts.items():
        count = next((n for n in range(1, len(own)) if sum(other[-n:] == own[-n:] for other in parts.values()) == 1), len(own))
        titles[name] = ".".join(own[-count:])
    return titles


def shortened(text: str, most: int = 40) -> str:
    """At most `most` characters of `text`, from both of its ends: paths differ at theirs."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}\u2026{text[len(text) - end :]}"


def differing_versions(runs: Sequence[ComparedRun]) -> dict[str, str]:
    """{"git_commit": "3eb88ea (2 runs), 91ac0f2 (1 run)"} of what the runs were made with, where they do not agree."""
    known = [run.versions for run in runs if run.versions]
    found = {}
    for name in dict.fromkeys(name for versions in known for name in versions):
        counts = Counter(shown(versions.get(name))[: 10 if name == "git_commit" else None] for versions in known)
        if len(counts) > 1:
            found[name] = counted(counts)
    return found


def counted(counts: Counter[str], most: int = 12) -> str:
    """What occurs, the commonest first, with its number of runs."""
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    texts = [f"{shortened(value)} ({count} run{'s' if count > 1 else ''})" for value, count in ranked[:most]]
    return ", ".join([*texts, *([f"and {len(ranked) - most} more"] if len(ranked) > most else [])])


def _lead(name: str, differ: dict[str, list[Scalar]]) -> str | None:
    """The name of an option, among what differs, that this key of it follows from."""
    for lead in _LEADS:
        group = "" if lead == "task.stages" else f"{lead.rpartition('.')[0]}."
        if lead not in differ or lead == name or (lead in _LEADS[6:] and name in _LEADS[:6]):
            continue
        in_group = name.startswith(group) if group else name.split(".")[0] in _stage_names(differ[lead])
        pairs = {(shown(a), shown(b)) for a, b in zip(differ[lead], differ[name], strict=True)}
        if in_group and len(pairs) == len({first for first, _ in pairs}):
            return lead
    return None


def _stage_names(values: list[Scalar]) -> set[str]:
    return {stage for value in values for stage in str(value).split(", ")}
