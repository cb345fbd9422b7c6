from __future__ import annotations

from blip2x.tasks.common.train import note_samples


def test_going_on_with_other_samples_is_told(run):
    note_samples(run, 5)
    run.goes_on = True
    note_samples(run, 5)
    assert run.console.file.getvalue() == ""
    for _ in range(2):  # each time, until there are as many as at the beginning
        note_samples(run, 4)
    assert run.console.file.getvalue().count("this run began with 5 samples, and now there are 4") == 2
