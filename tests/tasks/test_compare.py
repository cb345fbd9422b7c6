"""The comparison as a command: where it writes, and what it refuses."""

from __future__ import annotations

import json

import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.tasks.common import launch as launch_module
from blip2x.tasks.common.launch import launch


def test_it_writes_into_its_own_folder_and_beside_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_module, "write_report", lambda folder: folder)  # other tests read it
    runs = tmp_path / "sweep"
    for name, score in (("a", 1.0), ("b", 2.0)):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.yaml").write_text(f"task:\n  kind: caption\noptim:\n  lr: {score}\n")
        (runs / name / "results.json").write_text(json.dumps({"caption": {"CIDEr": score}, "seconds": 1.0}))
    words = ["task=compare", f"runs={runs}", f"paths.outputs={tmp_path}", "run_name=found"]
    results = launch(compose_config(words), words)
    assert results["compare"] == {"runs": 2, "complete": 2}
    for folder in (tmp_path / "found", runs):
        assert json.loads((folder / "comparison.json").read_text())["best"] == {"caption/CIDEr": ["b"]}
        assert (folder / "comparison.html").is_file() and (folder / "comparison.csv").is_file()
    # a comparison is not compared itself; of a list no folder is the one for a copy
    words = ["task=compare", f"runs=[{tmp_path},{runs}/a]", f"paths.outputs={tmp_path}", "run_name=again"]
    assert launch(compose_config(words), words)["compare"]["runs"] == 2
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=compare"], "task=compare needs runs: a folder of runs"),
        (["task=compare", "runs=[]"], "task=compare needs runs"),
        (["task=caption", "runs=outputs"], "runs=outputs is what task=compare looks at; task=caption takes none"),
    ],
)
def test_runs_belong_to_a_comparison(words, message):
    with pytest.raises(UserError, match=message):
        compose_config(words)


def test_a_folder_without_runs_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"no run in {tmp_path}/empty"):
        launch(compose_config(["task=compare", f"runs={tmp_path}/empty", f"paths.outputs={tmp_path}/out"]), ["run"])
    assert not (tmp_path / "out").exists()
