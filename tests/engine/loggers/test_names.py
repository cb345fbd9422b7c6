"""Which value of a metric is its best."""

from __future__ import annotations

import pytest

from blip2x.engine.loggers._names import best_value, flat


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (("CIDEr", "BLEU-4", "METEOR", "ROUGE_L", "SPICE", "held_out/CIDEr", "blind_CIDEr"), "max"),
        (("accuracy", "accuracy/spatial colour", "itm_accuracy", "eval_itm_accuracy", "digit_accuracy"), "max"),
        (("i2t_recall@1", "seen/t2i_recall@10", "r_mean", "itc_r_mean"), "max"),
        (("loss", "eval_loss", "blind_eval_loss", "itc", "itm", "lm", "perplexity"), "min"),
        (("lr", "lr/projection", "grad_norm", "loss_scale", "temperature", "seconds", "memory_gb", "chance"), None),
    ],
)
def test_best_value(names, best):
    assert {name: best_value(name) for name in names} == dict.fromkeys(names, best)


def test_flat():
    assert flat({"a": {"b": {"c": 1}}, "d": 2}, "r/") == {"r/a/b/c": 1, "r/d": 2}
