"""Stage 1 and stage 2 against Hugging Face transformers 4.57.6 and PyTorch: weights, images and texts in, losses out.

make_reference.py computed in float64. Outputs reach 6 and gradients 2; float32 keeps seven digits of each, and the sums behind
them make that 2e-6 for PyTorch, and up to 3e-6 for us. Other threads and other CPUs sum in another order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.config.task import PretrainStage1Config
from blip2x.losses.itc import similarities
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.assemblies.stage2 import Stage2Model, join_prefix
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.qformer.qformer import QFormer
from blip2x.models.vision.eva_vit import EvaVit
from blip2x.objectives import stage1 as objective_module
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.parallel.context import Context

REFERENCE = np.load(Path(__file__).parent / "reference.npz")
QUERIES, DEC = 5, 36
NEGATIVE_IMAGE, NEGATIVE_TEXT = [1, 2, 0], [2, 0, 1]
ATOL = 1e-5
FELT = 1e-3  # what a real difference does to the outputs, at least
OUTPUTS = ["patches", "queries", "image_features", "text_features", "similarity", "itm_logits", "caption_logits"]


def array(name: str) -> Tensor:
    return paddle.to_tensor(REFERENCE[name])


def parts(vocab_size: int | None) -> tuple[EvaVit, QFormer]:
    sizes = {"image_size": 12, "patch_size": 4, "width": 20, "depth": 2, "num_heads": 2, "mlp_width": 28}
    vision = EvaVit(**sizes, drop_path_rate=0.0, recompute=False)
    sizes = {"num_queries": QUERIES, "width": 24, "depth": 3, "num_heads": 3, "mlp_width": 40, "vision_width": 20}
    return vision, QFormer(**sizes, cross_attention_every=2, dropout=0.1, vocab_size=vocab_size, max_positions=11)


def stage1() -> Stage1Model:
    model = Stage1Model(*parts(37), embed_dim=14, ln_vision_eps=1e-5, temperature=0.5)
    fill(model, stored("stage1"))
    return model


def stage2() -> Stage2Model:
    sizes = {"width": 18, "depth": 2, "num_heads": 3, "mlp_width": 30, "vocab_size": 41, "max_positions": 24}
    model = Stage2Model(*parts(None), OptLanguageModel(**sizes, dropout=0.1), ln_vision_eps=1e-5)
    only_stage1 = (".text", "_proj.", "itm_head.", "temp")
    first = {name: value for name, value in stored("stage1").items() if not any(part in name for part in only_stage1)}
    fill(model, {**first, **stored("stage2")})
    return model


def stored(prefix: str) -> dict[str, np.ndarray]:
    """By name; PyTorch's temperature has no axis, ours one."""
    names = [key for key in REFERENCE.files if key.startswith(f"{prefix}.")]
    return {key.removeprefix(f"{prefix}."): np.atleast_1d(REFERENCE[key]) for key in names}


def fill(model: nn.Layer, weights: dict[str, np.ndarray]) -> None:
    targets = dict(model.named_parameters())
    assert weights.keys() == targets.keys()
    for key, parameter in targets.items():
        assert weights[key].shape == tuple(parameter.shape), key
        parameter.set_value(weights[key])
    model.eval()


def run_stage1(model: Stage1Model) -> dict[str, Tensor]:
    ids, mask = array("ids"), array("mask")
    patches, queries, image_features, cache = model.image_features(array("image"))
    text_features = model.text_features(ids, mask)
    one = paddle.ones([])
    similarity, _ = similarities(image_features, text_features, image_features, text_features, one)
    images, texts = paddle.to_tensor([0, 1, 2, *NEGATIVE_IMAGE, 0, 1, 2]), paddle.to_tensor([0, 1, 2, 0, 1, 2, *NEGATIVE_TEXT])
    itm_logits = model.itm_logits(patches[images], ids[texts], mask[texts])
    decoder_ids = paddle.concat([paddle.full([3, 1], DEC, dtype="int64"), ids[:, 1:]], axis=1)
    captions = model.qformer.caption_logits(decoder_ids, mask, cache)
    values = (patches, queries, image_features, text_features, similarity, itm_logits, captions)
    return dict(zip(OUTPUTS, values, strict=True))


def differences(model: Stage1Model) -> dict[str, float]:
    return {name: float(np.abs(value.numpy() - REFERENCE[name]).max()) for name, value in run_stage1(model).items()}


