"""Which part of a model is stored in which number type, and what is computed in it.

Paddle's CPU build adds and multiplies no half-precision numbers, so nothing of this has been computed: types and requests are
tested, and what GPU kernels do is read in Paddle's sources (3.3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import paddle
from paddle import Tensor, nn

from blip2x.config.model import ModelConfig
from blip2x.config.run import PrecisionName
from blip2x.config.task import WeightsType
from blip2x.models.compact import CompactEmbedding, CompactLinear, compact_of, keep_compact
from blip2x.models.tensor_parallel import RowLinear, SplitEmbedding, SplitHead

LOW = {PrecisionName.bf16: "bfloat16", PrecisionName.fp16: "float16"}

# Computed in float32 inside autocast. Paddle has most of them on its own list, but that list's "pnorm" is no operation's name
# (it is p_norm, under F.normalize), and logsumexp is missing.
FLOAT32_OPERATIONS = (
    "layer_norm",
    "softmax",
    "log_softmax",
    "logsumexp",
    "softmax_with_cross_entropy",
    "p_norm",
    "reduce_sum",
    "reduce_mean",
    "mean",
    "rsqrt",
)


def storage_types(precision: PrecisionName, cfg: ModelConfig) -> dict[str, str]:
    """Name of the number type of each part of stage-1 and stage-2 models, by the part's name.

    - A frozen tower is only read, so it is stored as it is multiplied: this halves what takes most of the memory.
    - What is trained stays in float32, since a step of the optimizer is often smaller than the distance of two half-precision
      numbers. Autocast rounds the operands of matrix products on the way.
    - T5 never computes in float16: its feed-forward's sums go beyond 65504. It gets bfloat16 instead, as in LAVIS, which has
      float32's range.

    A frozen tower's norms, class token and positions stay in float32 all the same, see `store_in`.
    """
    types = dict.fromkeys(("ln_vision", "qformer", "vision_proj", "text_proj", "itm_head", "temp", "language_proj"), "float32")
    low = LOW.get(precision, "float32")
    types["vision"] = low if cfg.vision.frozen else "float32"
    types["language"] = "float32"
    if cfg.language.frozen:
        types["language"] = "bfloat16" if cfg.language.kind == "t5" and low == "float16" else low
    return types


def store_in(part: nn.Layer, dtype: str) -> None:
    """Give the matrices of `part`, and the biases beside them, the type `dtype`; they have no memory until `fill` gives it.

    Norms keep float32, a ten-thousandth of the memory: autocast computes them in float32, and Paddle's GPU kernel takes
    float32 weights for half-precision inputs, too (layer_norm_kernel.cu). So do parameters of three axes, the class token and
    the positions, with which an image encoder begins the sum over its blocks: this sum stays in float32, as in LAVIS. A
    language model begins it with a row of a matrix, and keeps it in the low type, as in LAVIS and Hugging Face.
    """
    made: dict[int, Tensor] = {}  # a parameter that two layers share stays one
    for layer in part.sublayers(include_self=True):
        own = dict(layer.named_parameters(include_sublayers=False))
        if "weight" in own and len(own["weight"].shape) == 1:
            continue
        for name, old in own.items():
            if len(old.shape) == 3:
                continue
            if id(old) not in made:
                made[id(old)] = _without_memory(layer, old, dtype)
            setattr(layer, name, made[id(old)])


def store_compact(part: nn.Layer, dtype: WeightsType, stored: str) -> None:
    """Have `part`, which is stored in `stored`, keep its matrices as a task's `weights_dtype` says (`compact`).

    These are all linear layers and the word embeddings; before they have memory, which `fill` gives them. Biases, norms,
    positions and an image encoder's first projection stay: a hundredth of the memory. What has two bytes already is left as it
    is by bfloat16.
    """
    if dtype is WeightsType.float32 or (dtype is WeightsType.bfloat16 and stored != "float32"):
        return
    for layer in part.sublayers(include_self=True):
        for name, child in list(layer.named_children()):
            if isinstance(child, (nn.Linear, RowLinear, SplitHead)):
                keep_compact(child, dtype.value, outputs=1)
            elif type(child) in (nn.Embedding, SplitEmbedding) and name in ("word_embeddings", "shared"):
                keep_compact(child, dtype.value, outputs=0)
            if isinstance(child, nn.Linear):
                setattr(layer, name, CompactLinear(child.weight, child.bias))
            elif type(child) is nn.Embedding and compact_of(child.weight):
                setattr(layer, name, CompactEmbedding(child.weight))


def autocast_to(dtype: str) -> AbstractContextManager[None]:
    """Matrix products compute in `dtype`, `FLOAT32_OPERATIONS` in float32, the rest in the widest of its operands' types."""
    return paddle.amp.auto_cast(level="O1", dtype=dtype, custom_black_list=FLOAT32_OPERATIONS)


@contextmanager
def never_float16() -> Iterator[None]:
    """Where autocast computes in float16, compute in bfloat16; else nothing changes."""
    is_float16 = paddle.is_autocast_enabled() and paddle.get_autocast_dtype() == "float16"
    with autocast_to("bfloat16") if is_float16 else nullcontext():
        yield


def without_autocast() -> AbstractContextManager[None]:
    """Leave autocast, where it is on; everything computes in its operands' own type.

    For embeddings, too: Paddle computes them in float32, for which it would make a float32 copy of the whole matrix each time.
    """
    return paddle.amp.auto_cast(enable=False) if paddle.is_autocast_enabled() else nullcontext()


def _without_memory(layer: nn.Layer, old: Tensor, dtype: str) -> Tensor:
    with paddle.LazyGuard():
        new = layer.create_parameter(list(old.shape), dtype=dtype)
    vars(new).update(vars(old))  # how it starts, and its share in tensor parallelism
    new.stop_gradient = old.stop_gradient
    return new
