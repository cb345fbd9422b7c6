"""Who decays: matrices, by the names that paddle asks about."""

import re

import paddle
from paddle import nn

from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.optim.groups import decay_names, trained_parameters


class Mixed(nn.Layer):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)
        self.queries = self.create_parameter([1, 4, 3])
        self.temp = self.create_parameter([1])
        self.scale = paddle.create_parameter([], "float32")
        self.frozen = nn.Linear(3, 3)
        for parameter in self.frozen.parameters():
            parameter.stop_gradient = True


def test_only_trained_matrices_decay():
    layer = Mixed()
    assert decay_names(layer) == {layer.linear.weight.name, layer.queries.name}


def test_frozen_parameters_are_not_trained_and_shared_ones_come_once():
    layer = Mixed()
    layer.tied = layer.linear
    names = [p.name for p in trained_parameters(layer)]
    assert len(names) == len(set(names)) == 7
    assert not {p.name for p in layer.frozen.parameters()} & set(names)


def test_kinds_of_a_whole_model():
    """By kind and not by name: spared are biases, the norms' weights and the temperature, and nothing else."""
    layer = build_stage1(compose_config(["model.vision.frozen=false"]).model, vocab_size=64)
    names = {p.name: name for name, p in layer.named_parameters()}
    decayed = {names[name] for name in decay_names(layer)}
    spared = {name for name in names.values() if re.search(r"bias$|norm\d?\.weight$|^ln_vision\.weight$|^temp$", name)}
    assert set(names.values()) - decayed == spared and "temp" in spared
    assert {"vision.embeddings.class_token", "vision.embeddings.positions", "qformer.query_tokens"} <= decayed
