"""Whole tiny checkpoints of Hugging Face transformers 4.57.6 through `blip2x.load`: features, logits, losses and gradients.

make_reference.py computed in float64 from the same weights, so a difference is our rounding alone. float32 keeps seven digits:
for numbers of order one, summed a few dozen at a time in some twenty layers one behind the other, that is 1e-6 to 5e-6, for
PyTorch's float32 (the script prints its own) as for ours. Other threads and CPUs sum in another order, so 1e-5 is allowed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import paddle
import pytest
from paddle import Tensor
from safetensors.numpy import load_file, save_file

import blip2x
from blip2x.errors import UserError
from blip2x.models.assemblies.stage2 import join_prefix
from blip2x.models.freeze import freeze
from blip2x.objectives.stage2 import Stage2Objective

HERE = Path(__file__).parent
REFERENCE = np.load(HERE / "reference.npz")
ATOL = 1e-5
VISION_ATOL = 1e-7  # the tower's output is 0.07 at most: its sums are small, so that the norms' epsilons count
# The norm behind the query tokens divides them by 0.02, their spread, and so multiplies their gradient and its rounding by 50:
# it reaches 7, and PyTorch's float32 is 5e-5 off. All other gradients reach 1, and PyTorch is 6e-6 off.
QUERY_GRADIENT_ATOL = 2e-4
FELT = 1e-3  # what a real difference does to the outputs, at least


def array(name: str) -> Tensor:
    return paddle.to_tensor(REFERENCE[name])


def load(folder: str | Path, **settings: Any) -> Any:
    incomplete = pytest.warns(UserWarning, match="no head to write captions") if "retrieval" in str(folder) else nullcontext()
    with incomplete:
        model, processor = blip2x.load(HERE / folder, settings=settings or None)
    assert processor is None  # there is no tokenizer in the folder
    return model


# vision tower, Q-Former, projection


@pytest.mark.parametrize("folder", ["opt", "t5", "retrieval"])
def test_image_features(folder, close):
    model = load(folder)
    image = REFERENCE["image"]
    close("vision tower", model.network.vision(paddle.to_tensor(image)), REFERENCE[f"{folder}.vision"], atol=VISION_ATOL)
    for name, output in (("ln_vision", "patches"), ("Q-Former", "queries")):
        ours = model.encode_image(pixel_values=image, output=output)
        assert ours.dtype == np.float32
        close(name, ours, REFERENCE[f"{folder}.{output}"], atol=ATOL)
    if folder != "retrieval":
        projected = model.encode_image(pixel_values=image, output="projected")
        close("language projection", projected, REFERENCE[f"{folder}.projected"], atol=ATOL)


def test_another_image_size(close):
    """The position embeddings are interpolated when they are loaded; Hugging Face does it in the forward pass."""
    model = load("opt", **{"model.vision.image_size": 25})
    image = REFERENCE["larger_image"]
    vision = model.network.vision(paddle.to_tensor(image))
    close("vision tower, another image size", vision, REFERENCE["opt_larger.vision"], atol=VISION_ATOL)
    for name, output in (("ln_vision", "patches"), ("Q-Former", "queries")):
        ours = model.encode_image(pixel_values=image, output=output)
        close(f"{name}, another image size", ours, REFERENCE[f"opt_larger.{output}"], atol=ATOL)


def test_epsilon_behind_the_vision_tower_is_the_files():
    """1e-6; LAVIS's 1e-5 gives something else."""
    lavis = load("opt", **{"model.ln_vision_eps": 1e-5})
    wrong = lavis.encode_image(pixel_values=REFERENCE["image"], output="patches")
    assert np.abs(wrong - REFERENCE["opt.patches"]).max() > FELT


# stage 2


def test_opt_logits(close):
    network = load("opt").network
    embeds, mask = join_prefix(network.language, network.encode(array("image")), array("opt_ids"), array("opt_mask"))
    tokens = mask.numpy().astype(bool)  # what padding predicts means nothing
    close("OPT logits", network.language(embeds, mask).numpy()[tokens], REFERENCE["opt.logits"][tokens], atol=ATOL)


