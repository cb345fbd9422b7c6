"""Parameters by part: how many, which of them are trained, in which type; beside the published counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from paddle import nn

from blip2x.config.model import ModelConfig
from blip2x.tasks.checkup.examined import Examined
from blip2x.tasks.checkup.findings import Findings

_PARTS = (  # the first that matches
    ("image encoder", re.compile(r"vision\.")),
    ("norm behind it", re.compile(r"ln_vision\.")),
    ("Q-Former: queries", re.compile(r"qformer\.(query_tokens|embeddings_norm)")),
    ("Q-Former: self-attention", re.compile(r"qformer\.layers\.\d+\.attention\.")),
    ("Q-Former: cross-attention", re.compile(r"qformer\.layers\.\d+\.cross_attention\.")),
    ("Q-Former: feed-forward of queries", re.compile(r"qformer\.layers\.\d+\.query_ffn\.")),
    ("Q-Former: feed-forward of texts", re.compile(r"qformer\.layers\.\d+\.text_ffn\.")),
    ("Q-Former: words and their head", re.compile(r"qformer\.text\.")),
    ("projections and heads", re.compile(r"(vision_proj|text_proj|language_proj|itm_head|temp)\b")),
    ("language model", re.compile(r"language\.")),
)

_VISION = {"eva_vit": (985_894_528, 1408), "clip_vit": (290_581_504, 1024)}  # at 224 pixels, and the width
_LANGUAGE = {"opt2.7b": 2_651_596_800, "opt6.7b": 6_658_473_984, "flant5xl": 2_849_757_184, "flant5xxl": 11_135_332_352}
_BETWEEN = {  # all that is neither image encoder nor language model: what pre-training teaches
    "stage1": {"eva_vit": 186_705_470, "clip_vit": 183_165_758},
    "stage2": {
        **dict(zip(_LANGUAGE, (107_133_696, 108_314_880, 106_739_968, 108_314_880), strict=True)),
        "opt2.7b_vitl": 103_593_984,
        "opt6.7b_vitl": 104_775_168,
        "flant5xl_vitl": 103_200_256,
        "flant5xxl_vitl": 104_775_168,
    },
}


@dataclass
class Count:
    """Of one part."""

    trained: int = 0
    frozen: int = 0
    types: set[str] = field(default_factory=set)


def count_parts(model: nn.Layer, stage: str, *, trains: bool) -> dict[str, Count]:
    """Part -> its numbers, parts that the model lacks left out; of a task that does not train, all are frozen."""
    alone = {"language": "language."}.get(stage, "")
    found: dict[str, Count] = {}
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in _PARTS if pattern.match(alone + name)), "heads of the labels")
        count = found.setdefault(part, Count())
        size = math.prod(parameter.shape)
        is_trained = trains and not parameter.stop_gradient
        count.trained += size if is_trained else 0
        count.frozen += 0 if is_trained else size
        count.types.add(str(parameter.dtype).removeprefix("paddle."))
    order = [part for part, _ in _PARTS]
    return dict(sorted(found.items(), key=lambda entry: order.index(entry[0]) if entry[0] in order else len(order)))


def published(cfg: ModelConfig, stage: str) -> dict[str, int] | None:
    """What the published model of that name has: "image encoder", "language model", "between"; None: it is none of them."""
    family = cfg.name.removesuffix("_vitl")
    vision = "clip_vit" if cfg.name.endswith("_vitl") else "eva_vit"
    if family not in _LANGUAGE:
        return None
    count, width = _VISION[vision]
    positions = ((cfg.vision.image_size // cfg.vision.patch_size) ** 2 - 16**2) * width
    found = {"image encoder": count + positions}
    if stage == "stage1":
        return found | {"between": _BETWEEN["stage1"][vision]}
    found["language model"] = _LANGUAGE[family]
    return found | ({"between": _BETWEEN["stage2"][cfg.name]} if stage == "stage2" else {})


def check_parameters(examined: Examined) -> Findings:
    """A table of the parts, and whether something is trained, and as many as were published."""
    out, stage = Findings(examined.name), examined.stage
    parts = count_parts(examined.model, stage, trains=examined.trains)
    rows = [("part", "trained", "frozen", "stored as")]
    rows += [(part, f"{its.trained:,}", f"{its.frozen:,}", " and ".join(sorted(its.types))) for part, its in parts.items()]
    trained, frozen = (sum(getattr(its, kind) for its in parts.values()) for kind in ("trained", "frozen"))
    rows.append(("in all", f"{trained:,}", f"{frozen:,}", ""))
    out.shown = _aligned(rows)
    out.record = {"parameters": {part: {**vars(its), "types": sorted(its.types)} for part, its in parts.items()}}
    if not examined.trains:
        out.fine("parameters", f"{trained + frozen:,}, none of them trained by this task")
    elif trained:
        out.fine("parameters", f"{trained + frozen:,}, {trained:,} of them trained")
    else:
        out.broken("parameters", f"none of {frozen:,} is trained", "set model.vision.frozen or model.language.frozen to false")
    split = [part for part in ("vision", "language") if examined.layout.ranks_of(part) > 1]
    wanted = published(examined.cfg.model, stage)
    if wanted is None or split or stage in ("vision", "language"):
        return out
    here = {part: parts[part].trained + parts[part].frozen for part in ("image encoder", "language model") if part in parts}
    here["between"] = trained + frozen - sum(here.values())
    differing = [f"{part} {here[part]:,} instead of {count:,}" for part, count in wanted.items() if here.get(part) != count]
    if differing:
        out.look(
            "published counts",
            f"{', '.join(differing)}",
            f"the published {examined.cfg.model.name} and its weights are of another shape; see the keys of model above",
        )
    else:
        out.fine("published counts", f"the same as the published {examined.cfg.model.name} has")
    return out


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if 0 < place < 3 else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        .rstrip()
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]  # fmt: skip
