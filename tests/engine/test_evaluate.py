import numpy as np

from blip2x.engine.evaluate import track


def test_batches_pass_unchanged_and_their_samples_are_counted(run, console):
    batches = [{"x": np.zeros((3, 1))}, ["a", "b"]]
    assert list(track(run, batches, "captions", total=2)) == batches
    assert "captions 2/2" in console.file.getvalue()
