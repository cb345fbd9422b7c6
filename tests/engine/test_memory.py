import numpy as np

from blip2x.engine.memory import peak_memory_mib


def test_peak_is_in_mebibytes_and_stays_when_memory_is_given_back():
    before = peak_memory_mib()
    block = np.ones(64 * 2**20 // 8)
    used = peak_memory_mib()
    del block
    assert 10 < before < 1e6 and before <= used <= peak_memory_mib() < before + 200
