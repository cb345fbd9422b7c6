import numpy as np
import paddle

from blip2x.engine.batches import batch_size, to_tensors


def test_arrays_become_tensors_of_their_type_and_the_rest_stays():
    batch = {"ids_BL": np.array([[1, 2], [3, 4], [5, 6]]), "weight_B": np.ones(3, "float32"), "captions": ["a", "b", "c"]}
    tensors = to_tensors(batch)
    assert (tensors["ids_BL"].dtype, tensors["weight_B"].dtype) == (paddle.int64, paddle.float32)
    assert tensors["ids_BL"].tolist() == [[1, 2], [3, 4], [5, 6]] and tensors["captions"] is batch["captions"]


def test_size_is_that_of_the_first_axis():
    assert batch_size({"x": np.zeros((3, 2))}) == batch_size({"x": paddle.zeros([3, 2])}) == batch_size({"x": ["a"] * 3}) == 3
