"""Rows that survive a kill: whole ones come back, half ones do not, and what is appended behind these stays whole."""

from __future__ import annotations

from dataclasses import replace

from blip2x.parallel.context import Context, TensorGroup
from blip2x.tasks.common.parts import Parts


def test_rows_of_all_ranks_come_back_but_for_half_ones(run):
    run.goes_on = True
    assert Parts(run).read() == []
    Parts(run).add([{"n": 1}, {"n": 2, "text": "zwölf\u2028\n"}])
    path = run.folder / "partial/0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"n": 3, "te')
    Parts(run).add([{"n": 4}])
    run.context = replace(run.context, rank=1, world_size=2)
    Parts(run).add([{"n": 5}])
    run.context = Context()
    assert [row["n"] for row in Parts(run).read()] == [1, 2, 4, 5] and Parts(run).read()[1]["text"] == "zwölf\u2028\n"
    run.goes_on = False
    assert Parts(run).read() == []
    Parts(run).remove()
    assert not path.parent.exists()


def test_one_of_the_ranks_that_have_the_same_rows_keeps_them(run):
    run.context = Context(rank=1, world_size=2, tensor=TensorGroup(1, 2))
    Parts(run).add([{"n": 1}])
    assert not list(run.folder.iterdir())
