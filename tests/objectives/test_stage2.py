"""Stage 2: which token is predicted by which position, counted by hand on a language model that records its inputs."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.models.places import at_places
from blip2x.objectives.stage2 import Stage2Objective

QUERIES, VOCABULARY = 3, 11


class Language(nn.Layer):
    start_id = 0

    def __init__(self, is_encoder_decoder: bool):
        super().__init__()
        self.is_encoder_decoder = is_encoder_decoder

    def embed(self, ids):
        return ids.astype("float32").unsqueeze(-1)

    def forward(self, *inputs):
        *inputs, place = inputs
        self.inputs = [tensor.numpy() for tensor in inputs]
        # depends on the embeddings, so that the loss has a gradient to the queries
        self.logits = paddle.randn([*inputs[-1].shape, VOCABULARY]) + 0.1 * inputs[0].sum(axis=1, keepdim=True)
        return at_places(self.logits, place)

    def cross_entropy(self, row: int, place: int, token: int) -> float:
        values = self.logits.numpy()[row, place].astype("float64")
        return np.log(np.exp(values).sum()) - values[token]


class Model(nn.Layer):
    def __init__(self, is_encoder_decoder: bool):
        super().__init__()
        self.language = Language(is_encoder_decoder)
        self.query_1QD = self.create_parameter([1, QUERIES, 1], default_initializer=nn.initializer.Constant(-7.0))

    def encoded(self, batch):
        return batch["image_BCHW"]

    def soft_prompt(self, encoded_BCHW):
        return self.query_1QD.expand([encoded_BCHW.shape[0], -1, -1])


def opt_batch(ids: list[list[int]], mask: list[list[int]], label_mask: list[list[int]]) -> dict[str, paddle.Tensor]:
    texts = {"text_ids_BL": ids, "text_mask_BL": mask, "label_mask_BL": label_mask}
    return {"image_BCHW": paddle.zeros([len(ids), 3, 2, 2]), **{name: paddle.to_tensor(rows) for name, rows in texts.items()}}


# </s>=2, pad=1, newline=10; [</s> prompt 5 6, caption 7 8, newline] and [</s> prompt 5 6, caption 9, newline, pad]
PROMPTED = opt_batch(
    [[2, 5, 6, 7, 8, 10], [2, 5, 6, 9, 10, 1]],
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]],
    [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]],
)


def opt_loss(batch, rows) -> tuple[float, Language]:
    model = Model(is_encoder_decoder=False)
    loss = Stage2Objective(model)({name: tensor[rows] for name, tensor in batch.items()})["loss"]
    return float(loss), model.language


def test_opt_reads_queries_and_then_the_text():
    _, language = opt_loss(PROMPTED, slice(0, 2))
    embeds, mask = language.inputs
    np.testing.assert_array_equal(embeds[:, :QUERIES, 0], -7)
    np.testing.assert_array_equal(embeds[:, QUERIES:, 0], PROMPTED["text_ids_BL"].numpy())
    assert mask.tolist() == [[1] * 9, [1] * 8 + [0]]


@pytest.mark.parametrize("rows", [slice(0, 2), slice(0, 1), slice(1, 2)])
def test_opt_predicts_caption_and_newline_only_each_from_the_position_before(rows):
    found, language = opt_loss(PROMPTED, rows)
    targets = [[(2, 7), (3, 8), (4, 10)], [(2, 9), (3, 10)]][rows]  # (text position that predicts, token)
    expected = [language.cross_entropy(b, QUERIES + at, token) for b, row in enumerate(targets) for at, token in row]
    assert found == pytest.approx(np.mean(expected), abs=1e-6)


def test_opt_prompt_and_pads_do_not_matter_as_targets():
    """A loss over the whole text would train on the prompt, one over all positions would be diluted by the masked ones."""
    found, language = opt_loss(PROMPTED, slice(0, 1))
    ids = PROMPTED["text_ids_BL"].numpy()[0]
    whole = [language.cross_entropy(0, QUERIES + at - 1, int(ids[at])) for at in range(6)]
    assert abs(found - np.mean(whole)) > 0.01
    assert found == pytest.approx(sum(whole[3:]) / 3, abs=1e-6) and found != pytest.approx(sum(whole[3:]) / 6, abs=1e-3)


def test_opt_first_target_without_any_text_before_it_comes_from_the_last_query():
    found, language = opt_loss(opt_batch([[7]], [[1]], [[1]]), slice(0, 1))
    assert found == pytest.approx(language.cross_entropy(0, QUERIES - 1, 7), abs=1e-6)


def test_t5_encodes_queries_and_prefix_and_decodes_the_rest():
    model, ids, mask = Model(is_encoder_decoder=True), [[5, 6], [5, 0]], [[1, 1], [1, 0]]
    batch = {
        "image_BCHW": paddle.zeros([2, 3, 2, 2]),
        "input_ids_BL": paddle.to_tensor(ids),
        "input_mask_BL": paddle.to_tensor(mask),
        "output_ids_BT": paddle.to_tensor([[7, 8, 1], [9, 1, 0]]),
        "output_mask_BT": paddle.to_tensor([[1, 1, 1], [1, 1, 0]]),
    }
    loss = Stage2Objective(model)(batch)["loss"]
    embeds, encoder_mask, decoder_ids, decoder_mask = model.language.inputs
    assert embeds[..., 0].tolist() == [[-7.0] * QUERIES + row for row in ids]
    assert encoder_mask.tolist() == [[1] * QUERIES + row for row in mask]
    assert decoder_ids.tolist() == [[0, 7, 8], [0, 9, 1]]
    assert decoder_mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    targets = [(0, 0, 7), (0, 1, 8), (0, 2, 1), (1, 0, 9), (1, 1, 1)]
    assert float(loss) == pytest.approx(np.mean([model.language.cross_entropy(*target) for target in targets]), abs=1e-6)


def test_opt_without_queries_predicts_from_the_text_alone():
    """The first token is no target then: nothing stands before it."""
    model, ids = Model(is_encoder_decoder=False), [[2, 5, 7, 10], [2, 9, 10, 1]]
    batch = opt_batch(ids, [[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]])
    loss = Stage2Objective(model).text_loss(None, batch)
    embeds, mask = model.language.inputs
    assert embeds[..., 0].tolist() == ids and mask.tolist() == batch["text_mask_BL"].tolist()
    targets = [(0, 0, 5), (0, 1, 7), (0, 2, 10), (1, 0, 9), (1, 1, 10)]  # (row, position that predicts, token)
    assert float(loss) == pytest.approx(np.mean([model.language.cross_entropy(*target) for target in targets]), abs=1e-6)
