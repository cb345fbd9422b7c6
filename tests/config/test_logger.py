"""The group ``logger``: one, several or none, each below its own key."""

from __future__ import annotations

import pytest

from blip2x.config.compose import compose_config
from blip2x.config.help import help_text
from blip2x.config.logger import TensorboardConfig, WandbConfig
from blip2x.errors import UserError


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], {}),
        (["logger=none"], {}),
        (["logger=wandb"], {"wandb": WandbConfig}),
        (["logger=tensorboard"], {"tensorboard": TensorboardConfig}),
        (["logger=[wandb,tensorboard]"], {"wandb": WandbConfig, "tensorboard": TensorboardConfig}),
        (["logger=[tensorboard,wandb_offline]"], {"wandb": WandbConfig, "tensorboard": TensorboardConfig}),
    ],
)
def test_choices(words, chosen):
    assert {name: type(cfg) for name, cfg in compose_config(words).logger.items()} == chosen


def test_keys_are_below_the_name_and_offline_is_a_mode():
    words = ["logger=[wandb_offline,tensorboard]", "logger.wandb.tags=[a,b]", "logger.tensorboard.rows=3"]
    loggers = compose_config(words).logger
    assert (loggers["wandb"].mode, loggers["wandb"].tags, loggers["tensorboard"].rows) == ("offline", ["a", "b"], 3)
    assert compose_config(["logger=wandb"]).logger["wandb"].mode == "auto"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["logger=wandbb"], "Available options in 'logger': none tensorboard wandb wandb_offline"),
        (["logger=[wandb,tensorbord]"], "'logger/tensorbord'"),
        (["logger=wandb", "logger.wandb.projct=x"], "Could not override 'logger.wandb.projct'"),
        (["logger=wandb", "logger.project=x"], "Could not override 'logger.project'"),
        (["logger.wandb.project=x"], "Could not override 'logger.wandb.project'"),
        (["logger=wandb", "logger.wandb.kind=x"], "unknown logger 'x'; known: tensorboard, wandb"),
    ],
)
def test_wrong_names_and_keys_are_named(words, said):
    with pytest.raises(UserError) as error:
        compose_config(words)
    assert said in str(error.value)


def test_stages_of_a_pipeline_compose_with_several():
    assert compose_config(["task=pipeline", "logger=[wandb,tensorboard]"]).task.overrides[1] == "logger=[wandb,tensorboard]"


def test_help_lists_them():
    (block,) = [block for block in help_text(120).split("\n\n") if block.startswith("logger=")]
    assert [line.split()[0] for line in block.splitlines()[2:]] == [
        "tensorboard", "wandb", "wandb_offline",
    ]  # fmt: skip
    assert block.splitlines()[1].startswith("  * none ")
