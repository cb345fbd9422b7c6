"""Serve a trained model: a page to try it in the browser, and the JSON API behind that page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import paddle
from paddle import Tensor, nn
from PIL import Image

from blip2x.config.run import RunConfig
from blip2x.data.tokenize import TextTokenizer
from blip2x.data.transforms import EvalTransform
from blip2x.engine.stop import StopSignals
from blip2x.errors import Interrupted, UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.models.prefix import SharedQueries
from blip2x.models.qformer.qformer import Cache
from blip2x.parallel.devices import started_processes
from blip2x.registry import TASKS
from blip2x.tasks.common.captioning import Text, captions_behind, write_about
from blip2x.tasks.common.conversation import positions_of, prompt_room
from blip2x.tasks.common.loading import eval_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.weights import Start
from blip2x.tasks.predict import Predict
from blip2x.tasks.serving.app import Written, answer_settings, build_app
from blip2x.tasks.serving.jobs import Jobs
from blip2x.tasks.serving.server import address_of, bind, is_this_machine, require_free, serving


@TASKS.register("serve")
class Serve(Task):
    """The main thread works with the model, as in all tasks; another one is the server. Requests write no files."""

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """As task=predict."""
        return Predict.weight_keys(cfg)

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """As task=predict."""
        return Predict.starts_from(cfg)

    @classmethod
    def check(cls, cfg: RunConfig, promised: frozenset[str] = frozenset()) -> None:
        """As for all tasks, and the decoding options, and that the address is free; it is one process."""
        if started_processes() > 1:
            raise UserError(f"task=serve is one process, not {started_processes()}; start it without a launcher")
        answer_settings(cfg.task)
        super().check(cfg, promised)
        require_free(cfg.task.host, cfg.task.port)

    @paddle.no_grad()
    def run(self) -> NoReturn:
        """Serve until the process is asked to stop, which raises `Interrupted`."""
        sock = bind(self.task.host, self.task.port)  # first: somebody may have been quicker since the check
        jobs = Jobs(self.task.max_queue)
        model = self._model(jobs.look)
        checkpoint = str(self.cfg.model.weights)
        limit = self.cfg.dataset.max_pixels
        app = build_app(self.task, model, jobs, name=self.cfg.model.name, checkpoint=checkpoint, max_pixels=limit)
        with StopSignals() as stop, serving(app, sock) as server:
            self._say(f"serving on {address_of(sock)} (Ctrl-C ends it)")
            if not is_this_machine(self.task.host):
                self.console.print(
                    f"warning: task.host={self.task.host}: everybody who can reach this machine can use the model, without a "
                    "password and unencrypted; docs/serve.md says how to put something in front of it",
                    style="yellow",
                    markup=False,
                )
            jobs.work(lambda: stop.received is not None or not server.is_alive())
            if stop.received is None:
                raise RuntimeError("the server ended by itself")
            raise Interrupted(f"{stop.received}; the server has ended")

    def _model(self, look: Callable[[], None]) -> _CaptionModel | _AnsweringModel:
        loader, transform = ModelLoader.of_run(self.cfg, self.run_folder), eval_transform(self.cfg)
        if self.task.stage == 1:
            model, tokenizer = loader.stage1()
            _look_often(model, look)
            return _CaptionModel(model, tokenizer, transform, self.cfg.model.qformer.max_positions)
        model, tokenizer = loader.stage2(new_projection=False)
        _look_often(model, look)
        language, queries = self.cfg.model.language, self.cfg.model.qformer.num_queries
        return _AnsweringModel(model, tokenizer, transform, positions_of(language), queries, self.task.limit_prompt_tokens)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _AnsweringModel:
    """A `ServedModel` of stage 2; a prompt has at most `limit` tokens, and what the language model's `positions` leave."""

    answers = True

    def __init__(
        self,
        model: Stage2Model,
        tokenizer: TextTokenizer,
        transform: EvalTransform,
        positions: float,
        queries: int,
        limit: int,
    ):
        self.model, self.tokenizer, self.transform = model, tokenizer, transform
        self.positions, self.queries, self.limit = positions, queries, limit

    def encode(self, picture: Image.Image) -> tuple[SharedQueries, int]:
        """Its soft prompt, and what the language model made of it, which serves all that is asked."""
        queries = self.model.language.share(self.model.encode(_image(picture, self.transform)))
        return queries, _memory([queries.query_IQD], *(queries.read or []))

    def fits(self, prompt: str, settings: GenerationSettings) -> bool:
        """See `ServedModel`."""
        room = prompt_room(self.positions, self.queries, settings.max_new_tokens)
        return len(self.tokenizer.tokens(prompt)) <= min(self.limit, room)

    def write(self, queries: SharedQueries, prompt: str, settings: GenerationSettings) -> list[Written]:
        """See `ServedModel`."""
        if not self.fits(prompt, settings):
            tokens = len(self.tokenizer.tokens(prompt))
            if tokens > self.limit:
                raise UserError(
                    f"a prompt of {tokens} tokens is more than this server allows: task.limit_prompt_tokens={self.limit}; "
                    "shorten it"
                )
            raise UserError(
                f"a prompt of {tokens} tokens and max_new_tokens={settings.max_new_tokens} make more than the "
                f"{self.positions - self.queries} that this language model has room for behind the queries; shorten the "
                "prompt, or ask for less"
            )
        (texts,) = write_about(self.model, self.tokenizer, queries, [0], [prompt], settings)
        return [_written(text, self.tokenizer) for text in texts]


class _CaptionModel:
    """A `ServedModel` of stage 1, which answers nothing; `room`: the Q-Former's positions for a text."""

    answers = False

    def __init__(self, model: Stage1Model, tokenizer: TextTokenizer, transform: EvalTransform, room: int):
        self.model, self.tokenizer, self.transform, self.room = model, tokenizer, transform, room

    def encode(self, picture: Image.Image) -> tuple[Cache, int]:
        """The queries' keys and values in each layer."""
        *_, cache = self.model.image_features(_image(picture, self.transform))
        return cache, _memory(*cache)

    def fits(self, prompt: str, settings: GenerationSettings) -> bool:
        """See `ServedModel`; the prompt is empty."""
        return settings.max_new_tokens <= self.room

    def write(self, cache: Cache, prompt: str, settings: GenerationSettings) -> list[Written]:
        """See `ServedModel`; the prompt is empty."""
        if not self.fits(prompt, settings):
            raise UserError(f"max_new_tokens={settings.max_new_tokens} is more than the Q-Former's {self.room} positions")
        (texts,) = captions_behind(self.model, self.tokenizer, cache, settings)
        return [_written(text, self.tokenizer) for text in texts]


def _look_often(model: nn.Layer, look: Callable[[], None]) -> None:
    """Call `look` before each innermost layer computes, so that what it raises ends the work at once."""
    for layer in model.sublayers():
        if not layer.sublayers():
            layer.register_forward_pre_hook(lambda *_: look())


def _image(picture: Image.Image, transform: EvalTransform) -> Tensor:
    return paddle.to_tensor(transform(picture)).unsqueeze(0)


def _memory(*groups: Sequence[Tensor]) -> int:
    return sum(tensor.size * tensor.element_size() for tensors in groups for tensor in tensors)


def _written(text: Text, tokenizer: TextTokenizer) -> Written:
    return Written(text.text, text.score, len(tokenizer.tokens(text.text)))