def test_everything_that_stage_1_computes():
    model = stage1()
    for name, value in run_stage1(model).items():
        np.testing.assert_allclose(value.numpy(), REFERENCE[name], rtol=0, atol=ATOL, err_msg=name)
    looking = [layer.cross_attention is not None for layer in model.qformer.layers]
    assert looking == [True, False, True]


def test_every_weight_of_stage_1_counts():
    generator = np.random.default_rng(0)
    model = stage1()
    for key, parameter in model.named_parameters():
        if key == "temp":  # divides scores in the losses
            continue
        before = parameter.numpy().copy()
        parameter.set_value(before * (1 + 0.1 * generator.standard_normal(before.shape)).astype("float32"))
        worst = max(differences(model).values())
        if key.endswith("attention.key.bias"):
            assert worst < ATOL, key  # softmax sees no key's bias
        else:
            assert worst > FELT, key
        parameter.set_value(before)


def test_other_activations_and_epsilons_are_told_apart(monkeypatch):
    model = stage1()
    for layer in model.qformer.sublayers():
        if isinstance(layer, nn.LayerNorm):
            layer._epsilon = 1e-5
    assert differences(model)["queries"] > 10 * FELT
    model, gelu = stage1(), F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: gelu(x, approximate=True))
    wrong = differences(model)
    assert wrong["caption_logits"] > FELT and wrong["queries"] > 0.5 * FELT


def test_losses_and_gradients_of_stage_1(monkeypatch):
    """The negatives are fixed here: the first draw is of images."""
    has = paddle.ones([3], dtype="bool")
    draws = [(paddle.to_tensor(index), has) for index in (NEGATIVE_IMAGE, NEGATIVE_TEXT)]
    monkeypatch.setattr(objective_module, "draw_negatives", lambda *_: draws.pop(0))
    model = stage1()
    weights = {"itc_weight": 1.0, "itm_weight": 1.0, "lm_weight": 1.0}
    cfg = PretrainStage1Config(
        **weights, max_txt_len=7, contrast_steps=0, label_smoothing=0.1, gather_gradient=False, cached_contrast=False
    )
    batch = {"image_BCHW": array("image"), "text_ids_BL": array("ids"), "text_mask_BL": array("mask")}
    losses = Stage1Objective(model, Context(), cfg, dec_id=DEC)({**batch, "image_id_B": paddle.arange(3)})
    for name in ("itc", "itm", "lm"):
        np.testing.assert_allclose(float(losses[name]), REFERENCE[name], rtol=0, atol=ATOL, err_msg=name)
    losses["loss"].backward()
    expected, parameters = stored("gradient"), dict(model.named_parameters())
    for name, gradient in expected.items():
        np.testing.assert_allclose(parameters[name].grad.numpy(), gradient, rtol=0, atol=ATOL, err_msg=name)
        assert np.abs(gradient).max() > 0.05, name


def test_stage_2_from_the_image_to_logits_and_loss():
    model, ids, mask = stage2(), array("opt_ids"), array("opt_mask")
    prompt = model.encode(array("image"))
    np.testing.assert_allclose(prompt.numpy(), REFERENCE["stage2_prompt"], rtol=0, atol=ATOL)
    embeds, all_mask = join_prefix(model.language, prompt, ids, mask)
    tokens = all_mask.numpy().astype(bool)  # what padding predicts means nothing
    np.testing.assert_allclose(
        model.language(embeds, all_mask).numpy()[tokens], REFERENCE["stage2_logits"][tokens], rtol=0, atol=ATOL
    )
    batch = {"image_BCHW": array("image"), "text_ids_BL": ids, "text_mask_BL": mask, "label_mask_BL": mask}
    np.testing.assert_allclose(float(Stage2Objective(model)(batch)["loss"]), REFERENCE["stage2_loss"], rtol=0, atol=ATOL)


def test_every_weight_of_stage_2_counts():
    generator = np.random.default_rng(0)
    model = stage2()
    tokens = join_prefix(model.language, array("stage2_prompt"), array("opt_ids"), array("opt_mask"))[1].numpy().astype(bool)
    for key, parameter in model.named_parameters():
        before = parameter.numpy().copy()
        parameter.set_value(before * (1 + 0.1 * generator.standard_normal(before.shape)).astype("float32"))
        logits = model.language(*join_prefix(model.language, model.encode(array("image")), array("opt_ids"), array("opt_mask")))
        worst = np.abs(logits.numpy() - REFERENCE["stage2_logits"])[tokens].max()
        assert worst < ATOL if key.endswith(("attention.key.bias", "k_proj.bias")) else worst > FELT, key
        parameter.set_value(before)
