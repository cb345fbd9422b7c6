"""What stage 1's validation gives: the same on any number of ranks, each image encoded once, hard pairs judged rightly."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.data.samples import CaptionSample
from blip2x.data.tokenize import train_tokenizer
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.freeze import set_eval_mode
from blip2x.models.weights.describe import follow_source
from blip2x.tasks.common import retrieval
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.loading import eval_transform
from blip2x.tasks.common.retrieval import Stage1Validation

IMAGES = 7


@pytest.fixture(scope="module")
def parts(small):
    """`parts(*overrides)` -> config, a model that learned nothing, its tokenizer and seven samples."""

    def build(*overrides):
        # captions hear of the image from the second layer on
        words = [
            "task=pretrain_stage1",
            *small,
            "model.qformer.depth=2",
            f"dataset.test_scenes={IMAGES}",
            "task.eval_batch_size=2",
            *overrides,
        ]
        cfg = compose_config(words)
        cfg.model = follow_source(cfg.model, None)
        samples = build_source(cfg).captions("eval")
        tokenizer = train_tokenizer([text for sample in samples for text in sample.captions], "bert")
        paddle.seed(0)
        model = build_stage1(cfg.model, vocab_size=tokenizer.vocab_size)
        for parameter in model.parameters():
            if parameter.ndim == 2:  # the usual start is so small that all pictures would get the same text
                parameter.set_value(5 * parameter)
        set_eval_mode(model)
        return cfg, model, tokenizer, samples

    return build


def test_any_number_of_ranks_finds_the_same_and_encodes_each_image_once(parts, over_ranks, encoded, monkeypatch):
    scored = []
    monkeypatch.setattr(retrieval, "validation_scores", lambda run, samples, texts, names: scored.append(texts) or {"CIDEr": 1})
    cfg, model, tokenizer, samples = parts("task.validation.max_images=5")

    def work(run):
        return Stage1Validation(cfg, run, model, tokenizer, samples)()

    (alone,) = over_ranks(1, work)
    assert encoded == [2, 2, 2, 1] and len(set(scored[0])) > 1 and len(scored[0]) == 5
    assert {name for name in alone if "/" not in name} - {"CIDEr"} == Stage1Validation.names(cfg.task) - {"CIDEr", "ROUGE_L"}
    assert "held_out/i2t_recall@1" in alone and alone["chance"] == pytest.approx(1 / IMAGES)
    for ranks, tensor in ((3, 1), (8, 1), (4, 2)):
        encoded.clear(), scored.clear()
        for found in over_ranks(ranks, work, tensor):
            assert found == pytest.approx(alone)
        assert sum(encoded) == IMAGES * tensor
        assert len(scored) == ranks


def test_matching_is_judged_on_the_hardest_pairs(parts, run):
    """Against each pair by itself, chosen from similarities of one batch; captions are of the first images only."""
    cfg, model, tokenizer, samples = parts("task.validation.captions=false", "task.validation.max_images=4")
    found = Stage1Validation(cfg, run, model, tokenizer, samples)()
    assert "CIDEr" not in found and found["eval_temperature"] == pytest.approx(0.07)

    samples = samples[:4]
    texts = [text for sample in samples for text in sample.captions]
    owner = np.array([number for number, sample in enumerate(samples) for _ in sample.captions])
    first = [int(np.flatnonzero(owner == number)[0]) for number in range(4)]
    with paddle.no_grad():
        images = paddle.to_tensor(np.stack([eval_transform(cfg)(sample.image.open()) for sample in samples]))
        patch, _, image, _ = model.image_features(images)
        ids, mask = map(paddle.to_tensor, tokenizer.encode(texts, max_length=cfg.task.max_txt_len))
        score = np.einsum("nqe,me->nmq", image.numpy(), model.text_features(ids, mask).numpy()).max(axis=-1)
        score[np.arange(4)[:, None] == owner] = -np.inf
        pairs = [(n, first[n], 1) for n in range(4)] + [(n, int(score[n].argmax()), 0) for n in range(4)]
        pairs += [(int(score[:, first[n]].argmax()), first[n], 0) for n in range(4)]
        right = [
            int(model.itm_logits(patch[n : n + 1], ids[m : m + 1], mask[m : m + 1]).argmax()) == match for n, m, match in pairs
        ]
    assert 0 < sum(right) < len(right)
    assert found["eval_itm_accuracy"] == pytest.approx(np.mean(right))
    assert found["majority_eval_itm_accuracy"] == pytest.approx(2 / 3)  # of these pairs 4 match and 8 do not


def test_what_is_not_trained_is_not_measured(parts, run, monkeypatch):
    cfg, model, tokenizer, samples = parts("task.itm_weight=0", "task.lm_weight=0")
    monkeypatch.setattr(model, "itm_logits", None)
    monkeypatch.setattr(retrieval, "captions_behind", None)
    found = Stage1Validation(cfg, run, model, tokenizer, samples)()
    assert {name for name in found if "/" not in name} == Stage1Validation.names(cfg.task)


def test_retrieval_is_validated_on_texts_as_they_are_searched():
    sample = CaptionSample(None, ("A Red two!", "blue."), 0)
    for words, expected in (
        (["task=retrieval", "task.clean_texts=true"], ["a red two", "blue"]),
        (["task=retrieval", "task.clean_texts=false"], ["A Red two!", "blue."]),
        (["task=pretrain_stage1"], ["A Red two!", "blue."]),
    ):
        assert retrieval.searched_texts(compose_config(words).task, [sample]) == [expected]
