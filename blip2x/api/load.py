"""``blip2x.load``: from a name or path to a model in evaluation mode and its processor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paddle
from omegaconf import OmegaConf

from blip2x.api.inputs import PictureReader
from blip2x.api.matching import MatchingModel
from blip2x.api.processor import Processor
from blip2x.api.writing import WritingModel
from blip2x.config.auto import PARTS, auto_defaults, auto_model
from blip2x.config.check_model import check_model
from blip2x.config.dataset import TransformConfig
from blip2x.config.model import Missing, ModelConfig
from blip2x.config.run import Device, PathsConfig
from blip2x.data.tokenize import TextTokenizer
from blip2x.data.transforms import EvalTransform
from blip2x.errors import UserError
from blip2x.models.weights.auto import read
from blip2x.models.weights.export import usual_ends
from blip2x.models.weights.known import is_known, locate
from blip2x.models.weights.source import Source, open_source
from blip2x.parallel.devices import select_device
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.weights import CLIP_NORMALISATION, Weights, source_normalisation

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = tuple(device.value for device in Device)
WHERE_MISSING = tuple(missing.value for missing in Missing)
_STARTS = {"opt": 2, "t5": 1}  # </s>


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    weights_root: str | Path | None = None,
    offline: bool | None = None,
    missing: str = "initialise",
    settings: Mapping[str, Any] | None = None,
) -> tuple[WritingModel | MatchingModel, Processor | None]:
    """Load BLIP-2 weights of any family.

    Args:
        source: a Hugging Face folder, a LAVIS .pth, a PaddleMIX .pdparams or its folder, a blip2x checkpoint, or a name of
            published weights ("Salesforce/blip2-opt-2.7b", "blip2_pretrained.pth", "paddlemix/blip2-stage2"), to be fetched.
        dtype: "float32"; on a GPU also "bfloat16" and "float16". A CPU computes in float32 only.
        device: "auto", "cpu" or "gpu".
        weights_root: where names are looked up and fetched to; None: BLIP2X_WEIGHTS, else "weights".
        offline: True: nothing is fetched; None: as BLIP2X_OFFLINE says.
        missing: what becomes of parts of the Q-Former that the weights lack (Hugging Face's retrieval models cannot write
            captions): "initialise" makes them random, and a warning says so; "error" refuses.
        settings: values of the config's ``model`` group that win over what the weights say, by dotted key, e.g.
            ``{"model.vision.num_heads": 16}`` for a LAVIS file of unusual width.

    Returns:
        The model, a `WritingModel` (stage 2) or a `MatchingModel` (stage 1), and its processor; None in place of the processor
        where no tokenizer comes with the weights: the model then takes and gives arrays of ids.

    Raises:
        UserError: weights that cannot be had, are damaged, or are of another model.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("device", device, DEVICES), ("missing", missing, WHERE_MISSING)):
        if value not in known:
            raise UserError(f"{name}={value!r} is none of {', '.join(known)}")
    place = select_device(Device(device))
    if place == "cpu" and dtype != "float32":
        raise UserError(f"dtype={dtype}: paddle computes in float32 only on a CPU; take dtype='float32', or a GPU")
    root = weights_root or os.environ.get("BLIP2X_WEIGHTS", "weights")
    if offline is None:
        offline = os.environ.get("BLIP2X_OFFLINE", "false").lower() in ("1", "true", "yes", "on")
    paths = PathsConfig(outputs="", data="", weights=str(root), cache="", offline=offline)
    path = locate(str(source), Path(root), offline=offline, key="source")
    cfg = _model_config(path, paths, missing, settings or {})
    weights = Weights(cfg, paths, str(path))
    said: list[str] = []
    loader = ModelLoader(weights, texts=_no_texts, say=said.append)
    opened = weights.source
    reader = PictureReader(EvalTransform(_transform(opened), cfg.vision.image_size), cfg.vision.image_size, dtype)
    fetch = is_known(str(source)) and not offline
    default, random_state = paddle.get_default_dtype(), paddle.get_rng_state()
    paddle.set_default_dtype(dtype)
    paddle.seed(0)  # what the weights lack is the same every time
    try:
        if opened.has("language_proj."):
            tokenizer = loader.own_tokenizer("language", fetch=fetch)
            network = loader.stage2_model(0, new_projection=False)
            ids = _special_ids(opened, tokenizer, cfg.language.kind, network.language.vocab_size)
            model: WritingModel | MatchingModel = WritingModel(network, reader, tokenizer, report=said, **ids)
        elif opened.has("itm_head.", "vision_proj."):
            tokenizer = loader.own_tokenizer("qformer", fetch=fetch)
            network = loader.stage1_model(0)
            writes = opened.has("qformer.text.head_transform.")
            if not writes:
                warnings.warn(
                    f"{opened.path} has no head to write captions with: it starts random, so that itg means nothing until it "
                    "is trained, and generate refuses",
                    stacklevel=3,
                )
            model = MatchingModel(network, reader, tokenizer, report=said, writes=writes)
        else:
            raise _no_blip2(opened)
    finally:
        paddle.set_default_dtype(default)
        paddle.set_rng_state(random_state)
    return model, None if tokenizer is None else Processor(tokenizer, reader.transform)


