"""One step of the training and one generation, on real samples, by the task itself; nothing is kept but what they said."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import shutil
import time
from typing import Any

import paddle
from paddle import nn
from rich.console import Console

from blip2x.config.run import RunConfig
from blip2x.config.tools import PredictConfig
from blip2x.engine.amp import autocast, check_precision
from blip2x.engine.loggers import Loggers
from blip2x.engine.memory import free_memory
from blip2x.engine.memory_table import amount
from blip2x.engine.resume import NEVER
from blip2x.engine.run import METRICS_FILE, Run
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout
from blip2x.models.weights.known import is_known
from blip2x.parallel.context import Context
from blip2x.parallel.degrees import Degrees
from blip2x.parallel.seeding import seed_everything
from blip2x.tasks.checkup.data import is_absent, reads, samples_of
from blip2x.tasks.checkup.examined import Examined, value_of
from blip2x.tasks.checkup.findings import Findings, sentence
from blip2x.tasks.checkup.memory import prediction_of, stored_bytes
from blip2x.tasks.common.weights import Weights
from blip2x.tasks.predict import pictures_and_prompts

_WRITING = ("caption", "vqa_zeroshot", "vqa_finetune", "retrieval", "predict")  # and ends
_SAMPLES = 2  # that texts are written for
_LARGE = 300_000_000  # parameters of which a step takes minutes on a CPU
_BESIDE = 2**30  # bytes of a batch and of libraries, where nothing is predicted
_CAPTIONED = re.compile(r"\d+ captions\b")  # the line above the captions of a validation


def check_start(examined: Examined) -> Findings:
    """Where the weights are, and whether the task would start."""
    out, cfg, cls = Findings(examined.name), examined.cfg, examined.task_class
    lacking, gone = [], []
    for key in examined.weight_keys:
        value = value_of(cfg.model, key)
        if key in examined.promised:
            out.fine(key, "made by a stage before this one")
        elif value is None:
            lacking += [f"{key}=null"] if _is_needed(examined, key) else []
        elif key not in examined.absent_weights:
            path = str(Weights(cfg.model, cfg.paths, None).locate(value, key))
            out.fine(key, value if value == path else f"{value}: {path}")
        elif is_known(value):
            lacking.append(f"{key}={value}")
            out.look(key, f"{value} is not here", "it is fetched when the task starts")
        else:  # a path, which nothing will fetch
            gone.append(f"{key}={value}")
            out.broken(key, examined.absent_weights[key], "put it there, or choose another one")
    absent = []
    for what, split in reads(examined):
        try:
            samples_of(examined, what, split)
        except UserError:
            absent += [f"{split or 'train'} {what}"] if is_absent(examined, what, split) else []
    try:
        cls.check(cfg, *([examined.promised] if hasattr(cls, "promises") else []))
    except UserError as error:
        (out.look if (lacking or absent) and not gone else out.broken)("start", f"the task would stop with: {sentence(error)}")
        out.record = {"lacks": [*lacking, *gone, *absent] or ["what the line above says"]}
    else:
        out.fine("start", "the task would start")
    return out


def _is_needed(examined: Examined, key: str) -> bool:
    """Whether the task cannot do without some weights, where nothing else brings them."""
    if key == "model.weights":
        return examined.task_class.starts_from(examined.cfg) is not None
    whole = "model.weights" in examined.weight_keys and examined.cfg.model.weights is not None
    if whole and "model.weights" not in examined.absent_weights:
        return False  # whether it brings this part, or knows where it is, is said by the task's own check
    part = key.split(".")[1]
    return key not in examined.task_class.makes and getattr(getattr(examined.cfg.model, part), "frozen", False)


def check_trial(examined: Examined, wanted: Any, lacks: list[str]) -> Findings:
    """Do it where it may and can be done; `wanted` is task.steps, `lacks` what is not there for the task to start."""
    out = Findings(examined.name)
    reason = _against(examined, wanted, lacks)
    if reason:
        out.look("trial", f"not tried: {reason}")
        return out
    run = TrialRun(examined)
    seed_everything(examined.cfg.seed, 0)
    started = time.perf_counter()
    try:
        with autocast(examined.cfg.precision, examined.device):
            result = examined.task_class(_small(examined.cfg), run).run()
    except UserError as error:
        out.broken("trial", sentence(error), "see what the lines above say of data and weights")
        out.shown = run.said()
        return out
    finally:
        run.let_go()
    seconds = time.perf_counter() - started
    if examined.trains:
        _judge_step(out, run, examined)
    _judge_texts(out, run, examined)
    out.fine("trial", f"{seconds:.1f} s with loading; its files are in {run.folder.relative_to(examined.run.folder)}")
    out.record["trial"] = {"seconds": round(seconds, 1), "metrics": result.metrics}
    return out


def _against(examined: Examined, wanted: Any, lacks: list[str]) -> str | None:
    """Why nothing is tried; None: nothing speaks against it."""
    cfg = examined.cfg
    if not (examined.trains or cfg.task.kind in _WRITING):
        return f"task={cfg.task.kind} neither trains nor ends with texts"
    if wanted is False:
        return "task.steps=false"
    if made := examined.promised & set(examined.weight_keys):
        return f"{', '.join(sorted(made))}: made by the stages before, which are not run here"
    if lacks:
        return f"it lacks {', '.join(lacks)}"
    try:
        check_precision(cfg, examined.device)
    except UserError as error:
        return sentence(error)
    if wanted is True:
        return None
    need, (free, where) = _needed(examined), free_memory(examined.device)
    if need > free:
        return f"{amount(need)} needed, {amount(free)} free {where}; task.steps=true tries it all the same"
    count = sum(math.prod(parameter.shape) for parameter in examined.model.parameters())
    if examined.device == "cpu" and count > _LARGE:
        return f"{count:,} parameters take minutes on a CPU; task.steps=true tries it all the same"
    return None


def _needed(examined: Examined) -> int:
    """Bytes of the trial, which is one rank's."""
    if not examined.trains:
        return stored_bytes(examined.model) + _BESIDE
    found, _ = prediction_of(examined.cfg, Layout(Degrees(1, 1, 1)), examined.texts)
    return found.resident if examined.device == "cpu" else found.peak


