"""A rank of a tensor group loads its share of the frozen parts, and all of the rest."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from blip2x.config.compose import compose_config
from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.models.tensor_parallel import share_of
from blip2x.parallel.context import Context, TensorGroup
from blip2x.tasks.common.models import ModelLoader


@pytest.fixture
def loader(small, tmp_path):
    """`loader(rank, size, *overrides)` -> the loader of one of `size` ranks, which nothing connects."""

    def make(rank, size, *overrides):
        context = Context(rank=rank, world_size=size, tensor=TensorGroup(rank, size))
        run = Run(tmp_path, tmp_path, "s", context, Console(file=io.StringIO(), width=200), Loggers())
        words = ["task=caption", "dataset=custom", "dataset.images=/no/where", "parallelism=tp2", *small]
        return ModelLoader.of_run(compose_config([*words, *overrides]), run)

    return make


def assert_split(ranks, whole, parts):
    """Ranks have shares of the matrices of `parts` of `whole`, and all of the others."""
    ranks = [dict(model.named_parameters()) for model in ranks]
    split = {name for name, parameter in ranks[0].items() if share_of(parameter)}
    assert {name.split(".")[0] for name in split} == set(parts)
    for name, parameter in whole.named_parameters():
        for rank in ranks:
            assert rank[name].stop_gradient == parameter.stop_gradient
            pieces = share_of(rank[name]).pieces() if name in split else [(..., ...)]
            for piece, place in pieces:
                np.testing.assert_array_equal(rank[name].numpy()[place], parameter.numpy()[piece], err_msg=name)


@pytest.mark.parametrize("vision", ["false", "true"])
def test_stage_2_splits_the_language_model_and_where_asked_the_encoder(loader, trained, vision):
    words = [f"model.weights={trained}/pretrain_stage2/checkpoint", f"parallelism.tp_vision={vision}"]
    first, second, whole = (loader(*rank, *words).stage2(new_projection=False)[0] for rank in ((0, 2), (1, 2), (0, 1)))
    assert_split([first, second], whole, ["language", "vision"] if vision == "true" else ["language"])


def test_stage_1_has_no_more_than_the_encoder_to_split(loader, trained):
    words = [f"model.weights={trained}/pretrain_stage1/checkpoint", "parallelism.tp_vision=true"]
    assert_split(*([[loader(1, 2, *words).stage1()[0]], loader(0, 1, *words).stage1()[0]]), ["vision"])
    assert_split([loader(1, 2, words[0]).stage1()[0]], loader(0, 1, words[0]).stage1()[0], [])


def test_a_language_model_that_is_fitted_is_whole(loader, trained):
    language, _ = loader(1, 2, f"model.language.weights={trained}/pretrain_language/checkpoint").language()
    assert not any(share_of(parameter) for parameter in language.parameters())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.language.frozen=false"], r"^parallelism\.tp=2 splits frozen models only, and model\.language\.frozen=false"),
        (["model.vision.frozen=false", "parallelism.tp_vision=true"], "set parallelism.tp_vision=false"),
        (["model.language.num_heads=3"], r"^model\.language\.num_heads=3 cannot be shared evenly by parallelism\.tp=2 ranks"),
    ],
)
def test_a_split_that_is_not_possible_is_told_before_weights_are_looked_for(loader, words, sentence):
    with pytest.raises(UserError, match=sentence):
        loader(0, 2, *words).stage2(new_projection=False)


def test_an_encoder_that_is_trained_may_stand_before_a_split_language_model(loader, trained):
    words = [f"model.{part}.weights={trained}/pretrain_{part}/checkpoint" for part in ("vision", "language")]
    words += [f"model.weights={trained}/pretrain_stage1/checkpoint", "model.vision.frozen=false"]
    model, _ = loader(0, 2, *words).stage2(new_projection=True)
    assert not any(share_of(parameter) for parameter in model.vision.parameters())
    assert any(share_of(parameter) for parameter in model.language.parameters())
