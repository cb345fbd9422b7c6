"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import paddle
from paddle import Tensor, nn

from blip2x.config.run import OptimConfig, PrecisionConfig
from blip2x.config.task import OnNan, TrainingConfig
from blip2x.engine.amp import LossScale, full_precision
from blip2x.engine.batches import batch_size, to_tensors
from blip2x.engine.checkpoints import Checkpoints, validations
from blip2x.engine.losses import LossRecord, NotFiniteError
from blip2x.engine.memory import peak_memory_gb
from blip2x.engine.progress import ProgressBar
from blip2x.engine.random_state import random_state, set_random_state, unchanged_random_state
from blip2x.engine.run import Run
from blip2x.engine.run_files import SCHEDULE_FILE
from blip2x.engine.steps import agreed_steps
from blip2x.engine.stop import StopSignals
from blip2x.engine.stream import Loader, Stream
from blip2x.engine.training_state import Position, TrainingState
from blip2x.errors import Interrupted, UserError
from blip2x.models.freeze import set_eval_mode, set_train_mode
from blip2x.optim.build import build_optimizer
from blip2x.optim.groups import rate_groups
from blip2x.parallel.context import Context

_MOST_SKIPPED_IN_A_ROW = 100
_STEPS_BETWEEN_TALKS = 10  # of several ranks on GPUs


