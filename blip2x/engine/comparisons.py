"""What results.json says, metric by metric, each beside what ignorance scores on it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

BASELINES = {
    "chance": "chance",
    "blind": "no picture",
    "majority": "commonest answer",
}
PARTS = {  # what a metric is split by
    "question_type": "question type",
    "answer_type": "answer type",
    "part": "part of a step",
}
COST_KEYS = ("seconds", "peak_memory_gb")
_NO_METRICS = (*COST_KEYS, "pruned")  # the step at which a sweep stopped the run
Place = tuple[str, str, str]  # scope, name, part: see `Measure`
MINUS, TIMES = "\u2212", "\u00d7"

_ENDS = ("ci95_low", "ci95_high")  # of a 95 % interval

HIGHER, LOWER, UNKNOWN = 1, -1, 0
HEADLINES = ("CIDEr", "accuracy", "i2t_recall@1", "t2i_recall@1")  # a stage without any leads with its first metric
LOSS_PARTS = ("loss", "itc", "itm", "lm")
_SCORES = ("cider", "bleu", "meteor", "rouge", "spice")
_LOWER_ENDS = ("_loss", "_rank", "seconds", "error", "perplexity")

_MOST = 1000  # times a baseline that is next to nothing say no more

_GAINS = {  # how a sentence goes on after "12x" or "+34 points"
    "chance": ("chance", "over chance"),
    "blind": ("the {} without the picture", "over answers without the picture"),
    "majority": ("the commonest answer's", "over the commonest answer"),
}
_STAGE_TITLES = {
    "pretrain_language": "Language model",
    "pretrain_vision": "Image encoder",
    "pretrain_stage1": "Stage 1: align",
    "pretrain_stage2": "Stage 2: read",
    "caption": "Captions",
    "vqa_zeroshot": "Zero-shot answers",
    "vqa_finetune": "Fine-tuned answers",
    "predict": "Predictions",
}


@dataclass(frozen=True)
class Baseline:
    """What a model that lacks something scores on the metric it stands beside."""

    kind: str  # a key of BASELINES
    value: float


@dataclass(frozen=True)
class Measure:
    """One number of results.json; its key was ``[scope/]name[/part]``."""

    stage: str
    scope: str  # "": everything evaluated; else a group of images, such as "held_out"
    name: str
    part: str  # what it was split by and a type, such as "answer_type/number", or ""
    value: float
    baselines: tuple[Baseline, ...]
    interval: tuple[float, float] | None = None  # 95 %, where the run has computed it

    @property
    def key(self) -> str:
        """The key in results.json."""
        return "/".join(piece for piece in (self.scope, self.name, self.part) if piece)

    def shown(self, value: float | None = None) -> str:
        """`value` (default: this measure's own) in the unit of this metric."""
        value = self.value if value is None else value
        if not math.isfinite(value):
            return "not a number" if math.isnan(value) else "infinite"
        if not self.is_share:
            return compact(value)
        percent = self.percent(value)
        return f"{percent:.2f} %" if 0 < abs(percent) < 1 else f"{percent:.1f} %"

    def shown_interval(self) -> str:
        """The 95 % interval as `[low, high]` in the unit of `shown`; "" where there is none."""
        if self.interval is None or not all(map(math.isfinite, self.interval)):
            return ""
        return f"[{', '.join(self.shown(end).removesuffix(' %') for end in self.interval)}]"

    @property
    def is_share(self) -> bool:
        """Whether the metric is a part of a whole, shown in per cent."""
        return self.name.endswith(("accuracy", "r_mean")) or "recall@" in self.name

    def percent(self, value: float) -> float:
        """`value` of a share in per cent: VQA's `accuracy` is stored so, the others as fractions of one."""
        return value if self.name == "accuracy" else 100 * value

    def beats(self, baseline: Baseline) -> bool:
        """Whether the value is better than `baseline`'s: lower where that is good, as of a loss."""
        return self.value < baseline.value if direction(self.name) == LOWER else self.value > baseline.value

    def told(self, baseline: Baseline) -> str:
        """The words that follow `gain`."""
        factor, points = _GAINS[baseline.kind]
        what = metric_title(self.name.removeprefix("eval_")) if direction(self.name) == LOWER else "score"
        return points if self.name.endswith("accuracy") else factor.format(what)

    def gain(self, baseline: Baseline) -> str:
        """The value against `baseline`: points more for accuracies, a factor else; "" where that has no meaning."""
        if not (math.isfinite(self.value) and math.isfinite(baseline.value)):
            return ""
        if self.name.endswith("accuracy"):
            points = self.percent(self.value) - self.percent(baseline.value)
            sign = "+" if points > -0.05 else MINUS  # what is shown as 0.0 has no minus
            return f"{sign}{abs(points):.1f} points"
        if baseline.value <= 0 or self.value < 0:
            return ""
        factor = self.value / baseline.value
        if factor > _MOST:
            return f"over {_MOST:,}{TIMES}"
        digits = 0 if factor >= 100 else 1 if factor >= 1 else 2
        return f"{factor:.{digits}f}{TIMES}"


def read_measures(results: dict[str, Any]) -> list[Measure]:
    """Every metric of every stage in the file's order, baselines attached.

    ``blind_X`` and ``majority_X`` belong to ``X``; ``chance`` belongs to recall@1, or where a stage has none to its
    accuracies. A baseline is taken from the same scope only: the held-out part has its own chance. ``ci95_low_X`` and
    ``ci95_high_X`` are the interval of ``X``.
    """
    return [measure for stage, metrics in _stages(results) for measure in _stage_measures(stage, metrics)]


def parse_key(key: str, whole: Collection[str]) -> tuple[str, Place]:
    """A key's kind ("" for a metric itself) and place: ``held_out/blind_CIDEr`` -> ("blind", ("held_out", "CIDEr", "")).

    What comes first is a group of images unless it is one of `whole`, the metrics that the stage has of everything.
    """
    scope, _, rest = key.partition("/")
    if not rest or _kind(scope)[1] in whole:
        scope, rest = "", key
    name, _, part = rest.partition("/")
    kind, name = _kind(name)
    return kind, (scope, name, part)


def direction(name: str) -> int:
    """`HIGHER` or `LOWER`, whichever is better of the metric called `name`; `UNKNOWN` of one that is no score and no cost."""
    for word in name.split("/"):  # scope/name/part
        word = word.removeprefix("blind_").removeprefix("eval_")
        is_share = "accuracy" in word or "recall@" in word or word.endswith("r_mean")
        if is_share or word.lower().startswith(_SCORES) or "per_second" in word:
            return HIGHER
        if word in LOSS_PARTS or word.endswith(_LOWER_ENDS) or "memory" in word:
            return LOWER
    return UNKNOWN


def stage_title(stage: str) -> str:
    """A stage's name for readers."""
    return _STAGE_TITLES.get(stage, stage.replace("_", " ").capitalize())


def metric_title(name: str) -> str:
    """A metric's name for readers."""
    if name.startswith("itc_"):  # of a retrieval before matching
        return f"{metric_title(name.removeprefix('itc_'))}, by contrast alone"
    if name == "r_mean":
        return "mean of the six recalls"
    name = name.replace("i2t_recall", "image to text, recall").replace("t2i_recall", "text to image, recall")
    return name.replace("_", "-") if name == "ROUGE_L" else name.replace("_", " ")


def compact(value: float) -> str:
    """A count as it is, a measurement with about three digits."""
    size = abs(value)
    if isinstance(value, int) or size >= 100:
        return f"{value:,.0f}"
    if 0 < size < 0.001:
        return f"{value:.2g}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def _stages(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    loose = {key: value for key, value in results.items() if not isinstance(value, dict) and key not in _NO_METRICS}
    if loose:
        yield "run", loose
    for stage, metrics in results.items():
        if isinstance(metrics, dict):
            yield stage, metrics


def _stage_measures(stage: str, metrics: dict[str, Any]) -> list[Measure]:
    values: dict[Place, float] = {}
    baselines: dict[Place, list[Baseline]] = {}
    ends: dict[Place, dict[str, float]] = {}
    whole = {_kind(key)[1] for key in metrics if "/" not in key}
    for key, value in metrics.items():
        kind, place = parse_key(key, whole)
        number = _number(value)
        if number is None or key in COST_KEYS:
            continue
        if kind in _ENDS:
            ends.setdefault(place, {})[kind] = number
        elif kind:
            baselines.setdefault(place, []).append(Baseline(kind, number))
        else:
            values[place] = number
    for scope in dict.fromkeys(place[0] for place in values):
        chance = baselines.pop((scope, "", ""), [])
        for place in _places_of_chance([place for place in values if place[0] == scope]):
            baselines.setdefault(place, [])[:0] = chance
    return [
        Measure(stage, *place, value, tuple(baselines.get(place, ())), _interval(ends.get(place, {})))
        for place, value in values.items()
    ]


def _kind(name: str) -> tuple[str, str]:
    """``blind_accuracy`` -> ("blind", "accuracy"); ``chance`` -> ("chance", ""); no baseline and no end -> ("", name)."""
    if name == "chance":
        return "chance", ""
    for kind in (*BASELINES, *_ENDS):
        if name.startswith(f"{kind}_"):
            return kind, name.removeprefix(f"{kind}_")
    return "", name


def _interval(ends: dict[str, float]) -> tuple[float, float] | None:
    low, high = (ends.get(kind) for kind in _ENDS)
    return None if low is None or high is None else (low, high)


def _places_of_chance(places: list[Place]) -> list[Place]:
    first = [place for place in places if place[1].endswith("recall@1")]
    return first or [place for place in places if place[1].endswith("accuracy")]


def _number(value: Any) -> float | None:
    """None where `value` is no measurement; null stands for a number that JSON cannot write."""
    if value is None:
        return math.nan
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
