import json
import random

import numpy as np
import paddle

from blip2x.engine.random_state import random_state, set_random_state, unchanged_random_state


def draw():
    return random.random(), float(np.random.rand()), float(np.random.normal()), paddle.rand([3]).tolist()


def test_all_three_generators_go_on_from_a_state_that_json_held():
    draw()
    state = json.loads(json.dumps(random_state()))
    wanted = [draw() for _ in range(3)]
    draw()
    set_random_state(state)
    assert [draw() for _ in range(3)] == wanted


def test_a_block_may_draw_and_leave_no_trace():
    before = random_state()
    wanted = draw()
    set_random_state(before)
    with unchanged_random_state():
        draw()
    assert draw() == wanted
