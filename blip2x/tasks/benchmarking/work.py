"""One step of each task, done by what the task itself uses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import paddle

from blip2x.data.collate import Collate, Stage1Collate
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.engine.amp import LossScale, full_precision
from blip2x.engine.batches import batch_size, to_tensors
from blip2x.engine.run import Run
from blip2x.engine.stream import Stream
from blip2x.generation.settings import GenerationSettings
from blip2x.models.freeze import set_train_mode
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.optim.build import build_optimizer
from blip2x.tasks.benchmarking.clock import Clock
from blip2x.tasks.benchmarking.jobs import Job
from blip2x.tasks.benchmarking.made_up import made_up_captions, made_up_questions
from blip2x.tasks.benchmarking.models import Model
from blip2x.tasks.common.answering import Answering, asked
from blip2x.tasks.common.captioning import HeldOutCaptions, encode_prompts, stage2_collate
from blip2x.tasks.common.features import Features, crops_kept, keeps_features
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.loading import eval_loader, train_loader, train_transform
from blip2x.tasks.common.patch_store import PatchStore
from blip2x.tasks.common.retrieval import Texts, searched_texts
from blip2x.tasks.retrieval import Search

Methods = list[tuple[Any, str, str]]  # object, name of its method, part that its time counts as


class Work:
    """A task that can be done step by step.

    Attributes:
        methods: what `timed` is to wrap.
        tokens: of all ranks in a step: that a training has to predict, or that are written; 0: none.
        texts: of this rank in a micro-batch, or where nothing is trained in a step.
        text_tokens: of each of them, as long as the longest is.
        output_tokens: the same of what an encoder-decoder is trained to write.
        pairs: of an image and a text that this rank matched in the last step of a search.
        encodes: whether images go through the encoder; false: its outputs are kept.
    """

    tokens = 0.0
    texts = text_tokens = output_tokens = pairs = 0

    def __init__(self, job: Job, run: Run, model: Model, tokenizer: Any):
        self.job, self.run, self.model, self.tokenizer = job, run, model, tokenizer
        self.encodes = not keeps_features(job.cfg)
        self.methods: Methods = [(model.vision, "forward", "vision")]

    @abstractmethod
    def step(self, clock: Clock) -> None:
        """Do it once; `clock` may not be running."""

    @property
    def images(self) -> int:
        """Of all ranks in a step."""
        return self.job.images(self.run.context.data_size)


class Training(Work):
    """Optimizer steps as `blip2x.engine.fit` makes them, without what it does now and then: lines, validations, checkpoints."""

    def __init__(self, job: Job, run: Run, model: Model, tokenizer: Any):
        super().__init__(job, run, model, tokenizer)
        cfg, transform = job.cfg, train_transform(job.cfg)
        if job.reads_language:
            self._objective = Stage2Objective(model, run.context)
            collate = stage2_collate(cfg.task, tokenizer, transform)
            self.methods += [*_passes(model), (model.language, "forward", "language")]
        else:
            self._objective = Stage1Objective(model, run.context, cfg.task, dec_id=tokenizer.dec_id)
            collate = Stage1Collate(transform, tokenizer, cfg.task.max_txt_len)
            self.methods += _passes(model)
        samples = build_source(cfg).captions("train") if job.task.data else made_up_captions(job, self.images)
        features = Features.of(cfg, run, model)
        self._stream = Stream(train_loader(cfg, run, samples, collate, features))
        if features:  # the steps are those of later epochs
            features.expect(samples, collate, crops_kept(cfg), job.name, begins=True)
            self._fill(samples, collate, features)
        optimizer, self._schedule = build_optimizer(cfg.optim, self._objective, 10**9)
        self._wrapped, self._optimizer = run.context.wrap(self._objective, optimizer)
        self._parameters = [parameter for parameter in self._objective.parameters() if not parameter.stop_gradient]
        self._scale = LossScale(cfg.precision)
        set_train_mode(self._objective)

    def _fill(self, samples: Sequence[CaptionSample], collate: Collate, features: Features) -> None:
        """Have all crops of all samples kept; a training's loader leaves some samples out of each epoch."""
        loader = eval_loader(self.job.cfg, self.run, samples, collate, features)
        for crop in range(crops_kept(self.job.cfg)):
            loader.set_epoch(crop)
            for _ in loader:
                pass
        features.report()  # behind which each rank finds what the others have kept

    def step(self, clock: Clock) -> None:
        """One step of the optimizer."""
        accumulate, context = self.job.cfg.task.accumulate, self.run.context
        with clock.part("data"):
            batches = [to_tensors(next(self._stream)) for _ in range(accumulate)]
        self._see(batches[0])
        if hasattr(self._objective, "set_step"):
            self._objective.set_step(0)
        with clock.part("losses"):
            batches = self._objective.prepare(batches)
        tokens = batches[0]["tokens"]
        while batches:
            batch = batches.pop(0)
            with context.accumulating(self._wrapped) if batches else nullcontext():
                with clock.part("losses"):
                    parts = self._wrapped(batch)
                with clock.part("backward"), full_precision():
                    (parts["loss"] * (self._scale.value / accumulate)).backward()
        with clock.part("optimizer"), full_precision():
            if self._scale.value != 1:
                with paddle.no_grad():
                    for parameter in self._parameters:
                        if parameter.grad is not None:
                            parameter.grad.scale_(1 / self._scale.value)
            self._optimizer.step()
            self._optimizer.clear_grad()
            self._schedule.step()
        self.tokens = float(tokens)

    def _see(self, batch: dict[str, Any]) -> None:
        lengths = {name: array.shape[1] for name, array in batch.items() if "_ids_" in name}
        self.texts = batch_size(batch)
        self.text_tokens = lengths.get("text_ids_BL", lengths.get("input_ids_BL", 0))
        self.output_tokens = lengths.get("output_ids_BT", 0)


