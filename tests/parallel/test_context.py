"""The single process: collectives are identities, and nothing of paddle.distributed starts."""

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.errors import UserError
from blip2x.parallel.context import Context, TensorGroup


def test_collectives_are_identities():
    context = Context()
    tensor = paddle.to_tensor([[1.0, 2.0]], stop_gradient=False)
    assert context.is_main
    assert context.all_gather(tensor).tolist() == [[1.0, 2.0]]
    assert context.all_gather(tensor).stop_gradient
    assert not context.all_gather_with_grad(tensor).stop_gradient
    assert context.mean(0.5) == 0.5
    assert context.total(tensor).tolist() == [[1.0, 2.0]]
    assert (context.any(True), context.any(False)) == (True, False)
    assert context.gather_objects("a") == ["a"]
    assert context.broadcast_object({"a": 1}) == {"a": 1}
    context.barrier()
    assert not paddle.distributed.is_initialized()


def test_wrap_gives_back_what_it_got():
    layer, optimizer = nn.Linear(1, 1), object()
    assert Context().wrap(layer, optimizer) == (layer, optimizer)


def test_on_main_runs_and_passes_errors_on():
    assert Context().on_main(lambda: 3) == 3
    with pytest.raises(UserError, match="no room"):
        Context().on_main(lambda: (_ for _ in ()).throw(UserError("no room")))


def test_grad_norm_is_the_norm_of_all_gradients_in_one_vector():
    layer = nn.Linear(3, 2)
    layer(paddle.ones([1, 3])).sum().backward()
    grads = np.concatenate([p.grad.numpy().ravel() for p in layer.parameters()])
    np.testing.assert_allclose(float(Context().grad_norm(layer, None, layer.parameters())), np.linalg.norm(grads), rtol=1e-6)


def test_grad_norm_without_gradients_is_none():
    layer = nn.Linear(3, 2)
    assert Context().grad_norm(layer, None, layer.parameters()) is None


@pytest.mark.parametrize(
    ("rank", "tp", "expected"), [(0, 1, (0, 4)), (3, 1, (3, 4)), (1, 2, (0, 2)), (2, 2, (1, 2)), (3, 4, (0, 1))]
)
def test_neighbours_in_a_tensor_group_are_one_data_rank(rank, tp, expected):
    context = Context(rank, 4, tensor=TensorGroup(rank % tp, tp))
    assert (context.data_rank, context.data_size) == expected
