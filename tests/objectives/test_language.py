"""The language objective: what is predicted from what, counted by hand on models that record their inputs."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.models.places import at_places
from blip2x.objectives.language import LanguageObjective

IDS = paddle.to_tensor([[2, 5, 6, 7, 3], [2, 8, 3, 1, 1]])
MASK = paddle.to_tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LENGTHS = [5, 3]


class Recorder(nn.Layer):
    """Answers with random logits of 11 tokens and keeps what it was asked."""

    start_id = 9

    def __init__(self, is_encoder_decoder: bool):
        super().__init__()
        self.is_encoder_decoder = is_encoder_decoder

    def embed(self, ids):
        return ids.astype("float32").unsqueeze(-1)

    def forward(self, *inputs):
        *inputs, place = inputs
        self.inputs = [tensor.numpy() for tensor in inputs]
        self.logits = paddle.randn([*inputs[-1].shape, 11])
        return at_places(self.logits, place)

    def cross_entropy(self, row: int, place: int, token: int) -> float:
        values = self.logits.numpy()[row, place].astype("float64")
        return np.log(np.exp(values).sum()) - values[token]


def test_each_token_is_predicted_from_the_ones_before_it():
    model = Recorder(is_encoder_decoder=False)
    loss = LanguageObjective(model)({"text_ids_BL": IDS, "text_mask_BL": MASK})["loss"]
    expected = [model.cross_entropy(b, place - 1, int(IDS[b, place])) for b in range(2) for place in range(1, LENGTHS[b])]
    assert float(loss) == pytest.approx(np.mean(expected), abs=1e-6)
    # Not shifted, as PaddleNLP's own OPT loss: the model would only learn to repeat its input.
    repeated = [model.cross_entropy(b, place, int(IDS[b, place])) for b in range(2) for place in range(LENGTHS[b])]
    assert abs(float(loss) - np.mean(repeated)) > 0.01


def test_encoder_decoder_reads_the_input_and_writes_the_output():
    model = Recorder(is_encoder_decoder=True)
    outputs = {"output_ids_BT": paddle.to_tensor([[7, 1], [1, 0]]), "output_mask_BT": paddle.to_tensor([[1, 1], [1, 0]])}
    loss = LanguageObjective(model)({"input_ids_BL": IDS, "input_mask_BL": MASK, **outputs})["loss"]
    embeds, mask, decoder_ids, decoder_mask = model.inputs
    np.testing.assert_array_equal(embeds[..., 0], IDS.numpy())
    np.testing.assert_array_equal(mask, MASK.numpy())
    assert decoder_ids.tolist() == [[9, 7], [9, 1]] and decoder_mask.tolist() == [[1, 1], [1, 1]]
    targets = [(0, 0, 7), (0, 1, 1), (1, 0, 1)]
    assert float(loss) == pytest.approx(np.mean([model.cross_entropy(*target) for target in targets]), abs=1e-6)
