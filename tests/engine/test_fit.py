"""The training loop on a model of a few numbers: how long, with which gradients, what is written, what stays as it was."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.config.run import OptimConfig
from blip2x.config.task import PretrainVisionConfig
from blip2x.engine.fit import count_steps, fit
from blip2x.errors import UserError
from blip2x.models.freeze import freeze
from blip2x.optim.schedule import learning_rate
from blip2x.parallel.context import Context
from blip2x.parallel.seeding import seed_everything


def task(**changes) -> PretrainVisionConfig:
    values = {"batch_size": 2, "accumulate": 1, "max_steps": 4, "max_epochs": None, "log_every": 2, "save_every": None}
    return PretrainVisionConfig(**{**values, "eval_batch_size": 2, **changes})


def optim(**changes) -> OptimConfig:
    values = {"lr": 0.1, "warmup_start_lr": 0.0, "warmup_steps": 2, "eta_min": 0.01, "weight_decay": 0.1}
    return OptimConfig(**{**values, "beta1": 0.9, "beta2": 0.98, "eps": 1e-2, "clip_grad_norm": None, **changes})


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
        self.size, self.epochs = size, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return len(self.x) // self.size

    def __iter__(self):
        for first in range(0, len(self.x), self.size):
            yield {"x": self.x[first : first + self.size], "y": self.y[first : first + self.size]}


def weights(layer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in layer.state_dict().items()}


def train(run, objective=None, batches=None, *, context=None, cfg=None, optimizer=None, **rest):
    objective = objective or Objective()
    batches = batches or Batches()
    result = fit(objective, batches, cfg or task(), optimizer or optim(), context or Context(), run, stage="s", **rest)
    return objective, result


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_says_how_long_it_took(run):
    _, result = train(run, cfg=task(max_steps=30, log_every=1))
    losses = [line["loss"] for line in lines(run)]
    assert result.steps == 30 and result.seconds > 0
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
        assert parts[1].metrics[key] == pytest.approx(whole[1].metrics[key], rel=1e-5)


def test_clipping_shortens_the_step_and_the_norm_is_that_before_it(run):
    # with an eps far above the gradients, AdamW's first step is proportional to them
    linear = {"eps": 1e4, "weight_decay": 0.0, "warmup_steps": 0, "lr": 1e4}
    before = weights(Objective())["head.0.weight"]
    moved = {}
    for clip in (None, 0.1):
        objective, result = train(run, cfg=task(max_steps=1), optimizer=optim(**linear, clip_grad_norm=clip))
        moved[clip] = weights(objective)["head.0.weight"] - before
        norm = result.metrics["grad_norm"]
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
    objective, _ = train(run, evaluate=dict, cfg=task(save_every=1))
    for name, after in weights(objective).items():
        assert np.array_equal(after, before[name]) == name.startswith("front."), name  # running statistics, too
    assert objective.modes == [(True, False, True)] * 4  # again in train mode after each evaluation
    assert not any(layer.training for layer in objective.sublayers(include_self=True))  # at the end


def test_lines_of_metrics(run):
    seen = []
    _, result = train(run, Objective(lambda step, loss: seen.append(loss.item()) or loss), cfg=task(max_steps=5))
    found = lines(run)
    assert [(line["stage"], line["step"]) for line in found] == [("s", 2), ("s", 4), ("s", 5)]
    for line, steps in zip(found, ([0, 1], [2, 3], [4]), strict=True):
        assert line["loss"] == pytest.approx(np.mean([seen[step] for step in steps]), rel=1e-6)  # of all steps since the last
        shape = {"lr": 0.1, "warmup_start_lr": 0.0, "warmup_steps": 2, "eta_min": 0.01, "total_steps": 5}
        assert line["lr"] == pytest.approx(learning_rate(line["step"] - 1, **shape))  # the one that the step was made with
        assert line.keys() == {"stage", "step", "lr", "loss", "error", "grad_norm", "samples_per_second", "seconds"}
        assert line["grad_norm"] > 0 and line["samples_per_second"] > 0
    assert {"stage": "s", "step": 5, **result.metrics} == found[-1]


def test_checkpoints_come_first_and_evaluation_is_in_eval_mode(run):
    events, objective = [], Objective()

    def evaluate():
        events.append(("evaluate", any(layer.training for layer in objective.sublayers(include_self=True))))
        return {"accuracy": 0.5}

    cfg = task(save_every=2, log_every=100)
    _, result = train(run, objective, cfg=cfg, evaluate=evaluate, save=events.append)
    assert events == [2, ("evaluate", False), 4, ("evaluate", False)]
    assert [line["step"] for line in lines(run) if "accuracy" in line] == [2, 4]
    assert result.metrics["accuracy"] == 0.5 and "loss" in result.metrics


def test_without_save_every_there_is_one_checkpoint_at_the_end(run):
    saved = []
    train(run, save=saved.append)
    assert saved == [4]


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
    saved = []
    with pytest.raises(UserError, match="loss part 'loss' is nan at step 3;"):
        train(
            run,
            Objective(spoiled(3, float("nan"))),
            context=Context(device="gpu:0"),
            cfg=task(max_steps=20, log_every=10, save_every=2),
            save=saved.append,
        )
    assert saved == [2]


def test_gradient_that_is_no_number_is_found_at_the_next_line(run):
    def spoil(step, loss):
        return loss + paddle.sqrt(loss - loss) if step == 2 else loss  # worth 0, but infinitely steep

    with pytest.raises(UserError, match=r"^s: the gradient's norm is (nan|inf) at step 2;"):
        train(run, Objective(spoil))


def test_a_training_within_its_warm_up_is_noted(run, console):
    train(run, optimizer=optim(warmup_steps=10))
    assert "note: s ends after 4 steps, within the warm-up of 10" in console.file.getvalue()


def test_nothing_to_train_is_one_sentence(run):
    objective = Objective()
    freeze(objective.head)
    with pytest.raises(UserError, match="nothing to train"):
        train(run, objective)
