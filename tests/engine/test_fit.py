"""The training loop on a model of a few numbers: how long, with which gradients, what is written, what stays as it was."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.config.run import OptimConfig, PrecisionConfig, PrecisionName
from blip2x.config.task import Best, OnNan, PretrainVisionConfig
from blip2x.engine import memory
from blip2x.engine.fit import Training
from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.engine.run_files import TIMES
from blip2x.engine.steps import count_steps
from blip2x.errors import Interrupted, UserError
from blip2x.models.freeze import freeze
from blip2x.objectives.tokens import with_token_shares
from blip2x.optim.schedule import learning_rate
from blip2x.parallel.context import Context
from blip2x.parallel.seeding import seed_everything


def task(**changes) -> PretrainVisionConfig:
    values = {"batch_size": 2, "accumulate": 1, "max_steps": 4, "max_epochs": None, "log_every": 2, "save_every": None}
    values |= {
        "eval_every": None,
        "on_nan": OnNan.stop,
        "keep_last": 1,
        "keep_best": 0,
        "best_metric": None,
        "best_is": Best.max,
    }
    return PretrainVisionConfig(**{**values, "save_in_background": False, "eval_batch_size": 2, **changes})


def optim(**changes) -> OptimConfig:
    values = {"lr": 0.1, "warmup_start_lr": 0.0, "warmup_steps": 2, "eta_min": 0.01, "weight_decay": 0.1}
    return OptimConfig(
        **{**values, "beta1": 0.9, "beta2": 0.98, "eps": 1e-2, "clip_grad_norm": None, "layer_decay": 1.0, **changes}
    )


FP32 = PrecisionConfig(PrecisionName.fp32, loss_scale=1024.0, loss_scale_steps=2)
FP16 = PrecisionConfig(PrecisionName.fp16, loss_scale=1024.0, loss_scale_steps=2)


class Objective(nn.Layer):
    """A frozen front with dropout and running statistics, and a trained head; it writes down how it was called."""

    def __init__(self, spoil=None):
        super().__init__()
        seed_everything(0, rank=0)
        self.front = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1D(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.0))
        freeze(self.front)
        self.spoil = spoil or (lambda step, loss: loss)
        self.steps, self.modes = [], []

    def set_step(self, step):
        self.steps.append(step)

    def forward(self, batch):
        self.modes.append((self.training, self.front[2].training, self.head[1].training))
        error = self.head(self.front(batch["x"])) - batch["y"]
        loss = self.spoil(self.steps[-1] + 1, (error**2).mean())
        return {"loss": loss, "error": error.abs().mean()}


class Batches:
    """The same samples each epoch, in batches of `size`; remembers which epochs were announced."""

    def __init__(self, count=3, size=2):
        random = np.random.default_rng(0)
        self.x = random.normal(size=(count * size, 3)).astype("float32")
        self.y = random.normal(size=(count * size, 1)).astype("float32")
        self.size, self.epochs, self.first, self.samples = size, [], 0, []
        self.images, self.loading_seconds = 0, 0.0

    def set_epoch(self, epoch, first=0):
        self.epochs.append(epoch)
        self.first = first

    def __len__(self):
        return len(self.x) // self.size

    def __iter__(self):
        for first in range(self.first * self.size, len(self.x), self.size):
            self.samples = list(range(first, first + self.size))
            self.images += self.size
            self.loading_seconds += self.size / 50
            yield {"x": self.x[first : first + self.size], "y": self.y[first : first + self.size]}


class Saves:
    """Stands for the checkpoints; remembers what was saved."""

    def __init__(self, events=None):
        self.states, self.events = [], [] if events is None else events

    def save(self, state, *, final):
        self.states.append(state)
        self.events.append(("save", state.step, final))

    def validated(self, step, metrics):
        self.events.append(("validated", step, metrics))

    def wait(self):
        """Nothing is written."""


def weights(layer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in layer.state_dict().items()}


def train(run, objective=None, batches=None, *, context=None, cfg=None, optimizer=None, precision=FP32, **rest):
    objective = objective or Objective()
    batches, context = batches or Batches(), context or Context()
    rest |= {"stage": "s", "precision": precision}
    return objective, Training(objective, batches, cfg or task(), optimizer or optim(), context, run, **rest).fit()


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_says_how_long_it_took(run):
    train(run, cfg=task(max_steps=30, log_every=1))
    losses = [line["loss"] for line in lines(run)]
    assert len(losses) == 30 and lines(run)[-1]["seconds"] > 0
    assert losses[-1] < 0.7 * losses[0]


def test_it_repeats_bit_for_bit(run):
    first, second = (weights(train(run)[0]) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("clip", [None, 0.5])
def test_accumulated_micro_batches_equal_one_big_batch(run, clip):
    whole = train(run, batches=Batches(3, 8), optimizer=optim(clip_grad_norm=clip))
    parts = train(run, batches=Batches(12, 2), cfg=task(accumulate=4), optimizer=optim(clip_grad_norm=clip))
    for name, expected in weights(whole[0]).items():
        np.testing.assert_allclose(weights(parts[0])[name], expected, atol=2e-6, err_msg=name)
    for key in ("loss", "error", "grad_norm"):
        assert parts[1][key] == pytest.approx(whole[1][key], rel=1e-5)


def test_clipping_shortens_the_step_and_the_norm_is_that_before_it(run):
    # with an eps far above the gradients, AdamW's first step is proportional to them
    linear = {"eps": 1e4, "weight_decay": 0.0, "warmup_steps": 0, "lr": 1e4}
    before = weights(Objective())["head.0.weight"]
    moved = {}
    for clip in (None, 0.1):
        objective, result = train(run, cfg=task(max_steps=1), optimizer=optim(**linear, clip_grad_norm=clip))
        moved[clip] = weights(objective)["head.0.weight"] - before
        norm = result["grad_norm"]
        assert norm > 0.5
    np.testing.assert_allclose(moved[0.1], moved[None] * 0.1 / norm, rtol=1e-3)


@pytest.mark.parametrize(
    ("cfg", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": None, "max_epochs": 2}, 6),
        ({"max_steps": None, "max_epochs": 3, "accumulate": 2}, 4),  # 9 batches: the last one is left over
    ],
)
def test_number_of_steps(cfg, steps):
    assert count_steps(task(**cfg), batches_per_epoch=3) == steps


@pytest.mark.parametrize(
    ("cfg", "batches", "sentence"),
    [({}, 0, "make no batch of task.batch_size=2"), ({"max_steps": None, "max_epochs": 1, "accumulate": 4}, 3, "accumulate=4")],
)
def test_too_little_data_is_one_sentence(cfg, batches, sentence):
    with pytest.raises(UserError, match=sentence):
        count_steps(task(**cfg), batches)


def test_steps_may_begin_new_epochs_and_are_counted_from_0(run):
    batches = Batches(3)
    objective, _ = train(run, batches=batches, cfg=task(max_steps=4))
    assert batches.epochs == [0, 1] and objective.steps == [0, 1, 2, 3]


def test_an_epoch_without_any_batch_is_one_sentence(run):
    class Vanished(Batches):
        def __iter__(self):
            return iter(())

    with pytest.raises(UserError, match="epoch 0 of the training data is empty"):
        train(run, batches=Vanished())


def test_frozen_parts_stay_as_they_were_and_in_eval_mode(run):
    before = weights(Objective())
    objective, _ = train(run, evaluate=dict, cfg=task(eval_every=1))
    for name, after in weights(objective).items():
        assert np.array_equal(after, before[name]) == name.startswith("front."), name  # running statistics, too
    assert objective.modes == [(True, False, True)] * 4  # again in train mode after each evaluation
    assert not any(layer.training for layer in objective.sublayers(include_self=True))  # at the end


def test_lines_of_metrics(run, monkeypatch):
    monkeypatch.setattr(memory, "_jobs", 1)  # as in a process of its own
    seen = []
    _, result = train(run, Objective(lambda step, loss: seen.append(loss.item()) or loss), cfg=task(max_steps=5))
    found = lines(run)
    assert [(line["stage"], line["step"]) for line in found] == [("s", 2), ("s", 4), ("s", 5)]
    for line, steps in zip(found, ([0, 1], [2, 3], [4]), strict=True):
        assert line["loss"] == pytest.approx(np.mean([seen[step] for step in steps]), rel=1e-6)  # of all steps since the last
        shape = {"lr": 0.1, "warmup_start_lr": 0.0, "warmup_steps": 2, "eta_min": 0.01, "total_steps": 5}
        assert line["lr"] == pytest.approx(learning_rate(line["step"] - 1, **shape))  # the one that the step was made with
        assert line.keys() == {"stage", "step", "lr", "loss", "error", "grad_norm", *TIMES} - {"tokens_per_second"}  # no text
        assert line["grad_norm"] > 0 and line["samples_per_second"] > 0
        assert line["images_per_second_per_worker"] == 50 and 0 <= line["data_wait"] <= 1
        assert line["data_wait_seconds"] >= 0 and 0.01 < line["memory_gb"] < 100
    assert {"stage": "s", "step": 5, **result} == found[-1]


def test_tokens_to_predict_are_counted_by_time(run):
    class Texts(Objective):
        def prepare(self, batches):
            counts = [paddle.to_tensor(number + 3) for number, _ in enumerate(batches)]
            return with_token_shares(batches, counts, Context())

    train(run, Texts(), cfg=task(accumulate=2))
    for line in lines(run):  # 3 + 4 tokens in each step of 2 x 2 samples
        assert line["tokens_per_second"] == pytest.approx(line["samples_per_second"] * 7 / 4, rel=1e-2)


def test_rates_of_an_image_encoder_with_layer_decay(run):
    objective = Objective()
    objective.vision = nn.Layer()
    objective.vision.blocks = nn.LayerList([nn.Linear(1, 1), nn.Linear(1, 1)])
    objective.vision.patches = nn.Linear(1, 1)
    train(run, objective, optimizer=optim(layer_decay=0.5))
    for line in lines(run):
        assert (line["lr/vision_first"], line["lr/vision_last"]) == pytest.approx((line["lr"] / 8, line["lr"] / 2))


def test_checkpoints_come_first_and_evaluation_is_in_eval_mode(run):
    saves, objective = Saves(), Objective()

    def evaluate():
        saves.events.append(("evaluate", any(layer.training for layer in objective.sublayers(include_self=True))))
        return {"accuracy": 0.5}

    cfg = task(save_every=2, eval_every=2, log_every=100)
    _, result = train(run, objective, cfg=cfg, evaluate=evaluate, checkpoints=saves)
    validated = {step: ("validated", step, {"accuracy": 0.5}) for step in (2, 4)}
    evaluated = ("evaluate", False)
    assert saves.events == [("save", 2, False), evaluated, validated[2], ("save", 4, True), evaluated, validated[4]]
    assert [line["step"] for line in lines(run) if "accuracy" in line] == [2, 4]
    assert result["accuracy"] == 0.5 and "loss" in result


def test_without_save_every_there_is_one_checkpoint_at_the_end(run):
    saves = Saves()
    train(run, checkpoints=saves)
    assert saves.events == [("save", 4, True)]


def test_what_is_to_be_judged_is_saved(run):
    """The best checkpoint can only be kept if each validation has one."""
    saves = Saves()
    cfg = task(eval_every=3, keep_best=1, best_metric="accuracy")
    train(run, cfg=cfg, evaluate=lambda: {"accuracy": 0.5}, checkpoints=saves)
    assert [event[:2] for event in saves.events] == [("save", 3), ("validated", 3), ("save", 4), ("validated", 4)]


def test_a_validation_draws_no_random_number_of_the_training(run):
    def evaluate():
        np.random.rand(7), paddle.rand([7])
        return {}

    objective = Objective()
    objective.head[1].p = 0.5
    plain, _ = train(run, objective)
    objective = Objective()
    objective.head[1].p = 0.5
    watched, _ = train(run, objective, evaluate=evaluate, cfg=task(eval_every=1))
    for name, expected in weights(plain).items():
        np.testing.assert_array_equal(weights(watched)[name], expected)


def test_the_state_says_where_the_data_stand(run):
    saves = Saves()
    train(run, batches=Batches(3), cfg=task(accumulate=2, save_every=1), checkpoints=saves)
    assert [(state.step, state.position.epoch, state.position.samples) for state in saves.states] == [
        (1, 0, 4),
        (2, 1, 2),  # the third batch, then the first of the next epoch
        (3, 1, 6),
        (4, 2, 4),
    ]


def spoiled(at, value):
    """A loss that is `value` in step `at`, gradient and all."""
    return lambda step, loss: loss * value if step == at else loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_no_number_names_part_and_step_before_it_spoils_the_weights(run, value):
    objective = Objective(spoiled(3, value))
    with pytest.raises(UserError, match=f"^s: loss part 'loss' is {value} at step 3;"):
        train(run, objective, cfg=task(log_every=100))
    assert all(np.isfinite(array).all() for array in weights(objective).values())


def test_where_losses_are_read_late_no_checkpoint_is_made_of_spoiled_weights(run):
    """On a GPU, values are looked at when a line is due: a checkpoint needs one, or nan would replace what was good."""
    saves = Saves()
    with pytest.raises(UserError, match="loss part 'loss' is nan at step 3;"):
        train(
            run,
            Objective(spoiled(3, float("nan"))),
            context=Context(device="gpu:0"),
            cfg=task(max_steps=20, log_every=10, save_every=2),
            checkpoints=saves,
        )
    assert saves.events == [("save", 2, False)]


def test_gradient_that_is_no_number_is_found_at_the_next_line(run):
    def spoil(step, loss):
        return loss + paddle.sqrt(loss - loss) if step == 2 else loss  # worth 0, but infinitely steep

    with pytest.raises(UserError, match=r"^s: the gradient's norm is (nan|inf) at step 2;"):
        train(run, Objective(spoil))


@pytest.mark.parametrize("wrong", [lambda step, loss: loss + paddle.sqrt(loss - loss) if step == 2 else loss, None])
def test_whoever_asks_to_stop_gets_no_checkpoint_of_spoiled_weights(run, wrong):
    """Between two lines, too, where otherwise nobody looks at the gradient."""
    saves = Saves()

    def asked(step, loss):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return wrong(step, loss) if wrong else loss

    sentence = r"the gradient's norm is (nan|inf) at step 2;" if wrong else "^s: SIGTERM; saved at step 2 of 9"
    with pytest.raises(UserError if wrong else Interrupted, match=sentence):
        train(run, Objective(asked), cfg=task(max_steps=9, log_every=5), checkpoints=saves)
    assert [event[:2] for event in saves.events] == ([] if wrong else [("save", 2)])


def test_ranks_on_gpus_ask_each_other_now_and_then(run):
    """Each time they would wait for the device."""

    def asked(step, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    saves, gpus = Saves(), Context(device="gpu:0", world_size=2)
    with pytest.raises(Interrupted, match=r"^s: SIGTERM; saved at step 10 of 30"):
        train(run, Objective(asked), context=gpus, cfg=task(max_steps=30, log_every=100), checkpoints=saves)
    assert [event[:2] for event in saves.events] == [("save", 10)]


def test_a_signal_behind_the_last_step_is_obeyed(run):
    """A pipeline must not begin its next stage."""

    def evaluate():
        os.kill(os.getpid(), signal.SIGUSR1)
        return {}

    with pytest.raises(Interrupted, match=r"^s: SIGUSR1; saved at step 4 of 4"):
        train(run, checkpoints=Saves(), evaluate=evaluate)


def ranks(count):
    """One of so many ranks; nothing is exchanged."""
    return Context(world_size=count)


def going_on(run):
    return Run(run.folder, run.root, run.stage, run.context, run.console, Loggers(), goes_on=True)


def test_a_run_goes_on_with_as_many_samples_in_a_step(run):
    """Whoever has half the ranks accumulates twice as much: steps, and how many there are, stay."""
    epochs = task(max_steps=None, max_epochs=2)
    train(run, batches=Batches(4), cfg=epochs, context=ranks(2))
    assert lines(run)[-1]["step"] == 8
    with pytest.raises(UserError, match=r"a step of this run has 4 samples \(.* now it would have 2; choose numbers"):
        train(going_on(run), batches=Batches(8), cfg=epochs)
    train(going_on(run), batches=Batches(9), cfg=task(max_steps=None, max_epochs=2, accumulate=2))
    assert lines(run)[-1]["step"] == 8  # and not 9


def test_samples_that_are_compared_stay_together(run):
    objective = Objective()
    objective.mixes_samples = True
    train(run, objective, context=ranks(2))
    with pytest.raises(UserError, match="a micro-batch, among which pairs are compared, of this run has 4 samples"):
        train(going_on(run), objective, cfg=task(accumulate=2))


def test_nothing_left_to_do_is_one_sentence(run):
    saves = Saves()
    train(run, checkpoints=saves)
    with pytest.raises(UserError, match=r"is at step 4, and this training ends after 4 steps; raise task.max_steps"):
        train(run, state=saves.states[-1])


def test_the_time_of_former_starts_counts(run):
    saves = Saves()
    train(run, checkpoints=saves)
    state = replace(saves.states[-1], seconds=1000.0)
    train(run, state=state, cfg=task(max_steps=6))
    assert 1000 < lines(run)[-1]["seconds"] < 1100 and saves.states[-1].seconds < 100


def bad_steps(run):
    return {path.name: json.loads(path.read_text()) for path in (run.folder / "bad_steps").glob("*.json")}


def test_the_samples_of_a_bad_step_are_written_down(run):
    with pytest.raises(UserError, match="at step 2;"):
        train(run, Objective(spoiled(2, float("nan"))), batches=Batches(3), cfg=task(accumulate=2, log_every=100))
    record = {"stage": "s", "step": 2, "what": "loss part 'loss'", "value": "nan", "samples_by_rank": [[[4, 5], [0, 1]]]}
    record["samples_of_the_step_before_by_rank"] = [[[0, 1], [2, 3]]]
    assert bad_steps(run) == {"step-00000002.json": record}


def steep(*steps):
    """A loss that is finite, with an infinite gradient in these steps."""
    return lambda step, loss: loss + paddle.sqrt(loss - loss) if step in steps else loss


@pytest.mark.parametrize("spoil", [spoiled(2, float("inf")), spoiled(2, float("nan")), steep(2)])
def test_a_bad_step_may_be_skipped_and_is_counted(run, spoil):
    """The weights go on as if the step had no samples, the schedule and the data as if it had been made."""
    objective, result = train(run, Objective(spoil), cfg=task(on_nan=OnNan.skip, log_every=1))
    found = lines(run)
    assert [line.get("skipped_steps", 0) for line in found] == [0, 1, 1, 1] and result["skipped_steps"] == 1
    assert ["loss" in line for line in found] == [True, False, True, True]
    assert all(np.isfinite(array).all() for array in weights(objective).values())
    assert bad_steps(run).keys() == {"step-00000002.json"}
    shape = {"lr": 0.1, "warmup_start_lr": 0.0, "warmup_steps": 2, "eta_min": 0.01, "total_steps": 4}
    assert [line["lr"] for line in found] == [pytest.approx(learning_rate(step, **shape)) for step in range(4)]


def test_steps_cannot_be_skipped_for_ever(run):
    always = Objective(lambda step, loss: loss * float("nan"))
    with pytest.raises(UserError, match=r"101 steps in a row have a gradient that is nan or infinite, the last at step 101"):
        train(run, always, cfg=task(on_nan=OnNan.skip, max_steps=200))


def test_a_scaled_loss_trains_alike(run):
    """What float16 does to numbers cannot be computed on a CPU, what its loss scale does can: nothing, but for rounding."""
    plain, result = train(run, optimizer=optim(clip_grad_norm=0.5))
    scaled, scaled_result = train(run, optimizer=optim(clip_grad_norm=0.5), precision=FP16)
    for name, expected in weights(plain).items():
        np.testing.assert_array_equal(weights(scaled)[name], expected)  # a power of 2 does not round
    assert scaled_result["grad_norm"] == result["grad_norm"]
    assert [line["loss_scale"] for line in lines(run)[2:]] == [2048.0, 4096.0]  # doubled after each two steps


def test_a_gradient_that_overflows_lowers_the_scale_and_is_no_error(run):
    objective, result = train(run, Objective(steep(2)), precision=FP16, cfg=task(log_every=1))
    assert [line["loss_scale"] for line in lines(run)] == [1024.0, 512.0, 512.0, 1024.0]
    assert "skipped_steps" not in result and not bad_steps(run)  # that is what the scale is there for
    assert all(np.isfinite(array).all() for array in weights(objective).values())


def test_a_training_within_its_warm_up_is_noted(run, console):
    train(run, optimizer=optim(warmup_steps=10))
    assert "note: s ends after 4 steps, within the warm-up of 10" in console.file.getvalue()


def test_nothing_to_train_is_one_sentence(run):
    objective = Objective()
    freeze(objective.head)
    with pytest.raises(UserError, match="nothing to train"):
        train(run, objective)
