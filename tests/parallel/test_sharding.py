"""What stage 3 cuts; how sharded trainings come out is in tests/distributed."""

import paddle
import pytest
from paddle import nn

from blip2x.models.freeze import freeze
from blip2x.models.vision.clip_vit import ClipVit
from blip2x.models.vision.eva_vit import EvaVit
from blip2x.parallel.sharding import can_be_cut

SIZES = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "num_heads": 2, "mlp_width": 8, "drop_path_rate": 0.0}


def cut(layer):
    return {name for name, part in layer.named_sublayers(include_self=True) if can_be_cut(name, part)}


def test_trained_linear_layers_are_cut():
    layer = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    freeze(layer[3])
    assert cut(layer) == {"1"}


@pytest.mark.parametrize(("kind", "options"), [(EvaVit, {"key_bias": False}), (EvaVit, {"key_bias": True}), (ClipVit, {})])
def test_what_is_cut_of_an_image_encoder_is_called(kind, options):
    """A matrix is gathered when its layer is called, and at no other use of it."""
    model, called = kind(**SIZES, **options, recompute=False), set()
    for name, layer in model.named_sublayers():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: called.add(name))
    model(paddle.ones([1, 3, 8, 8]))
    assert cut(model) == {"blocks.0.attention.out", "blocks.0.fc1", "blocks.0.fc2"} & called
