"""Describe any pictures, or answer one question about each, with a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.config.model import OptConfig
from blip2x.config.run import RunConfig
from blip2x.data.download import WebImage, is_web_address
from blip2x.data.picture_inputs import list_pictures
from blip2x.data.pictures import PathImage
from blip2x.data.samples import Picture, PictureSample
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.models.qformer.qformer import QFormer
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import TASKS
from blip2x.tasks.common.attention import draw_looks, keep_shares, write_looks
from blip2x.tasks.common.captioning import Text, write_captions, write_texts
from blip2x.tasks.common.loading import Share, eval_transform
from blip2x.tasks.common.merge import gather_rows
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.pictures import ThumbnailCollate, one_in, thumbnails, write_thumbnail
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.weights import STAGE2, Start

Write = Callable[[Tensor], list[list[Text]]]  # image_BCHW -> each image's texts, best first
_EMPTY = "(empty)"


@TASKS.register("predict")
class Predict(Task):
    """Each picture is opened once, for the model and the report; of the data set only the transform is used."""

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """Stage 1 has no language model."""
        parts = ["model.vision.weights", "model.weights"]
        return parts if cfg.task.stage == 1 else [*parts, "model.language.weights"]

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """A model that went through the stage that is asked for."""
        if cfg.task.stage == 1:
            hint = " (task.stage=1); one of stage 2 describes pictures with task.stage=2"
            return Start("qformer.text.", ("pretrain_stage1", "retrieval"), hint)
        return replace(STAGE2, hint="; one of stage 1 describes pictures with task.stage=1")

    @classmethod
    def check(cls, cfg: RunConfig, promised: frozenset[str] = frozenset()) -> None:
        """As for all tasks, and the decoding options and the inputs; addresses are not tried."""
        GenerationSettings.from_config(cfg.task)
        list_pictures(cfg.task.inputs)
        super().check(cfg, promised)

    def run(self) -> TaskResult:
        """Write texts for all inputs; how many there are, and how many were left out."""
        names = self.context.on_main(lambda: list_pictures(self.task.inputs))
        rows = self._predict(*self._writer(), names)
        self.run_folder.write_lines(rows, "predictions.jsonl")
        return TaskResult({"images": len(rows), "skipped": len(names) - len(rows)})

    def _writer(self) -> tuple[QFormer, Write]:
        loader, settings = ModelLoader.of_run(self.cfg, self.run_folder), GenerationSettings.from_config(self.task)
        if self.task.stage == 1:
            model, tokenizer = loader.stage1()
            return model.qformer, lambda image_BCHW: write_captions(model, tokenizer, image_BCHW, settings)
        model, tokenizer = loader.stage2(new_projection=False)
        self._check_prompt(tokenizer)
        prompt = self.task.prompt.strip()
        if prompt:  # as its tokens say it: a small vocabulary lacks words
            self._print(f"prompt: {tokenizer.decode(tokenizer.tokens(prompt))}")

        def write(image_BCHW: Tensor) -> list[list[Text]]:
            return write_texts(model, tokenizer, model.encode(image_BCHW), [prompt] * len(image_BCHW), settings)

        return model.qformer, write

    def _check_prompt(self, tokenizer: TextTokenizer) -> None:
        """OPT has a limit that only the tokenizer can tell whether the prompt keeps."""
        tokens = len(tokenizer.tokens(self.task.prompt))
        language, queries = self.cfg.model.language, self.cfg.model.qformer.num_queries
        if isinstance(language, OptConfig) and queries + tokens + self.task.max_new_tokens > language.max_positions:
            raise UserError(
                f"task.prompt of {tokens} tokens, {queries} queries and task.max_new_tokens={self.task.max_new_tokens} "
                f"make more than model.language.max_positions={language.max_positions}; shorten the prompt"
            )

    @paddle.no_grad()
    def _predict(self, qformer: QFormer, write: Write, names: list[str]) -> list[dict[str, Any]]:
        """The rows of predictions.jsonl, in the order of `names`, on every rank."""
        samples = [PictureSample(self._picture(name), number) for number, name in enumerate(names)]
        collate = ThumbnailCollate(eval_transform(self.cfg), every=one_in(len(samples)))
        looked_at = draw_looks(range(0, len(samples), collate.every))
        shares: dict[int, np.ndarray] = {}
        share = Share(self.cfg, self.run_folder, samples, collate, "predict", may_be_empty=True)
        seed_everything(self.cfg.seed, self.context.data_rank)  # ranks that share a matrix draw alike
        rows: list[tuple[int, dict[str, Any]]] = []
        for _, batch in share:
            copies = thumbnails(batch)
            numbers = batch["image_id_B"].tolist()
            with keep_shares(qformer, {number: row for row, number in enumerate(numbers) if number in looked_at}, shares):
                written = write(to_tensors(batch)["image_BCHW"])
            for number, texts in zip(numbers, written, strict=True):
                self._show(names[number], texts)
                found = {"texts": texts, "copy": copies.get(number), "share_QP": shares.pop(number, None)}
                rows.append((number, {"number": number, **found}))
        merged = gather_rows(self.context, rows, share.found)
        return self.context.on_main(lambda: [self._row(names[row["number"]], **row) for row in merged])

    def _row(
        self, name: str, number: int, texts: list[Text], copy: bytes | None, share_QP: np.ndarray | None
    ) -> dict[str, Any]:
        attention = None if share_QP is None else write_looks(self.run_folder, number, copy, share_QP)
        return {
            "stage": self.run_folder.stage,
            "source": name,
            "prompt": self.task.prompt.strip(),
            "texts": [text.text for text in texts],
            "scores": [text.score for text in texts],
            "image": copy and write_thumbnail(self.run_folder, number, copy),
            **({"attention": attention} if attention else {}),
        }

    def _picture(self, name: str) -> Picture:
        limit = self.cfg.dataset.max_pixels
        return WebImage(name, limit) if is_web_address(name) else PathImage(Path(name), limit)

    def _show(self, name: str, texts: list[Text]) -> None:
        """One text beside its picture's name; several below it, with their scores."""
        several = "".join(f"\n  {text.score:7.2f}  {text.text or _EMPTY}" for text in texts)
        line = f"{name}: {texts[0].text or _EMPTY}" if len(texts) == 1 else f"{name}:{several}"
        self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