def _model_config(path: Path, paths: PathsConfig, missing: str, settings: Mapping[str, Any]) -> ModelConfig:
    """The config that ``model=auto model.weights=PATH`` makes."""
    own = {key.removeprefix("model."): value for key, value in settings.items()}
    for key in own:
        if "." in key and key.partition(".")[0] not in PARTS:
            raise UserError(f"settings has {key!r}, but the parts of a model are {', '.join(PARTS)}")
    given = auto_defaults() | own | {"weights": str(path), "missing": missing}
    try:
        described, heads = read(given, Path(paths.weights), offline=paths.offline)
        cfg: ModelConfig = OmegaConf.to_object(auto_model(given, described, heads))
        check_model(cfg)
        return cfg
    except UserError:
        opened = open_source(path)
        if opened.has("qformer.query_tokens"):
            raise
        raise _no_blip2(opened) from None  # there is a better reason than what its settings lack


def _no_blip2(source: Source) -> UserError:
    return UserError(f"{source.path} holds {source.what}, not a BLIP-2 of stage 1 or 2")


def _transform(source: Source) -> TransformConfig:
    numbers = source_normalisation(source) or CLIP_NORMALISATION
    return TransformConfig(mean=numbers["mean"], std=numbers["std"], crop_scale=None, flip=False)


def _special_ids(source: Source, tokenizer: TextTokenizer | None, kind: str, vocab_size: int) -> dict[str, int | None]:
    """End and padding of texts, and what stands in for an empty prompt: Hugging Face's settings, else the tokenizer's.

    As there, the language model's own settings go first.
    """
    generation = source.settings.get("generation_config.json", {})
    text = source.config.get("text_config", {})

    def first(key: str, own: int | None, usual: int) -> int:
        for found in (text.get(key), generation.get(key), own):
            if isinstance(found, list):
                found = found[0]
            if found is not None:
                return int(found)
        return usual

    usual_end, usual_pad = usual_ends(kind, vocab_size)
    end = first("eos_token_id", tokenizer.end_id if tokenizer else None, usual_end)
    pad = first("pad_token_id", tokenizer.pad_id if tokenizer else None, usual_pad)
    # the empty prompt: OPT reads its first token, FlanT5's encoder the end
    start = first("bos_token_id", tokenizer.bos_id if tokenizer else None, _STARTS[kind]) if kind == "opt" else _STARTS[kind]
    image = source.config.get("image_token_index")
    return {"eos_token_id": end, "pad_token_id": pad, "start_token_id": start, "image_token_id": image}


def _no_texts() -> list[str]:
    raise UserError("a tokenizer made of a data set's texts comes with its checkpoint, and this one has none")
