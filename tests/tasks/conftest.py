"""A run folder with the checkpoints of a small model that learned nothing, as the demo's pipeline leaves them behind."""

from __future__ import annotations

import functools
import io
import json
import pickle
import shlex
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image
from rich.console import Console

from blip2x.config.auto import PARTS
from blip2x.config.compose import compose_config
from blip2x.data.tokenize import train_tokenizer
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.models.assemblies.patch_classifier import PatchClassifier
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.freeze import freeze
from blip2x.models.vision.eva_vit import EvaVit
from blip2x.models.weights.describe import follow_source, settings_of
from blip2x.parallel.context import Context, TensorGroup
from blip2x.registry import TASKS
from blip2x.tasks.common.launch import launch
from blip2x.tasks.common.weights import normalisation

SMALL = [
    *(f"model.{part}.depth=1" for part in ("vision", "qformer", "language")),
    *(f"model.{part}.width=24" for part in ("vision", "qformer", "language")),
    *(f"model.{part}.mlp_width=32" for part in ("vision", "qformer", "language")),
]
TEXTS = ["a red two left of a blue three", "question: which digit is on the left? short answer: two"]


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Overrides of the model that `trained` has."""
    return SMALL


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run folder with pretrain_vision, pretrain_language, pretrain_stage1 and pretrain_stage2; its words are of `TEXTS`."""
    run, cfg = tmp_path_factory.mktemp("trained") / "run", compose_config(["task=caption", *SMALL])
    cfg.model = follow_source(cfg.model, None)
    paddle.seed(0)
    qformer_words, language_words = train_tokenizer(TEXTS, "bert"), train_tokenizer(TEXTS, "opt")
    stage1 = build_stage1(cfg.model, vocab_size=qformer_words.vocab_size)
    stage2 = build_stage2(cfg.model, vocab_size=language_words.vocab_size)
    stage2.vision = stage1.vision
    for parameter in [*stage1.parameters(), *stage2.language.parameters(), *stage2.qformer.parameters()]:
        if parameter.ndim == 2:  # the usual start is so small that all pictures would get the same text
            parameter.set_value(5 * parameter)

    def save(kind, model, tokenizers, *frozen):
        origin = {part: str(run / f"pretrain_{part}" / "checkpoint") for part in frozen}
        settings = settings_of(cfg.model, [part for part in PARTS if hasattr(model, part)])
        extra = {"settings": settings, "normalisation": normalisation(cfg.dataset)}
        folder = run / kind / "checkpoint"
        save_checkpoint(folder, model, kind=kind, step=1, tokenizers=tokenizers, frozen_origin=origin, extra=extra)

    save("pretrain_vision", PatchClassifier(stage1.vision, {"digit": 11}), {})
    save("pretrain_language", stage2.language, {"language": language_words})
    freeze(stage1.vision)
    freeze(stage2.language)
    save("pretrain_stage1", stage1, {"qformer": qformer_words}, "vision")
    save("pretrain_stage2", stage2, {"language": language_words}, "vision", "language")
    return run


@pytest.fixture
def run(tmp_path) -> Run:
    """A run in a temporary folder, whose console writes into a string."""
    folder = tmp_path / "run"
    folder.mkdir()
    return Run(folder, folder, "s", Context(), Console(file=io.StringIO(), width=200), Loggers())


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with a.png, b.jpg and more/c.png."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, size in {"a.png": (48, 48), "b.jpg": (400, 300), "more/c.png": (60, 30)}.items():
        Image.effect_noise(size, 90).convert("RGB").save(folder / name)
    return folder


@pytest.fixture
def server(pictures, monkeypatch):
    """(The address of a web server that has `pictures`, the paths that it was asked for)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *arguments):
            asked.append(self.path)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(pictures)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def over_ranks(tmp_path):
    """`over_ranks(count, work, tensor=1)` -> what `work(run)` gives on each of `count` ranks, threads that take turns."""

    def call(count: int, work: Callable[[Run], Any], tensor: int = 1) -> list[Any]:
        turn, meeting, values = threading.Lock(), threading.Barrier(count, timeout=60), [None] * count
        found: list[Any] = [None] * count
        errors: list[BaseException | None] = [None] * count

        class Rank(Context):
            def _everyones(self, value):
                values[self.rank] = pickle.loads(pickle.dumps(value))
                turn.release()
                try:
                    meeting.wait()
                    everyones = list(values)
                    meeting.wait()
                finally:
                    turn.acquire()
                return everyones

            def gather_objects(self, value):
                group = self.tensor.rank  # each of these ranks meets those with other samples
                return self._everyones(value)[group :: self.tensor.size]

            def broadcast_object(self, value):
                return self._everyones(value)[0]

        def one(rank: int) -> None:
            with turn:
                try:
                    context = Rank(rank, count, tensor=TensorGroup(rank % tensor, tensor))
                    console = Console(file=io.StringIO(), width=200, quiet=rank > 0)
                    found[rank] = work(Run(tmp_path, tmp_path, "s", context, console, Loggers()))
                except BaseException as error:
                    errors[rank] = error
                    meeting.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = [error for error in errors if error and not isinstance(error, threading.BrokenBarrierError)]
        if failed:
            raise failed[0]
        return found

    return call


@pytest.fixture
def run_task(tmp_path):
    """`run_task(task, *overrides)` -> (metrics, run folder) of the task alone, on 64 scenes and 12 to evaluate on."""

    def run(task: str, *overrides: str) -> tuple[dict[str, float], Path]:
        few = ["dataset.train_scenes=64", "dataset.test_scenes=12", "task.eval_batch_size=5", "optim.warmup_steps=0"]
        steps = ["task.batch_size=8", "task.max_steps=4", "task.max_epochs=null", "task.log_every=1"]
        few += steps if task.startswith("pretrain") else []
        command = [f"task={task}", *few, f"paths.outputs={tmp_path}", f"run_name={task}", "overwrite=true", *overrides]
        return launch(compose_config(command), command)[task], tmp_path / task

    return run


@pytest.fixture
def validations():
    """`validations(folder)` -> the lines of metrics.jsonl that `evaluate` gave; they name what the task says they name."""

    def read(folder: Path) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found = [line for line in lines if "lr" not in line]
        cfg = compose_config(shlex.split((folder / "command.txt").read_text()))
        for line in found:
            named = {name for name in line if "/" not in name} - {"stage", "step"}
            assert named == TASKS.get(cfg.task.kind).validation_metrics(cfg)
            assert not named & {name for other in lines if "lr" in other for name in other}
        return found

    return read


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of images in each call of an image encoder."""
    calls, forward = [], EvaVit.forward

    def count(self, image_BCHW):
        calls.append(len(image_BCHW))
        return forward(self, image_BCHW)

    monkeypatch.setattr(EvaVit, "forward", count)
    return calls


@pytest.fixture
def watch_training(monkeypatch):
    """`watch_training(module)` -> a list that gets {name: array} of the model before and after each training of that task."""

    def watch(module: Any) -> list[dict[str, np.ndarray]]:
        found, train = [], module.train

        def spy(cfg, run, objective, model, *arguments, **named):
            found.append({name: p.numpy().copy() for name, p in model.named_parameters()})
            result = train(cfg, run, objective, model, *arguments, **named)
            found.append({name: p.numpy().copy() for name, p in model.named_parameters()})
            return result

        monkeypatch.setattr(module, "train", spy)
        return found

    return watch