class Training:
    """Trains what `objective` does not freeze, in place; `step` optimizer steps are done.

    Args:
        objective: batch of tensors -> {"loss": scalar to minimise, other parts to report}; `set_step(step)`, where it has
            one, is called before each optimizer step, then `prepare(batches)` with the step's micro-batches; where the first of
            them has "tokens" then, their rate is reported (see `with_token_shares`). `gradients_vary`, where it has one:
            whether at some steps it leaves parameters without a gradient that get one at others; `mixes_samples`: whether it
            matters which samples share a micro-batch.
        loader: micro-batches of this rank; all ranks have equally many.
        cfg: how long, how big, how often.
        optim: optimizer and schedule.
        context: the other ranks.
        run: where metrics and progress go.
        stage: name of this training in metrics.jsonl.
        precision: whether the loss is scaled; autocast is the caller's.
        evaluate: called on every rank every `cfg.eval_every` steps and after the last one; its values are logged.
        checkpoints: written every `cfg.save_every` steps and after the last one, and when the process is asked to stop.
        state: where to go on; the objective has that checkpoint's weights already.
        prune: called with each line of metrics but the last; it raises where the training is not worth going on with.

    Raises:
        UserError: there are too little data for one step, nothing is left to do, or the run that is gone on with had other
            samples in a step.
    """

    def __init__(
        self,
        objective: nn.Layer,
        loader: Loader,
        cfg: TrainingConfig,
        optim: OptimConfig,
        context: Context,
        run: Run,
        *,
        stage: str,
        precision: PrecisionConfig,
        evaluate: Callable[[], dict[str, float]] | None = None,
        checkpoints: Checkpoints | None = None,
        state: TrainingState | None = None,
        prune: Callable[[int, dict[str, float]], None] | None = None,
    ):
        self.objective, self._cfg, self._context, self._run, self._stage = objective, cfg, context, run, stage
        self._loss_scale, self._evaluate, self._checkpoints = LossScale(precision), evaluate, checkpoints
        self._prune = prune
        self._state, self._samples_per_batch = state, cfg.batch_size * context.data_size
        self.total = agreed_steps(cfg, len(loader), context, run, mixes_samples=getattr(objective, "mixes_samples", False))
        if state and (state.step > self.total or (state.step == self.total and not run.goes_on)):
            raise UserError(
                f"{stage}: the state to go on from is at step {state.step}, and this training ends after {self.total} steps; "
                "raise task.max_steps or task.max_epochs"
            )
        if optim.warmup_steps >= self.total:
            note = f"note: {stage} ends after {self.total} steps, within the warm-up of {optim.warmup_steps}"
            run.console.print(note, markup=False)
        optimizer, self._schedule = build_optimizer(optim, objective, self.total)
        self._rates = rate_groups(objective, optim.layer_decay)
        run.write_json({"stage": stage, **self._schedule.shape}, SCHEDULE_FILE)
        self._parameters = {name: p for name, p in objective.named_parameters() if not p.stop_gradient}
        self._wrapped, self._optimizer = context.wrap(objective, optimizer)
        self._record = LossRecord(stage, context)
        self._bar = ProgressBar(run.console, stage, self.total, start=state.step if state else 0)
        self._stream = Stream(loader)
        self._places: dict[int, list[list[int]]] = {}  # steps not checked yet -> the samples of each micro-batch
        self._skipped = self._skipped_in_a_row = 0
        self.step = 0
        self.metrics: dict[str, float] = {}
        self._stopping = False
        self._started = self._last_line = time.monotonic()
        self._samples, self._waited = 0, 0.0  # since the last line: seconds of waiting for batches
        self._tokens: list[Tensor] = []  # since then, by step: what all ranks had to predict; on the device until a line is due
        self._loaded = self._stream.loaded  # at the last line

    def fit(self) -> dict[str, float]:
        """Make all steps, or those that are left; the objective is in eval mode afterwards.

        Returns:
            What the last line in metrics.jsonl says, and the last validation.

        Raises:
            UserError: a loss or gradient is not finite; it names step and part.
            Interrupted: the process was asked to stop; the state is saved.
        """
        with StopSignals() as stop, self._bar:
            try:
                self._start()
                while self.step < self.total:
                    self._advance(stop)
                    self._after_step(stop)
                if self._context.any(stop.received is not None):  # since the last step
                    raise self._interrupted(stop)
            finally:
                self._stream.close()  # and with it the loader's worker processes
                if self._checkpoints and self._context.is_main:
                    self._checkpoints.wait()
        set_eval_mode(self.objective)
        return self.metrics

    def _start(self) -> None:
        set_train_mode(self.objective)
        state = self._state
        if state is None:
            return
        self._started -= state.seconds
        self._context.set_optimizer_state(self._wrapped, self._optimizer, self._parameters, state.optimizer)
        self._loss_scale.set_state(state.loss_scale)
        self._schedule.step(state.step)
        self.step, self._skipped, self.metrics = state.step, state.skipped, dict(state.metrics)
        batches, rest = divmod(state.position.samples, self._samples_per_batch)
        if rest:
            note = (
                f"note: {state.position.samples} samples of the epoch are no whole number of batches now: {rest} are left out"
            )
            self._run.console.print(note, markup=False)
        self._stream.move(state.position.epoch, batches + (rest > 0))
        rank = self._context.data_rank
        if len(state.ranks) == self._context.data_size:
            self._record.restore(state.ranks[rank]["losses"])
            set_random_state(state.ranks[rank]["random"])
        else:
            ranks = f"{len(state.ranks)} rank(s) then, {self._context.data_size} now"
            self._run.console.print(f"note: {ranks}: dropout goes on with other random numbers", markup=False)
        if self._due(self._cfg.eval_every) and self._evaluate:
            known = self._context.broadcast_object(validations(self._run.folder).get(str(self.step)))
            self.metrics |= known if known is not None else self._validate()

    def _advance(self, stop: StopSignals) -> None:
        step = self.step + 1
        if hasattr(self.objective, "set_step"):
            self.objective.set_step(self.step)
        parts, seen = self._backward(step)
        self._samples += seen
        self.step = step
        due = self._due(self._cfg.log_every) or self._saves() or self._validates()
        self._unscale()
        norm = self._grad_norm() if due or self._skips or self._loss_scale.is_on else None
        bad = self._is_bad(parts, norm)
        try:
            if not bad:
                self._record.add(step, parts)
            if due or self._ranks_talk():
                self._stopping = self._context.any(stop.received is not None)
            if due:
                means = self._record.read()
            elif self._stopping:  # no weights that are nan may replace a good checkpoint
                self._record.check()
                norm = self._grad_norm()
            if (due or self._stopping) and not bad and norm is not None and not math.isfinite(norm):
                raise NotFiniteError(self._stage, "the gradient's norm", norm, step)
        except NotFiniteError as error:
            self._keep_places(error.step, error.what, error.value)
            raise
        if due or self._stopping:
            self._places.clear()
        lr = self._schedule.get_lr()
        with full_precision():
            if not bad:
                self._optimizer.step()
            self._optimizer.clear_grad()
        self._schedule.step()
        if due:
            rates = {"lr": lr, **{f"lr/{group}": lr * factor for group, factor in self._rates.items()}}
            self._write_line({**rates, **means, **({} if bad or norm is None else {"grad_norm": norm})})
        self._bar.advance(seen * self._context.data_size, self.metrics if due else None)

    def _after_step(self, stop: StopSignals) -> None:
        paused = time.monotonic()
        if self._saves() or (self._stopping and self._checkpoints):
            self._save(final=self.step == self.total)
        if self._stopping:
            raise self._interrupted(stop)
        if self._validates():
            self.metrics = {**self.metrics, **self._validate()}
        if self._prune and self.step < self.total and (self._due(self._cfg.log_every) or self._validates()):
            self._prune(self.step, self.metrics)
        self._last_line += time.monotonic() - paused  # saving is not training: leave it out of the rate

    def _interrupted(self, stop: StopSignals) -> Interrupted:
        saved = f"saved at step {self.step} of {self.total}" if self._checkpoints else "nothing is saved"
        why = stop.received or "another rank was asked to stop"
        return Interrupted(f"{self._stage}: {why}; {saved}", together=True)

    def _ranks_talk(self) -> bool:
        """Whether they ask each other in this step who is to stop: on GPUs the answer has to wait for all that is computed."""
        free = self._context.device == "cpu" or self._context.world_size == 1
        return free or self.step % _STEPS_BETWEEN_TALKS == 0

    @property
    def _skips(self) -> bool:
        return self._cfg.on_nan is OnNan.skip

    def _due(self, every: int | None) -> bool:
        return self.step == self.total or (every is not None and self.step % every == 0)

    def _validates(self) -> bool:
        return self._evaluate is not None and self._due(self._cfg.eval_every)

    def _saves(self) -> bool:
        if self._checkpoints is None:
            return False
        # the best one can only be kept if there is one of each validation
        return self._due(self._cfg.save_every) or (self._cfg.keep_best > 0 and self._validates())

    def _backward(self, step: int) -> tuple[list[dict[str, Tensor]], int]:
        """Gradients of one step: the mean over its micro-batches. Gives each one's loss parts and the samples seen."""
        batches, places = [], []
        for _ in range(self._cfg.accumulate):
            asked = time.monotonic()
            batch = next(self._stream)
            self._waited += time.monotonic() - asked
            batches.append(to_tensors(batch))
            places.append(self._stream.samples)
        self._places[step] = places
        if hasattr(self.objective, "prepare"):
            batches = self.objective.prepare(batches)
            self._tokens += [batches[0]["tokens"]] if "tokens" in batches[0] else []
        collected, seen = [], 0
        while batches:
            batch = batches.pop(0)  # no longer held here while the next one is computed
            seen += batch_size(batch)
            with self._context.accumulating(self._wrapped) if batches else nullcontext():
                parts = self._wrapped(batch)
                with full_precision():
                    (parts["loss"] * (self._loss_scale.value / self._cfg.accumulate)).backward()
            collected.append({name: value.detach() for name, value in parts.items()})
        return collected, seen

    @paddle.no_grad()
    def _unscale(self) -> None:
        if self._loss_scale.value != 1:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.scale_(1 / self._loss_scale.value)

    def _grad_norm(self) -> float | None:
        norm = self._context.grad_norm(self._wrapped, self._optimizer, list(self._parameters.values()))
        return None if norm is None else float(norm)

    def _is_bad(self, parts: list[dict[str, Tensor]], norm: float | None) -> bool:
        """Whether this step has to be left out, on all ranks alike."""
        if not (self._skips or self._loss_scale.is_on):
            return False
        finite_loss = all(math.isfinite(float(part["loss"])) for part in parts)
        finite = (finite_loss or not self._skips) and (norm is None or math.isfinite(norm))
        bad = self._context.any(not finite)
        overflow = self._loss_scale.is_on and not self._context.any(not finite_loss)  # what loss scaling is there for
        self._loss_scale.update(not bad)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if bad else 0
        if bad and not overflow:
            if not self._skips:
                return False  # the loss itself: found where losses are read
            self._skipped += 1
            self._keep_places(self.step, "the loss or its gradient", float("nan"))
        if self._skipped_in_a_row > _MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{self._stage}: {self._skipped_in_a_row} steps in a row have a gradient that is nan or infinite, the last at "
                f"step {self.step}; try a smaller optim.lr or precision=bf16"
            )
        return bad

    def _keep_places(self, step: int, what: str, value: float) -> None:
        """Write down which samples a bad step had, by their places in the training data; all ranks come here together.

        A loss is bad, too, where the step before it had an infinite gradient that nobody looked at, so that one's are named.
        """
        found = self._context.gather_objects([self._places.get(number, []) for number in (step, step - 1)])
        places, before = ([rank[number] for rank in found] for number in (0, 1))
        record = {"stage": self._stage, "step": step, "what": what, "value": str(value)}
        record |= {"samples_by_rank": places, "samples_of_the_step_before_by_rank": before}
        path = self._run.write_json(record, "bad_steps", f"step-{step:08d}.json")
        self._run.console.print(f"the samples of step {step} are in {path}", style="yellow", markup=False)

    def _write_line(self, line: dict[str, float]) -> None:
        tokens = float(paddle.add_n(self._tokens)) if self._tokens else None  # waits for the device: before the clock is read
        now = time.monotonic()
        passed = now - self._last_line
        line["samples_per_second"] = round(self._samples * self._context.data_size / passed, 3)
        if tokens is not None:
            line["tokens_per_second"] = round(tokens / passed, 1)
        line["data_wait"] = round(self._waited / passed, 3)  # this rank's share of the time
        line["data_wait_seconds"] = round(self._waited, 3)
        loaded = self._stream.loaded
        images, seconds = (after - before for before, after in zip(self._loaded, loaded, strict=True))
        if images:
            line["images_per_second_per_worker"] = round(images / seconds, 1)
        if (memory := peak_memory_gb(self._context.device)) is not None:
            line["memory_gb"] = round(memory, 3)  # of this rank
        line["seconds"] = round(now - self._started, 3)
        if self._loss_scale.is_on:
            line["loss_scale"] = self._loss_scale.value
        if self._skipped:
            line["skipped_steps"] = self._skipped
        self._run.log_metrics(self._stage, self.step, line)
        self.metrics = line
        self._last_line, self._samples, self._waited, self._loaded, self._tokens = now, 0, 0.0, loaded, []

    def _save(self, *, final: bool) -> None:
        self._context.on_main(self._checkpoints.wait)  # what a former one copied is let go before more is copied
        self._context.gather_parameters(self._wrapped)
        optimizer = self._context.optimizer_state(self._wrapped, self._optimizer, self._parameters)
        ranks = self._context.gather_objects({"random": random_state(), "losses": self._record.pending()})
        position = Position(self._stream.epoch, self._stream.batch * self._samples_per_batch)
        scale = self._loss_scale.state()
        seconds = time.monotonic() - self._started
        state = TrainingState(self.step, position, seconds, self._skipped, scale, self.metrics, ranks, optimizer)
        self._context.on_main(lambda: self._checkpoints.save(state, final=final))

    def _validate(self) -> dict[str, float]:
        self._context.gather_parameters(self._wrapped)
        set_eval_mode(self.objective)
        with unchanged_random_state(), paddle.no_grad():
            results = self._evaluate()
        set_train_mode(self.objective)
        self._run.log_metrics(self._stage, self.step, results)
        self._bar.validated(results)
        if self._checkpoints:
            self._context.on_main(lambda: self._checkpoints.validated(self.step, results))
        return results