class TrialRun(Run):
    """A folder below the doctor's, a console that only listens, and an eye on the gradients; no checkpoints."""

    def __init__(self, examined: Examined):
        folder = examined.run.path(examined.name, "trial")
        shutil.rmtree(folder, ignore_errors=True)  # of a check-up before, in the same run folder
        folder.mkdir(parents=True, exist_ok=True)
        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        context = Context(device=examined.device)
        super().__init__(folder, folder, examined.name, context, console, Loggers())
        self.objective: nn.Layer | None = None
        self.reached: dict[str, tuple[bool, bool]] = {}  # parameter -> its gradient is finite, and is not all 0
        self._hooks: list[Any] = []

    def begin_training(self, objective: nn.Layer) -> bool:
        """Watch its gradients."""
        self.objective = objective
        for name, parameter in objective.named_parameters():
            if not parameter.stop_gradient:
                self._hooks.append(parameter.register_hook(self._watch(name)))
        return False

    def _watch(self, name: str) -> Any:
        @paddle.no_grad()
        def seen(gradient: paddle.Tensor) -> None:
            finite, moves = self.reached.get(name, (True, False))
            largest = float(gradient.abs().max())
            self.reached[name] = (finite and math.isfinite(largest), moves or largest > 0)

        return seen

    def let_go(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def said(self) -> list[str]:
        """What the task printed."""
        return [line.rstrip() for line in self.console.file.getvalue().splitlines() if line.strip()]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of a .jsonl file in its folder."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _small(cfg: RunConfig) -> RunConfig:
    """The task as it is, for one step and two samples; all losses at once, and no process beside this one."""
    cfg = copy.deepcopy(cfg)
    task = cfg.task
    cfg.resume, cfg.prune.metric = NEVER, None  # it is nobody's continuation, and one step is no reason to give up
    cfg.dataset.eval_limit, cfg.dataset.num_workers = _SAMPLES, 0
    short = {
        **{"max_steps": 1, "max_epochs": None, "log_every": 1, "eval_every": None, "save_every": None},
        **{"accumulate": 2 if getattr(task, "cached_contrast", False) else 1, "contrast_steps": 0},
        **{"keep_best": 0, "best_metric": None, "blind_baseline": False, "metrics": ["ROUGE_L"], "eval_batch_size": _SAMPLES},
    }
    for name, value in short.items():
        if hasattr(task, name):
            setattr(task, name, value)
    if hasattr(task, "validation"):
        task.validation.max_images = _SAMPLES
        task.validation.captions = True
    if isinstance(task, PredictConfig):
        first = dict(list(pictures_and_prompts(task).items())[:_SAMPLES])
        task.inputs, task.prompts, task.prompt = list(first), None, next(iter(first.values()))[0]
    return cfg


def _judge_step(out: Findings, run: TrialRun, examined: Examined) -> None:
    line = next((row for row in run.rows(METRICS_FILE) if "lr" in row), {})
    losses = {name: value for name, value in line.items() if "loss" in name}
    rest = {name: value for name, value in line.items() if name in ("itc", "itm", "lm", "grad_norm")}
    said = ", ".join(f"{name} {value:.4g}" for name, value in {**losses, **rest}.items())
    waited = line.get("data_wait", 0) * line["seconds"]
    took = f"{line['seconds']:.2f} s for {examined.cfg.task.batch_size} samples"
    time_said = f"{took}, {waited:.2f} s of it for the batch; later steps are quicker"
    finite = all(math.isfinite(value) for value in losses.values())
    (out.fine if finite else out.broken)("one step", f"{said}; {time_said}")
    trained = [name for name, parameter in run.objective.named_parameters() if not parameter.stop_gradient]
    without = [name for name in trained if name not in run.reached]
    bad = [name for name, (finite, _) in run.reached.items() if not finite]
    last = f".layers.{examined.cfg.model.qformer.depth - 1}.text_ffn."
    still = [name for name, (finite, moves) in run.reached.items() if finite and not moves]
    if without or bad:
        named = _named(without or bad)
        out.broken(
            "gradients", f"{len(without)} of {len(trained)} trained tensors have none, {len(bad)} not a finite one: {named}"
        )
    elif still and examined.stage == "answering" and all(last in name for name in still):
        said = f"all of {len(trained)} trained tensors have one, of zeros in {len(still)} of the last layer's feed-forward of"
        out.fine("gradients", f"{said} texts, which no query reads any more")
    elif still:
        out.look("gradients", f"{len(still)} of {len(trained)} trained tensors have one of zeros: {_named(still)}")
    else:
        out.fine("gradients", f"all of {len(trained)} trained tensors have one")
    frozen = {name: parameter for name, parameter in run.objective.named_parameters() if parameter.stop_gradient}
    reached = [name for name, parameter in frozen.items() if parameter.grad is not None]
    if reached:
        out.broken("frozen parts", f"{len(reached)} of {len(frozen)} frozen tensors have a gradient: {_named(reached)}")
    elif frozen:
        out.fine("frozen parts", f"none of {len(frozen)} tensors has a gradient")


def _named(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _judge_texts(out: Findings, run: TrialRun, examined: Examined) -> None:
    texts = _texts(run)
    if not texts:
        searched = [row for row in run.rows("predictions.jsonl") if "retrieved_texts" in row]
        if searched:
            out.shown += [f"{row['image']}: {row['retrieved_texts'][0]['text']!r} comes first" for row in searched]
            out.fine("one search", f"{len(searched)} images and their texts, above")
        elif examined.stage not in ("vision", "language"):
            out.look("one generation", "nothing was written", "task.validation and the decoding settings say what is")
        return
    out.shown += texts
    out.record["texts"] = texts
    empty = sum(text.endswith(": ''") for text in texts)
    said = f"{len(texts)} texts, above"
    if empty:
        out.look("one generation", f"{said}; {empty} of them empty", "normal for a model that was not trained yet")
    else:
        out.fine("one generation", said)


def _texts(run: TrialRun) -> list[str]:
    """What was written about which picture: as the predictions have it, else as the validation showed it."""
    found = []
    for row in run.rows("predictions.jsonl"):
        said = row.get("prediction", row.get("caption"))
        said = (row.get("texts") or [None])[0] if said is None else said
        if said is not None:
            about = row.get("question") or row.get("source") or row.get("image") or row.get("image_id")
            found.append(f"{about}: {said!r}")
    if found:
        return found
    lines = run.said()
    places = [place for place, line in enumerate(lines) if _CAPTIONED.match(line)]
    for line in lines[places[-1] + 1 :] if places else []:
        if not line.startswith("  "):
            break
        name, _, text = line.strip().partition(": ")
        found.append(f"{name}: {text!r}")
    return found
