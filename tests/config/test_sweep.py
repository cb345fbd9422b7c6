"""Where the jobs of a sweep go, and how they are called."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from blip2x.config import sweep
from blip2x.config.auto import CONF_FOLDER
from blip2x.errors import UserError


@pytest.fixture
def swept(monkeypatch):
    monkeypatch.setattr(sweep, "in_sweep", lambda: True)
    monkeypatch.setattr(sweep, "_names", {})


@pytest.fixture
def begin(monkeypatch):
    """`begin(*words)`: the sweep of ``-m words`` is about to start; its folder, and a function that makes a job of words."""
    with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

        def begun(*words: str):
            config = loader.load_configuration("config", [*words, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
            folder = sweep.begin_sweep(config)

            def job(*words: str) -> str:
                HydraConfig.instance().set_config(loader.load_sweep_config(config, list(words)))
                assert sweep.in_sweep() and sweep.sweep_folder() == folder
                return sweep.job_name()

            return folder, job, config

        yield begun


def test_a_single_run_is_no_sweep():
    assert not sweep.in_sweep()
    assert sweep.job_command(["run.py", "-m"]) == ["run.py", "-m"]
    for _ in range(2):
        sweep.claim_run_name("x")


def test_two_jobs_of_one_name(swept, monkeypatch):
    """But a search may ask for a job twice."""
    sweep.claim_run_name(None)
    sweep.claim_run_name(None)
    monkeypatch.setattr(sweep, "job_name", lambda: "seed=1")
    sweep.claim_run_name("a")
    sweep.claim_run_name("b")
    sweep.claim_run_name("a")
    monkeypatch.setattr(sweep, "job_name", lambda: "seed=2")
    with pytest.raises(UserError, match="run_name=a is the name of an earlier job"):
        sweep.claim_run_name("a")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["optim.lr=1e-4", "seed=2"], r"optim\.lr=1e-4,seed=2"),
        ([], "job"),
        (["task.prompt='Question: {} Answer:'"], r"task\.prompt=Question_Answer-[0-9a-f]{6}"),
        (["model.weights=/a/../b/c.pth"], r"model\.weights=a_\.\._b_c\.pth-[0-9a-f]{6}"),
        (["task.stages=[" + "x" * 300 + "]"], r"task\.stages=x{87,88}-[0-9a-f]{6}"),
    ],
)
def test_folder_names(words, name):
    assert re.fullmatch(name, sweep.folder_name(words)) and len(sweep.folder_name(words)) <= 107


def test_folder_names_are_told_apart():
    """By what had to go, too; and they are the same in another process, which hash() would not give."""
    prompts = ["task.prompt='a?'", "task.prompt='a!'", "task.prompt='?'", "task.prompt=..", "task.prompt=a"]
    assert len({sweep.folder_name([prompt]) for prompt in prompts}) == len(prompts)
    assert sweep.folder_name(["task.prompt='a?'"]) == "task.prompt=a-3f400c"


def test_jobs_are_called_by_what_differs(begin):
    folder, job, _ = begin("task=caption", "seed=1,2", "optim.lr=1e-4,1e-3", "sweep=mine", "paths.outputs=o")
    assert folder == Path("o/sweeps/mine")
    words = ["task=caption", "seed=2", "optim.lr=1e-4", "sweep=mine", "paths.outputs=o"]
    assert job(*reversed(words)) == job(*words) == "optim.lr=1e-4,seed=2"
    assert sweep.job_command(["run.py", "-m"]) == ["run.py", *words[:3], words[4]]  # alone, it is no sweep's
    assert sweep.launcher() == "basic" and not sweep.is_search()
    job(*words[:3], "resume=auto")
    assert sweep.job_command(["run.py", "-m"]) == ["run.py", *words[:3]]  # which has no run_name to go on with


def test_keys_of_an_experiment_differ_as_well(begin):
    _, job, _ = begin("experiment=sweep_temperature_queries", "seed=7", "sweep=x")
    assert job("model.temperature=0.03", "model.qformer.num_queries=4", "experiment=sweep_temperature_queries", "seed=7") == (
        "model.qformer.num_queries=4,model.temperature=0.03"
    )


def test_a_sweep_of_one_job_is_called_by_all_its_words(begin):
    _, job, _ = begin("seed=3", "sweep=x")
    assert job("seed=3", "sweep=x") == "seed=3"


def test_a_sweep_without_a_name_has_one_that_its_jobs_share(begin, monkeypatch):
    folder, job, _ = begin("dataset=digits", "model=tiny_opt,tiny_t5", "seed=1,2")
    assert re.fullmatch(r"pipeline-digits-\d{8}-\d{6}", folder.name)  # not of a model, in which the jobs differ
    monkeypatch.setattr(sweep.time, "strftime", lambda form: "later")
    job("model=tiny_t5", "seed=1")  # has the folder of the start
    folder, _, _ = begin("seed=1,2")
    assert folder.name == "pipeline-tiny_opt-digits-later"
    folder, _, _ = begin("experiment=digits_t5,null")
    assert folder.name == "experiment-later"


def test_one_run_name_for_all_jobs(begin):
    with pytest.raises(UserError, match=r"run_name=x would be .* e\.g\. \"run_name='x-\$\{seed\}'\""):
        begin("seed=1,2", "run_name=x")
    for words in (["seed=1,2", "run_name='x-${seed}'"], ["seed=1", "run_name=x"], ["run_name=x,y"]):
        begin(*words)


@pytest.mark.parametrize("name", ["a/b", "..", "''"])
def test_names_that_are_no_folder(begin, name):
    with pytest.raises(UserError, match="must be a plain folder name"):
        begin("seed=1,2", f"sweep={name}")


def test_a_search_needs_an_objective_and_has_the_seed(begin):
    with pytest.raises(UserError, match=r"set objective=STAGE\.METRIC"):
        begin("hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-2)")
    words = ["hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-2)", "objective=caption.CIDEr", "seed=5", "sweep=x"]
    _, job, config = begin(*words)
    assert config.hydra.sweeper.sampler.seed == 5
    assert job("optim.lr=0.005", "objective=caption.CIDEr", "seed=5") == "optim.lr=0.005"
    assert begin(*words, "hydra.sweeper.sampler.seed=6")[2].hydra.sweeper.sampler.seed == 6


def test_a_plugin_that_is_not_installed(monkeypatch):
    words = ["-m", "seed=1,2", "hydra/launcher=joblib"]
    sweep.require_plugins(words)
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    sweep.require_plugins(["-m", "seed=1,2", "hydra/launcher=basic", "experiment=digits_t5"])
    with pytest.raises(UserError, match=r"hydra/launcher=joblib needs hydra-joblib-launcher: pip install .*'\.\[sweeps\]'"):
        sweep.require_plugins(words)
    with pytest.raises(UserError, match="hydra/sweeper=optuna needs hydra-optuna-sweeper"):
        sweep.require_plugins(["experiment=search_lr_pruned"])


def test_submitit_composes(begin):
    """On Slurm each job is told the sweep's folder, which is where submitit's logs are as well."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    folder, job, config = begin("seed=1,2", "sweep=x", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=60")
    assert job("seed=1", "sweep=x") == "seed=1" and sweep.launcher() == "submitit_slurm"
    assert os.path.commonpath([config.hydra.launcher.submitit_folder, folder]) == str(folder)
    assert sweep.job_command(["/site-packages/submitit/core/_submit.py"])[0] == "runners/run.py"
