"""Stage 2 on real language models: training and decoding mean the same, and queries learn to steer a frozen reader."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.models.freeze import freeze, set_train_mode
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.objectives.language import LanguageObjective
from blip2x.objectives.stage2 import Stage2Objective

TEXTS = [[2, 5, 6, 7, 10], [2, 8, 9, 5, 10]]  # </s>, three words, newline
OPENINGS = [[3, 3], [4, 4]]  # stand where the queries will and say what follows


class Bridge(nn.Layer):
    """Two queries from an "image" of two numbers, at first the same for every image."""

    def __init__(self, language: nn.Layer):
        super().__init__()
        self.language = language
        self.projection = nn.Linear(2, 2 * language.width, weight_attr=nn.initializer.Constant(0.0))

    def encoded(self, batch):
        return batch["image_BCHW"]

    def soft_prompt(self, encoded_BCHW):
        return self.projection(encoded_BCHW[:, 0, 0]).reshape([-1, 2, self.language.width])


def opt() -> OptLanguageModel:
    return OptLanguageModel(width=16, depth=1, num_heads=2, mlp_width=32, vocab_size=11, max_positions=16, dropout=0.0)


def t5() -> T5LanguageModel:
    sizes = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "head_width": 8, "mlp_width": 32}
    relative = {"relative_buckets": 8, "relative_max_distance": 16}
    return T5LanguageModel(**sizes, **relative, vocab_size=11, exact_gelu=True, dropout=0.0)


def train(objective: nn.Layer, batch: dict[str, paddle.Tensor], *, lr: float, steps: int) -> list[float]:
    trained = [parameter for parameter in objective.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.Adam(lr, parameters=trained)
    losses = []
    set_train_mode(objective)
    for _ in range(steps):
        loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    return losses


def continuation(language: nn.Layer, embeds: paddle.Tensor, steps: int) -> list[list[int]]:
    tokens = []
    for _ in range(steps):
        logits = language(embeds, paddle.ones(embeds.shape[:2], dtype="int64"))
        token = logits[:, -1].argmax(axis=-1)
        tokens.append(token.numpy())
        embeds = paddle.concat([embeds, language.embed(token.unsqueeze(1))], axis=1)
    return np.stack(tokens, axis=1).tolist()


@pytest.mark.parametrize("build", [opt, t5])
@paddle.no_grad()
def test_loss_is_what_decoding_token_by_token_gives(build):
    paddle.seed(0)
    model = Bridge(build())
    model.eval()
    model.projection.weight.set_value(paddle.randn(model.projection.weight.shape))
    image, given, caption = paddle.to_tensor([[[[0.3, -0.8]]]]), [2, 5], [6, 7, 1]
    prefix = paddle.concat([model.soft_prompt(image), model.language.embed(paddle.to_tensor([given]))], axis=1)
    logits, state = model.language.prefill((prefix, paddle.ones([1, 4], dtype="int64")))
    expected = []
    for token in caption:
        expected.append(-float(nn.functional.log_softmax(logits, axis=-1)[0, token]))
        logits, state = model.language.step(paddle.to_tensor([token]), state)

    texts = {"input_ids_BL": given, "output_ids_BT": caption, "text_ids_BL": given + caption, "label_mask_BL": [0, 0, 1, 1, 1]}
    masks = {"input_mask_BL": [1] * 2, "output_mask_BT": [1] * 3, "text_mask_BL": [1] * 5}
    batch = {name: paddle.to_tensor([row]) for name, row in {**texts, **masks}.items()}
    loss = Stage2Objective(model)({"image_BCHW": image, **batch})["loss"]
    assert float(loss) == pytest.approx(np.mean(expected), abs=1e-5)


def test_frozen_reader_writes_the_caption_that_the_queries_call_for():
    paddle.seed(0)
    language = opt()
    documents = paddle.to_tensor([opening + text for opening, text in zip(OPENINGS, TEXTS, strict=True)])
    texts = {"text_ids_BL": documents, "text_mask_BL": paddle.ones_like(documents)}
    train(LanguageObjective(language), texts, lr=0.01, steps=150)
    with paddle.no_grad():  # a loss without a shift would teach it to repeat the last token
        assert continuation(language, language.embed(documents[:, :3]), 4) == [text[1:] for text in TEXTS]

    freeze(language)
    before = {name: value.numpy().copy() for name, value in language.state_dict().items()}
    objective = Stage2Objective(Bridge(language))
    images, ids = paddle.to_tensor([[1.0, 0.0], [0.0, 1.0]]).reshape([2, 1, 1, 2]), paddle.to_tensor(TEXTS)
    label_mask = paddle.to_tensor([[0, 1, 1, 1, 1]] * 2)
    batch = {"image_BCHW": images, "text_ids_BL": ids, "text_mask_BL": paddle.ones_like(ids), "label_mask_BL": label_mask}
    losses = train(objective, batch, lr=0.03, steps=100)
    assert losses[-1] < 0.1 < losses[0]  # log(2) / 4 = 0.17 is the best without telling the images apart
    with paddle.no_grad():
        start = paddle.concat([objective.model.soft_prompt(images), language.embed(ids[:, :1])], axis=1)
        assert continuation(language, start, 4) == [text[1:] for text in TEXTS]
    for name, value in language.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name], err_msg=name)