class Writing(Work):
    """What the tasks that write share: the parts of decoding, and how much is written."""

    def __init__(self, job: Job, run: Run, model: Model, tokenizer: Any):
        super().__init__(job, run, model, tokenizer)
        language = model.language
        self.methods += [
            *_passes(model),
            (language, "share", "prefill"),
            (language, "prefill", "prefill"),
            (language, "step", "decode"),
            (language, "reorder", "reorder"),
        ]
        self._settings = GenerationSettings.from_config(job.cfg.task)

    def _count(self, prompts: Sequence[str]) -> None:
        context = self.run.context
        self.texts = -(-len(prompts) // context.data_size)
        self.text_tokens = encode_prompts(self.tokenizer, prompts)[0].shape[1]
        self.tokens = len(prompts) * self._settings.num_return_sequences * self._settings.max_new_tokens


class Captioning(Writing):
    """All images once, as task=caption."""

    def __init__(self, job: Job, run: Run, model: Model, tokenizer: Any):
        super().__init__(job, run, model, tokenizer)
        samples = build_source(job.cfg).captions("eval") if job.task.data else made_up_captions(job, self.images)
        self._captions = HeldOutCaptions(job.cfg, run, model, tokenizer, samples, settings=self._settings, limit=None)
        self._count([job.cfg.task.prompt] * len(samples))

    def step(self, clock: Clock) -> None:
        """Caption them."""
        self._captions.caption()


class Asking(Writing):
    """All questions once, as task=vqa_zeroshot."""

    def __init__(self, job: Job, run: Run, model: Model, tokenizer: Any):
        super().__init__(job, run, model, tokenizer)
        questions = build_source(job.cfg).questions("eval") if job.task.data else made_up_questions(job, self.images)
        self._questions: Sequence[QuestionSample] = questions
        clean = job.cfg.task.clean_questions
        self._count([asked(job.cfg.task.prompt, question, clean=clean) for question in questions])

    def step(self, clock: Clock) -> None:
        """Answer them."""
        cfg, model = self.job.cfg, self.model
        _Asked(
            cfg,
            self.run,
            model,
            self.tokenizer,
            self._questions,
            settings=self._settings,
            prompt=cfg.task.prompt,
            encode=model.soft_prompt,
        ).answer()


class _Asked(Answering):
    """Without a look at the queries, which an evaluation keeps of its first few images, so that it would count too much."""

    def _looking(self, rows: Mapping[int, int]) -> AbstractContextManager[None]:
        return nullcontext()


class Searching(Work):
    """All images and texts once, as task=retrieval."""

    def __init__(self, job: Job, run: Run, model: Model, tokenizer: Any):
        super().__init__(job, run, model, tokenizer)
        self._samples = build_source(job.cfg).captions("eval") if job.task.data else made_up_captions(job, self.images)
        self.methods += _passes(model)
        texts = searched_texts(job.cfg.task, self._samples)
        self.texts = -(-sum(map(len, texts)) // run.context.data_size)
        self.text_tokens = Texts.of(texts, tokenizer, job.cfg.task.eval_max_txt_len).ids_ML.shape[1]

    def step(self, clock: Clock) -> None:
        """Search them."""
        search = _Searched(self.job.cfg, self.run, self.model, self.tokenizer, self._samples)
        search()
        self.pairs = search.pairs


class _Searched(Search):
    """Counts the pairs that this rank is to match; batches of them may repeat some."""

    pairs = 0

    def _match(self, store: PatchStore, found: np.ndarray, texts: Texts, pair_K: np.ndarray) -> np.ndarray:
        self.pairs = int(np.isin(found[pair_K // len(texts.texts)], store.places).sum())
        return super()._match(store, found, texts, pair_K)


def work_of(job: Job, run: Run, model: Model, tokenizer: Any) -> Work:
    """What does the steps of `job` in `run`, whose folder is used up.

    Raises:
        UserError: the data set has too few samples to train on, or none of the kind.
    """
    kinds = {"caption": Captioning, "vqa_zeroshot": Asking, "retrieval": Searching}
    work = kinds.get(job.name, Training)(job, run, model, tokenizer)
    if not (work.encodes or job.trains):  # a training has filled its cache already
        work.step(Clock(lambda: None))
    return work


def _passes(model: Model) -> Methods:
    """Of the Q-Former."""
    names = {
        "look": "image",
        "encode_image": "image",
        "encode_text": "text",
        "encode_pair": "pair",
        "caption_logits": "caption",
    }
    return [(model.qformer, method, f"qformer_{name}") for method, name in names.items()]
