"""Where the queries look, against the formula in NumPy; a pass that is watched gives what it gives unwatched."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.models.qformer.attention import watch_queries

EXACT = 1e-6  # float32 shares, sums of a few numbers


def by_hand(attention, query_BQD, patch_BPD):
    def heads(layer, source):
        split = source @ layer.weight.numpy() + layer.bias.numpy()
        return split.reshape(*split.shape[:2], attention.num_heads, -1).transpose(0, 2, 1, 3)

    query, key = heads(attention.query, query_BQD), heads(attention.key, patch_BPD)
    score = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1])
    power = np.exp(score - score.max(axis=-1, keepdims=True))
    return (power / power.sum(axis=-1, keepdims=True)).mean(axis=1)


def test_shares_are_the_softmax_of_the_last_layer_that_looks(qformer, patches):
    read = []
    hook = qformer.layers[2].cross_attention.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0].numpy()))
    with paddle.no_grad(), watch_queries(qformer) as seen:
        qformer.encode_image(patches)
    hook.remove()
    (share,) = seen
    assert share.shape == [2, 3, 5]
    np.testing.assert_allclose(share.sum(axis=-1).numpy(), 1, atol=EXACT)
    expected = by_hand(qformer.layers[2].cross_attention, read[0], patches.numpy())
    np.testing.assert_allclose(share.numpy(), expected, atol=EXACT)
    assert np.ptp(expected, axis=(0, 1)).max() > 0.05  # images and queries differ, so that a mixed-up axis would show


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_watched_pass_is_the_same_and_afterwards_nothing_is_computed(qformer, patches, monkeypatch, ends):
    plain = qformer.encode_image(patches)[0].numpy()
    try:
        with watch_queries(qformer) as seen:
            np.testing.assert_array_equal(qformer.encode_image(patches)[0].numpy(), plain)
            if ends == "badly":
                raise KeyError
    except KeyError:
        pass
    calls, shares = [], type(qformer.layers[0].attention).shares
    monkeypatch.setattr(type(qformer.layers[0].attention), "shares", lambda *words: calls.append(words) or shares(*words))
    qformer.encode_image(patches)
    assert len(seen) == 1 and len(calls) == 3 + 2  # self-attentions and cross-attentions, each once


def test_a_question_changes_where_the_queries_look(qformer, patches):
    with paddle.no_grad(), watch_queries(qformer) as seen:
        for word in (3, 4):
            ids = paddle.to_tensor([[word, 5], [word, 5]])
            qformer.encode_pair(patches, ids, paddle.ones_like(ids))
    assert [share.shape for share in seen] == [[2, 3, 5]] * 2 and float((seen[0] - seen[1]).abs().max()) > 1e-3
