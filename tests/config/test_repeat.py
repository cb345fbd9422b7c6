"""A run is repeated with what it was made of, whatever conf/ says now."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from blip2x.config.compose import CONF_FOLDER, compose_config, compose_dict, spelled
from blip2x.config.model import ModelConfig, T5Config
from blip2x.config.repeat import config_of, primary_config, read_config, repeated_run
from blip2x.config.run import RunConfig
from blip2x.errors import UserError


@pytest.fixture
def made(tmp_path):
    """`made(*overrides)` -> the folder of a run, and the config that it has written."""

    def make(*overrides, name="r"):
        cfg = compose_config([f"paths.outputs={tmp_path}", *overrides])
        (tmp_path / name).mkdir()
        text = OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True)
        (tmp_path / name / "config.yaml").write_text(text, encoding="utf-8")
        return tmp_path / name, cfg

    return make


def replace_in(folder, old, new):
    path = folder / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "words",
    [
        ["task=caption", "task.metrics=[CIDEr]", "optim.eps=1e-8"],
        ["task=pretrain_stage2", "model=flant5xl", "dataset=coco_vg", "parallelism=tp4", "precision=bf16"],
        ["task=vqa_zeroshot", "model=tiny_t5", "dataset=vqav2", "logger=wandb_offline", "model.language.activation=gelu_tanh"],
        ["task=predict", "task.inputs=[a.png,7]", "task.prompt='it\\'s: a'"],
    ],
    ids=lambda words: words[0],
)
def test_the_config_comes_back_whole(made, words):
    folder, cfg = made(*words)
    again = compose_config([f"run={folder}"])
    assert again.run == str(folder)
    again.run = None
    assert again == cfg and type(again.task) is type(cfg.task)


def test_single_keys_change_on_top_and_are_checked_as_ever(made):
    folder, _ = made("task=caption", "seed=5", "optim.lr=1e-3")
    cfg = compose_config([f"run={folder}", "seed=6", "task.num_beams=1"])
    assert (cfg.seed, cfg.task.num_beams, cfg.optim.lr) == (6, 1, 1e-3)
    for word, sentence in {
        "task.num_beems=1": "Could not override 'task.num_beems'",
        "task.num_beams=x": "task.num_beams=x",
        "task.num_beams=0": "task.num_beams must be at least 1",
    }.items():
        with pytest.raises(UserError, match=sentence):
            compose_config([f"run={folder}", word])


def test_options_say_where_it_runs_and_not_what_it_is(made):
    folder, _ = made("task=caption", "parallelism=tp4", "logger=wandb")
    cfg = compose_config([f"run={folder}", "parallelism=single", "logger=none", "paths=default"])
    plain = compose_config(["task=caption"])
    assert (cfg.parallelism, cfg.logger, cfg.paths) == (plain.parallelism, plain.logger, plain.paths)
    for word in ("model=opt2.7b", "task=caption", "model/vision=tiny_vit", "optim=adamw", "experiment=digits_t5"):
        with pytest.raises(UserError, match=f"repeated with its own .* so {word} cannot choose another"):
            compose_config([f"run={folder}", word])


def test_what_is_of_the_command_is_not_repeated(made):
    folder, _ = made("task=caption", "run_name=r", "resume=auto", "threads=3")
    cfg = compose_config([f"run={folder}"])
    assert (cfg.run_name, cfg.overwrite, cfg.resume, cfg.threads) == (None, False, "never", 3)
    replace_in(folder, "resume: auto\n", "resume: never\n")
    replace_in(folder, "overwrite: false", "overwrite: true")
    assert compose_config([f"run={folder}", "run_name=a"]).run_name == "a"
    assert compose_config([f"run={folder}"]).overwrite is False


def test_a_job_of_a_search_is_repeated_as_a_run(made):
    folder, _ = made("task=caption", "objective=caption.CIDEr", "objective_of_failed=0", "prune.metric=caption.loss")
    cfg = compose_config([f"run={folder}"])
    assert (cfg.objective, cfg.objective_of_failed, cfg.prune.metric) == (None, None, None)


def test_a_sweep_s_job_is_repeated_outside_of_its_sweep(made):
    folder, cfg = made("task=caption", "sweep=s", "paths.outputs=out/sweeps/s")
    again = compose_config([f"run={folder}"])
    assert cfg.sweep == "s" and (again.paths.outputs, again.sweep) == ("out", None)
    assert compose_config([f"run={folder}", "paths.outputs=x"]).paths.outputs == "x"


def test_a_word_of_an_option_is_no_group(made):
    folder, _ = made("task=caption")
    primary_config([f"run={folder}", "--cfg", "job", "--package", "optim"])
    with pytest.raises(UserError, match="so ~optim cannot choose another"):
        primary_config([f"run={folder}", "~optim"])


def test_several_runs_at_once_are_refused(made):
    folder, _ = made("task=caption")
    with pytest.raises(UserError, match=rf"run={folder},b: run= takes one run"):
        primary_config([f"run={folder},b", "-m"])


def test_files_move_with_their_folders(made, tmp_path):
    folder, _ = made("task=caption", "dataset=coco", "model.weights=weights/x", "paths.weights=weights", "paths.data=/d")
    cfg = compose_config([f"run={folder}", "paths.data=/e", "paths.weights=/w"])
    assert "/e/" in str(cfg.dataset) and "/d/" not in str(cfg.dataset) and cfg.model.weights == "/w/x"


def test_a_folder_s_own_kind_is_known_by_its_keys(made):
    """As the README's mean_vit and flags, which have a kind of their own and the keys of another."""
    folder, _ = made("task=caption", "model=tiny_t5")
    replace_in(folder, "kind: t5", "kind: my_t5")
    assert OmegaConf.get_type(compose_dict([f"run={folder}"]).model.language) is T5Config
    replace_in(folder, "head_width: ", "heads: ")
    with pytest.raises(UserError, match=r"does not know model\.language\.kind=my_t5"):
        compose_config([f"run={folder}"])


