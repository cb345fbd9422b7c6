"""Training as every task does it: loader, loop, checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paddle import nn

from blip2x.config.auto import PARTS, Settings
from blip2x.config.model import ModelConfig
from blip2x.config.run import RunConfig
from blip2x.config.sweep import in_sweep
from blip2x.data.collate import Collate
from blip2x.data.feature_store import LEAST_SPARE
from blip2x.engine.amp import dtype_map
from blip2x.engine.checkpoint import Saveable, checkpoint_bytes, prepare_checkpoint, require_checkpoint_space
from blip2x.engine.checkpoints import FINAL, Checkpoints, newest_checkpoint, validations
from blip2x.engine.fit import Training
from blip2x.engine.folders import same_disk
from blip2x.engine.pruning import MedianPruner, Pruned
from blip2x.engine.resume import AUTO, NEVER, began_from
from blip2x.engine.run import Run
from blip2x.engine.training_state import TrainingState
from blip2x.errors import Interrupted, UserError
from blip2x.models.weights.checkpoint import fill, split_state
from blip2x.models.weights.describe import settings_of
from blip2x.models.weights.manifest import MODEL_FILE
from blip2x.models.weights.tensor_files import open_tensors
from blip2x.parallel.seeding import seed_everything
from blip2x.tasks.common.features import Features, crops_kept, rows_read
from blip2x.tasks.common.loading import report_skipped, train_loader, write_skipped
from blip2x.tasks.common.weights import normalisation

_SAMPLES_FILE = "samples.json"  # in a training stage's folder


def train(
    cfg: RunConfig,
    run: Run,
    objective: nn.Layer,
    model: nn.Layer,
    samples: Sequence[Any],
    collate: Collate,
    *,
    tokenizers: dict[str, Saveable],
    frozen_origin: dict[str, str],
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train `objective` on `samples`; what was trained of `model` is in ``checkpoint`` of the run's folder afterwards.

    The last metrics are given back, those of the validation among them.

    Args:
        cfg: the whole config; its task says how long and how often.
        run: the task's run.
        objective: what is trained.
        model: what is saved, the objective's model.
        samples: of the training split.
        collate: makes their batches.
        tokenizers: part -> tokenizer, saved with the weights.
        frozen_origin: part -> where the weights of the model's frozen part are.
        evaluate: gives metrics on the evaluation split, wherever a checkpoint is due.

    Raises:
        UserError: no room for a checkpoint, too few samples, a bad image where the config says stop, or a loss that is not
            finite.
    """

    def prepare(folder: Path, state: TrainingState, *, copy: bool) -> Callable[[], Path]:
        return prepare_checkpoint(
            folder,
            model,
            kind=cfg.task.kind,
            step=state.step,
            tokenizers=tokenizers,
            frozen_origin=frozen_origin,
            extra={
                "model": cfg.model.name,
                "settings": _settings(cfg.model, model),
                "dataset": cfg.dataset.name,
                "normalisation": normalisation(cfg.dataset),
            },
            state=state,
            copy=copy,
        )

    keeps = run.begin_training(objective)
    if keeps:
        run.context.on_main(lambda: require_checkpoint_space(run.path(FINAL), model, optimizer=True))  # before days of work
    run.write_json(dtype_map(model), "dtypes.json")
    state = _go_on(cfg, run, model)
    note_samples(run, len(samples))
    checkpoints = Checkpoints(run, cfg.task, prepare) if keeps else None
    features = Features.of(cfg, run, model, checkpoints and _left_to(checkpoints, cfg, run, model))
    loader = train_loader(cfg, run, samples, collate, features)
    if features:
        crops, most = crops_kept(cfg, len(loader)), rows_read(cfg, len(loader), run.context.data_size)
        features.expect(samples, collate, crops, "train", begins=True, most=most)
    seed_everything(cfg.seed, run.context.data_rank)
    pruner = MedianPruner(cfg.prune, run) if cfg.prune.metric and in_sweep() else None
    try:
        training = Training(
            objective,
            loader,
            cfg.task,
            cfg.optim,
            run.context,
            run,
            stage=run.stage,
            precision=cfg.precision,
            evaluate=evaluate,
            checkpoints=checkpoints,
            state=state,
            prune=pruner,
        )
        metrics = training.fit()
    except (UserError, Interrupted, Pruned):
        write_skipped(run, loader.skipped)
        raise
    report_skipped(run, loader.skipped)
    if features:
        features.end()
    if pruner:
        pruner.warn_if_unseen()
    if checkpoints and cfg.task.keep_best:
        best = run.context.on_main(checkpoints.best)
        run.console.print(f"best by {cfg.task.best_metric}: {best}", style="dim", markup=False, highlight=False)
    return metrics


def note_samples(run: Run, count: int) -> None:
    """Keep how many samples there are; tell where a run goes on with another number than it began with."""
    before = run.context.broadcast_object(run.read_json(_SAMPLES_FILE)) if run.goes_on else None
    if before is None:
        run.write_json({"samples": count}, _SAMPLES_FILE)
    elif before["samples"] != count:
        note = f"note: this run began with {before['samples']} samples, and now there are {count}; the epoch goes on in another"
        run.console.print(f"{note} order, so that some of them come twice in it, or not at all", style="yellow", markup=False)


def _left_to(checkpoints: Checkpoints, cfg: RunConfig, run: Run, model: nn.Layer) -> Callable[[], float] | None:
    """Gives the room on the features' disk that checkpoints will take; None: theirs is another."""
    if not same_disk(Path(cfg.paths.cache), run.folder):
        return None
    size = checkpoint_bytes(model, optimizer=True)
    return lambda: max(LEAST_SPARE, checkpoints.bytes_to_come(size))


def _go_on(cfg: RunConfig, run: Run, model: nn.Layer) -> TrainingState | None:
    """The state to go on from, with its weights in `model`; None: the training begins."""

    def find() -> Path | None:
        def say(text: str) -> None:
            run.console.print(text, style="yellow", markup=False)

        if run.goes_on and (own := newest_checkpoint(run.folder, say)):
            return own
        origin = began_from(run.root) if run.goes_on else cfg.resume
        if origin in (AUTO, NEVER):
            return None
        found = newest_checkpoint(Path(origin), say)
        if found is None:
            raise UserError(f"resume={origin}: there is no whole checkpoint of a training")
        return found

    found = run.context.on_main(find)
    state = TrainingState.read(found) if found else None
    if run.goes_on:
        step = state.step if state else 0
        validated = str(step) in validations(run.folder)
        # the lines behind the checkpoint are made anew; at its step there may be two, of the training and of a validation
        run.forget_metrics(lambda row: row["step"] < step or (row["step"] == step and ("lr" in row or validated)))
    if state:
        kept = [(name, "frozen") for name in split_state(model)[1]]
        fill(model, open_tensors(found / MODEL_FILE), str(found), allow_missing=kept)
        text = (
            f"going on from {found}: step {state.step}, epoch {state.position.epoch}, {state.position.samples} samples into it"
        )
        run.console.print(text, markup=False, highlight=False)
    return state


def _settings(cfg: ModelConfig, model: nn.Layer) -> Settings:
    parts = [part for part in PARTS if hasattr(model, part)] or ["language"]  # a language model that is fitted alone
    settings = settings_of(cfg, parts)
    if "language" in parts:  # the tokenizer's, where the config leaves it open
        settings["language.vocab_size"] = getattr(model, "language", model).vocab_size
    return settings
