"""Models from checkpoints: whose weights and whose tokenizer they have, and what is frozen."""

from __future__ import annotations

import numpy as np
import pytest

from blip2x.config.compose import compose_config
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.tasks.common.models import ModelLoader

FEW = ["dataset.train_scenes=20", "dataset.test_scenes=8"]
NO_DATA = ["dataset=custom", "dataset.images=/no/where"]


@pytest.fixture
def loader(small, run):
    """`loader(*overrides)`."""
    return lambda *overrides: ModelLoader(compose_config(["task=caption", *small, *overrides]), run)


def frozen(layer):
    return all(parameter.stop_gradient for parameter in layer.parameters())


def test_stage_2_has_its_own_weights_and_those_of_its_frozen_parts(loader, trained, run):
    made = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage2/checkpoint")
    model, _ = made.stage2(new_projection=False)
    assert frozen(model.vision) and frozen(model.language) and not frozen(model.qformer) and not model.training
    other, _ = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage2/checkpoint").stage2(new_projection=False)
    for name, parameter in other.named_parameters():  # all come from files: nothing is left to chance
        np.testing.assert_array_equal(parameter.numpy(), dict(model.named_parameters())[name].numpy(), err_msg=name)
    assert made.frozen_origin("vision", "language") == {
        "vision": str(trained / "pretrain_vision/checkpoint"),
        "language": str(trained / "pretrain_language/checkpoint"),
    }
    said = run.console.file.getvalue()
    for stage in ("pretrain_stage2", "pretrain_vision", "pretrain_language"):
        assert f"tensors from {trained}/{stage}/checkpoint" in said


def test_stage_2_starts_from_stage_1_with_a_new_projection(loader, trained):
    parts = [f"model.language.weights={trained}/pretrain_language/checkpoint"]
    made = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage1/checkpoint", *parts)
    model, _ = made.stage2(new_projection=True)
    before, _ = made.stage1()
    np.testing.assert_array_equal(model.qformer.query_tokens.numpy(), before.qformer.query_tokens.numpy())
    with pytest.raises(UserError, match=r"lacks tensors of the model.*language_proj"):
        made.stage2(new_projection=False)


def test_tokenizers_come_with_the_weights_and_not_from_another_data_sets_text(loader, trained):
    """The digits' texts have other words, and a data set without files has none at all."""
    stage1, stage2 = (f"model.weights={trained}/pretrain_stage{stage}/checkpoint" for stage in (1, 2))
    language = f"model.language.weights={trained}/pretrain_language/checkpoint"
    for dataset in (NO_DATA, FEW):
        for tokenizer in (
            loader(*dataset, stage1).qformer_tokenizer(),
            loader(*dataset, stage2).language_tokenizer(),
            loader(*dataset, stage1, language).language_tokenizer(),
        ):
            assert tokenizer.decode(tokenizer.tokens("which digit is left of")) == "which digit is left of"
            assert tokenizer.vocab_size < 30


def test_without_weights_the_data_sets_text_makes_the_tokenizer(loader):
    tokenizer = loader(*FEW).qformer_tokenizer()
    assert tokenizer.family == "bert" and "purple" in tokenizer.decode(tokenizer.tokens("a purple two"))
    with pytest.raises(UserError, match="image folder /no/where does not exist"):
        loader(*NO_DATA).qformer_tokenizer()


def test_a_tokenizer_of_another_family_is_refused(trained, run):
    cfg = compose_config(["task=caption", "model=tiny_t5", f"model.weights={trained}/pretrain_stage2/checkpoint"])
    with pytest.raises(UserError, match="is of the family 'opt', not 't5'"):
        ModelLoader(cfg, run).language_tokenizer()


def test_a_frozen_part_without_weights_is_named(loader, trained):
    with pytest.raises(UserError, match=r"^model.vision.frozen=true"):
        loader(*FEW).stage1()
    with pytest.raises(UserError, match=r"^model.language.frozen=true"):
        loader(*FEW, f"model.weights={trained}/pretrain_stage1/checkpoint").stage2(new_projection=True)


def test_a_part_that_is_not_frozen_may_be_new(loader):
    model, _ = loader(*FEW, "model.vision.frozen=false").stage1()
    assert not frozen(model.vision)


def test_an_encoder_trained_in_stage_1_is_what_later_stages_freeze(loader, trained, tmp_path, small):
    """Its weights are in stage 1's checkpoint, whatever `model.vision.weights` still says."""
    given = f"model.vision.weights={trained}/pretrain_vision/checkpoint"
    words = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage1/checkpoint").qformer_tokenizer()
    trainable = build_stage1(compose_config(small).model, vocab_size=words.vocab_size)
    save_checkpoint(tmp_path / "c1", trainable, kind="pretrain_stage1", step=1, tokenizers={"qformer": words})

    language = f"model.language.weights={trained}/pretrain_language/checkpoint"
    made = loader(*NO_DATA, f"model.weights={tmp_path}/c1", given, language)
    stage2, language_words = made.stage2(new_projection=True)
    expected = trainable.vision.state_dict()
    origin = made.frozen_origin("vision", "language")
    assert frozen(stage2.vision) and origin["vision"] == str(tmp_path / "c1")

    tokenizers = {"language": language_words}
    save_checkpoint(tmp_path / "c2", stage2, kind="pretrain_stage2", step=1, tokenizers=tokenizers, frozen_origin=origin)
    again, _ = loader(*NO_DATA, f"model.weights={tmp_path}/c2").stage2(new_projection=False)
    for model in (stage2, again):
        for name, tensor in model.vision.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy(), err_msg=name)


def test_a_language_model_goes_on_from_its_weights(loader, trained):
    folder = trained / "pretrain_language/checkpoint"
    model, tokenizer = loader(*NO_DATA, f"model.language.weights={folder}").language()
    assert tokenizer.family == "opt" and not frozen(model)
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    load_checkpoint(folder, model)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name], err_msg=name)