def test_an_automatic_model_is_not_guessed_again(made):
    folder, cfg = made("task=caption", "model.name=auto", "model.vision.depth=1")
    again = compose_config([f"run={folder}"]).model  # there are no weights that could say anything
    assert again == cfg.model and isinstance(again, ModelConfig)


def test_keys_of_other_versions(made):
    folder, cfg = made("task=caption")
    replace_in(folder, "overwrite: false\nresume: never\n", "")
    assert compose_config([f"run={folder}"]).resume == "never"  # a root key that came later is as in conf/config.yaml
    replace_in(folder, "  num_beams: ", "  beams: ")
    with pytest.raises(UserError, match=r"this version does not take its task\.beams"):
        compose_config([f"run={folder}"])
    replace_in(folder, f"  beams: {cfg.task.num_beams}\n", "")
    with pytest.raises(UserError, match=r"no value for task\.num_beams"):
        compose_config([f"run={folder}"])
    assert compose_config([f"run={folder}", "task.num_beams=2"]).task.num_beams == 2


def test_missing_and_damaged_folders_are_a_sentence(made, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: there is no such folder"):
        compose_config([f"run={tmp_path}/nowhere"])
    folder, _ = made()
    (folder / "caption").mkdir()
    with pytest.raises(
        UserError, match=f"caption has no config.yaml, so it is no run .*; to repeat the run it .*: run={folder}"
    ):
        compose_config([f"run={folder}/caption"])
    for text, reason in {"a: [": "damaged", "- x": "has no task", "seed: '${'": "damaged", "\0": "damaged"}.items():
        (folder / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=reason):
            compose_config([f"run={folder}"])


def test_a_pipeline_keeps_its_stages(made):
    folder, cfg = made("seed=3")
    again = compose_config([f"run={folder}", "seed=4"])
    assert again.task.stages == cfg.task.stages and again.task.overrides == [f"run={folder}", "seed=4"]
    with pytest.raises(UserError, match=r"repeats a pipeline with the stages that it had, so task\.stages=\[\] cannot be set"):
        compose_config([f"run={folder}", "task.stages=[]"])


@pytest.mark.parametrize("name", ["lr=1e-4,beams=2", "it's a run", "a b", "null"])
def test_folders_of_any_name(made, name):
    folder, _ = made("task=caption", "seed=9", name=name)
    words = [f"run={folder}"]
    assert repeated_run(words) == repeated_run(spelled(words)) == folder
    cfg = compose_config(words)
    assert cfg.seed == 9 and cfg.run == str(folder)


def test_without_a_run_nothing_is_repeated():
    assert repeated_run(["seed=1", "run_name=x"]) is repeated_run(["run=null"]) is None
    assert compose_config(["task=caption", "run=null"]).run is None
    assert isinstance(compose_config([]), RunConfig)


def test_text_that_looks_like_a_reference_stays_text(made):
    folder, _ = made("task=predict", "task.inputs=x", "task.prompt=of a seed")
    replace_in(folder, "of a seed", "${seed}")
    assert read_config(folder)["task"]["prompt"] == config_of(folder).task.prompt == "${seed}"
    assert compose_config([f"run={folder}"]).task.prompt == "${seed}"


def test_inside_a_running_hydra(made):
    folder, _ = made("task=caption", "seed=5")
    with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        assert compose_config([f"run={folder}"]).seed == 5
        assert compose("config", overrides=["seed=8"]).seed == 8
