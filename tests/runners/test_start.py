"""The entry point's quick answers: no paddle for --help and --cfg, one sentence and code 2 for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_PADDLE = (
    "import sys; sys.modules['paddle'] = sys.modules['paddlenlp'] = None; import runpy; "  # an import of them would raise
)


def start(*words: str) -> subprocess.CompletedProcess:
    code = (
        f"{NO_PADDLE} sys.argv[:] = ['runners/run.py', *{list(words)!r}]; runpy.run_path('runners/run.py', run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["task=caption", "model=opt2.7b", "--cfg", "job"],
        ["--cfg", "job", "--resolve"],
        ["experiment=vqav2_zeroshot_opt2.7b", "--cfg", "job", "--resolve"],
    ],
)
def test_help_and_config_import_no_paddle(words):
    done = start(*words)
    assert done.returncode == 0, done.stderr
    assert "model" in done.stdout and done.stderr == ""


def test_a_terminal_that_knows_fewer_letters_is_no_error(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    done = start("task=caption", "run_name='\u4e00'", "--cfg", "job")
    assert done.returncode == 0 and "run_name: ?\n" in done.stdout


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("task.num_beems=3", "num_beems"),
        ("optim.beta2=2", "optim.beta2 must be at least 0 and below 1"),
        ("model=opt3b", "opt3b"),
        ("dataset.kind=x", "'x'"),
    ],
)
def test_mistake_is_told_before_paddle_is_imported(word, sentence):
    done = start(word)
    assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_repeat_is_composed_from_its_folder_without_paddle(tmp_path):
    folder = tmp_path / "lr=1,2"
    folder.mkdir()
    (folder / "config.yaml").write_text(start("task=caption", "seed=5", "--cfg", "job", "--resolve").stdout)
    done = start(f"run={folder}", "task.num_beams=7", "--cfg", "job")
    assert done.returncode == 0 and done.stderr == ""
    assert "kind: caption\n  num_beams: 7\n" in done.stdout and "seed: 5\n" in done.stdout
    wrong = start(f"run={tmp_path}/nowhere")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: run=") and "there is no such folder" in wrong.stderr