ROWS = {"opt": "OPT", "t5": "T5", "t5_exact": "T5 with exact GELU"}
T5_VARIANTS = {"t5": {}, "t5_exact": {"model.language.activation": "gelu"}}


@pytest.mark.parametrize("variant", T5_VARIANTS)
def test_t5_logits(variant, close):
    close(f"{ROWS[variant]} logits", *t5_logits(load("t5", **T5_VARIANTS[variant]), variant), atol=ATOL)


def t5_logits(model: Any, variant: str) -> tuple[np.ndarray, np.ndarray]:
    network = model.network
    prefix = join_prefix(network.language, network.encode(array("image")), array("t5_input_ids"), array("t5_input_mask"))
    ids, mask = array("t5_output_ids"), array("t5_output_mask")
    start, seen = paddle.zeros([3, 1], dtype="int64"), paddle.ones([3, 1], dtype="int64")
    logits = network.language(*prefix, paddle.concat([start, ids[:, :-1]], axis=1), paddle.concat([seen, mask[:, :-1]], axis=1))
    tokens = mask.numpy().astype(bool)
    return logits.numpy()[tokens], REFERENCE[f"{variant}.logits"][tokens]


def test_a_config_that_asks_for_exact_gelu_gets_it(tmp_path):
    """As those of the published BLIP-2 with FlanT5 do."""
    folder = shutil.copytree(HERE / "t5", tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["dense_act_fn"] == "gelu_new"
    config["text_config"]["dense_act_fn"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(*t5_logits(load(folder), "t5_exact"), rtol=0, atol=ATOL)
    tokens = REFERENCE["t5_output_mask"].astype(bool)
    assert np.abs(REFERENCE["t5_exact.logits"] - REFERENCE["t5.logits"])[tokens].max() > 10 * ATOL


OPT_BATCH = {"text_ids_BL": "opt_ids", "text_mask_BL": "opt_mask", "label_mask_BL": "opt_label_mask"}
T5_BATCH = {"input_ids_BL": "t5_input_ids", "input_mask_BL": "t5_input_mask"}
T5_BATCH |= {"output_ids_BT": "t5_output_ids", "output_mask_BT": "t5_output_mask"}


@pytest.mark.parametrize("variant", ROWS)
def test_loss_and_every_gradient(variant, close):
    """Through the frozen language model, as stage 2 trains."""
    network = load(variant.removesuffix("_exact"), **T5_VARIANTS.get(variant, {})).network
    for part in (network.vision, network.language):
        freeze(part)
    names = OPT_BATCH if variant == "opt" else T5_BATCH
    loss = Stage2Objective(network)({"image_BCHW": array("image"), **{key: array(name) for key, name in names.items()}})["loss"]
    close(f"{ROWS[variant]} loss", loss, REFERENCE[f"{variant}.loss"], atol=ATOL)
    loss.backward()
    trained = {name: parameter for name, parameter in network.named_parameters() if not parameter.stop_gradient}
    prefix = f"{variant}.gradient."
    assert trained.keys() == {key.removeprefix(prefix) for key in REFERENCE.files if key.startswith(prefix)}
    for name, parameter in trained.items():
        of_queries = name == "qformer.query_tokens"
        row = f"{ROWS[variant]} gradients, {'query tokens' if of_queries else 'all other parameters'}"
        close(row, parameter.grad, REFERENCE[prefix + name], atol=QUERY_GRADIENT_ATOL if of_queries else ATOL)


# retrieval


def test_unit_vectors_contrast_and_matching(close):
    model = load("retrieval")
    image, ids, mask = (REFERENCE[name] for name in ("image", "ids", "mask"))
    image_vectors = model.encode_image(pixel_values=image, output="projected")
    close("image vectors", image_vectors, REFERENCE["retrieval.image_vectors"], atol=ATOL)
    text_vectors = model.encode_text(input_ids=ids, attention_mask=mask)
    close("text vectors", text_vectors, REFERENCE["retrieval.text_vectors"], atol=ATOL)
    contrast = model.itc(pixel_values=image, input_ids=ids, attention_mask=mask)
    close("ITC similarity", contrast, REFERENCE["retrieval.itc"], atol=ATOL)
    match = model.itm(pixel_values=image[REFERENCE["itm_image"]], input_ids=ids, attention_mask=mask)
    close("ITM logits", match, REFERENCE["retrieval.itm"], atol=ATOL)


# files


def test_biases_that_no_output_shows():
    """A key's bias adds the same to all scores of a query, which softmax does not see; it is read all the same."""
    parameters = dict(load("opt").network.named_parameters())
    stored = {name: array for path in (HERE / "opt").glob("*.safetensors") for name, array in load_file(path).items()}
    for theirs, ours in (
        ("vision_model.encoder.layers.1.self_attn.qkv", "vision.blocks.1.attention.qkv"),
        ("qformer.encoder.layer.1.attention.attention.key", "qformer.layers.1.attention.key"),
        ("qformer.encoder.layer.2.crossattention.attention.key", "qformer.layers.2.cross_attention.key"),
        ("language_model.model.decoder.layers.1.self_attn.k_proj", "language.opt.decoder.layers.1.self_attn.k_proj"),
    ):
        np.testing.assert_array_equal(parameters[f"{ours}.bias"].numpy(), stored[f"{theirs}.bias"])
        assert stored[f"{theirs}.bias"].all()


@pytest.mark.parametrize(
    ("whole", "half", "dtype"),
    [("opt", "opt_bfloat16", ml_dtypes.bfloat16), ("retrieval", "retrieval_float16", np.float16)],
)
def test_half_precision_files_give_the_rounded_numbers(whole, half, dtype):
    """Exactly. Hugging Face leaves the Q-Former of a float16 model in float32, and so in the file."""
    rounded = dict(load(half).network.named_parameters())
    for name, parameter in load(whole).network.named_parameters():
        if name.startswith(("temp", "qformer.text.head_")):  # which their retrieval model has not
            continue
        exact = parameter.numpy()
        kept = name.startswith("qformer.") and not name.startswith("qformer.text.")  # theirs has the texts' embeddings outside
        if dtype != np.float16 or not kept:
            exact = exact.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(rounded[name].numpy(), exact, err_msg=name)


def edited(tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of t5 with other tensors."""
    folder = shutil.copytree(HERE / "t5", tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def narrower(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = np.ascontiguousarray(tensors[name][..., :-1])

    return edit


WRONG = {  # a name in the file, and ours for it
    "vision_model.encoder.layers.1.self_attn.qkv.bias": "vision.blocks.1.attention.qkv.bias",
    "qformer.encoder.layer.2.crossattention.attention.key.weight": "qformer.layers.2.cross_attention.key.weight",
    "language_projection.weight": "language_proj.weight",
    "language_model.decoder.block.1.layer.1.EncDecAttention.k.weight": (
        "language.decoder.block.1.layer.1.EncDecAttention.k.weight"
    ),
}
TOO_MANY = {
    # a block more than the configuration counts
    "vision_model.encoder.layers.2.layer_norm1.weight": "vision.blocks.2.norm1.weight",
    # this layer does not look at the image
    "qformer.encoder.layer.1.crossattention.attention.key.bias": "qformer.layers.1.cross_attention.key.bias",
    "language_model.adapter.weight": "language_model.adapter.weight",
}


def either(names: tuple[str, str]) -> str:
    return "|".join(map(re.escape, names))


@pytest.mark.parametrize("names", WRONG.items())
@pytest.mark.parametrize("what", ["shape", "absence"])
def test_a_wrong_tensor_is_named(what, names, tmp_path):
    folder = edited(tmp_path, narrower(names[0]) if what == "shape" else lambda tensors: tensors.pop(names[0]))
    with pytest.raises(UserError, match=either(names)):
        load(folder)


@pytest.mark.parametrize("names", TOO_MANY.items())
def test_a_tensor_too_many_is_named(names, tmp_path):
    folder = edited(tmp_path, lambda tensors: tensors.update({names[0]: np.zeros([16], np.float32)}))
    with pytest.raises(UserError, match=either(names)):
        load(folder)


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = shutil.copytree(HERE / "opt", tmp_path / "opt")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        load(folder)
