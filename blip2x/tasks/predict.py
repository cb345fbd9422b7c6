"""Describe any pictures, or answer questions about each, with a trained model."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.config.run import RunConfig
from blip2x.config.tools import PredictConfig, PredictionFormat
from blip2x.data.download import WebImage, is_web_address
from blip2x.data.picture_inputs import list_pictures
from blip2x.data.pictures import PathImage
from blip2x.data.prompts import read_prompts
from blip2x.data.samples import Picture, PictureSample
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.folders import write_whole
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.models.qformer.qformer import QFormer
from blip2x.pages import render_page
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import TASKS
from blip2x.tasks.common.attention import draw_looks, keep_shares, looks_file, write_looks
from blip2x.tasks.common.captioning import write_about, write_captions
from blip2x.tasks.common.conversation import Asker, Reply, positions_of, prompt_room
from blip2x.tasks.common.loading import Share, eval_transform
from blip2x.tasks.common.merge import gather_rows
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.parts import Parts
from blip2x.tasks.common.pictures import ThumbnailCollate, is_small, one_in, thumbnail_uri, thumbnails, write_thumbnail
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.weights import STAGE2, Start

Ask = Callable[[Tensor, Sequence[Sequence[str]]], list[list[Reply]]]  # image_BCHW, what is asked of each -> its replies
Entry = dict[str, Any]  # of a picture: source, asked, replies, and of some copy and attention (files' contents in base64)
_EMPTY = "(empty)"
_COLUMNS = ("source", "asked", "prompt", "place", "text", "score")  # of predictions.csv


def pictures_and_prompts(task: PredictConfig) -> dict[str, list[str]]:
    """Path or address of each picture -> what is asked of it, in order; without a file of prompts the task's prompt.

    Raises:
        UserError: no such picture or file of prompts, or both name pictures, or none does.
    """
    if task.prompts is None:
        return {name: [task.prompt.strip()] for name in list_pictures(task.inputs)}
    prompts = read_prompts(task.prompts)
    if prompts.own and task.inputs is not None:
        raise UserError(
            f"task.prompts={task.prompts} names the picture of each prompt, so leave task.inputs out; got {task.inputs}"
        )
    if not prompts.own and task.inputs is None:
        raise UserError(f"task.prompts={task.prompts} names no pictures; say which by task.inputs, e.g. task.inputs=photos")
    return prompts.own or dict.fromkeys(list_pictures(task.inputs), prompts.shared)


@TASKS.register("predict")
class Predict(Task):
    """Each picture is opened once, for model and report, and encoded once; of the data set only the transform is used."""

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
        """As for all tasks, and the decoding options, the inputs and the prompts; addresses are not tried."""
        GenerationSettings.from_config(cfg.task)
        pictures_and_prompts(cfg.task)
        super().check(cfg, promised)

    def run(self) -> TaskResult:
        """Write texts for all inputs; how many there are, and how many were left out."""
        asked = self.context.on_main(lambda: pictures_and_prompts(self.task))
        parts = Parts(self.run_folder)
        done = {
            entry["source"]: entry
            for entry in parts.read()
            if asked.get(entry["source"]) == entry["asked"]  # of other prompts than now, it is done anew
        }
        if done:
            self._print(f"{len(done)} of {len(asked)} pictures are done already")
        for entry in self._predict(asked, done.keys(), parts):
            done[entry["source"]] = entry
        rows = self.context.on_main(lambda: self._write(asked, done))
        parts.remove()
        metrics = {"images": len(done), "skipped": len(asked) - len(done)}
        return TaskResult({**metrics, "prompts": rows} if self.task.prompts else metrics)

    @paddle.no_grad()
    def _predict(self, asked: Mapping[str, list[str]], done: Iterable[str], parts: Parts) -> list[Entry]:
        """The entries of the pictures that are not done, on every rank; each goes to `parts` when its batch is."""
        qformer, ask = self._asker({text for texts in asked.values() for text in texts})
        collate = ThumbnailCollate(eval_transform(self.cfg), every=one_in(len(asked)))
        looked_at = draw_looks(range(0, len(asked), collate.every))
        names, known = list(asked), frozenset(done)
        samples = [PictureSample(self._picture(name), number) for number, name in enumerate(names) if name not in known]
        if not samples:
            return []
        share = Share(self.cfg, self.run_folder, samples, collate, "predict", may_be_empty=True)
        rows: list[tuple[int, Entry]] = []
        for places, batch in share:
            numbers, shares = batch["image_id_B"].tolist(), {}
            # Anew for each batch: a run that was interrupted draws as if it had not been, ranks that share a matrix draw alike.
            seed_everything(self.cfg.seed + numbers[0], 0)
            sources = [names[number] for number in numbers]
            with keep_shares(qformer, {number: row for row, number in enumerate(numbers) if number in looked_at}, shares):
                replies = ask(to_tensors(batch)["image_BCHW"], [asked[source] for source in sources])
            entries = [
                _entry(source, asked[source], own, thumbnails(batch).get(number), shares.get(number))
                for source, number, own in zip(sources, numbers, replies, strict=True)
            ]
            parts.add(entries)
            rows += zip(places, entries, strict=True)
            for source, own in zip(sources, replies, strict=True):
                self._show(source, own)
        return gather_rows(self.context, rows, share.found)

    def _asker(self, asked: set[str]) -> tuple[QFormer, Ask]:
        """The Q-Former, and what asks; `asked` are all texts that it will be given."""
        task, settings = self.task, GenerationSettings.from_config(self.task)
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        if task.stage == 1:
            stage1, words = loader.stage1()

            def describe(image_BCHW: Tensor, asked: Sequence[Sequence[str]]) -> list[list[Reply]]:
                return [[Reply("", "", 0, texts)] for texts in write_captions(stage1, words, image_BCHW, settings)]

            return stage1.qformer, describe
        model, tokenizer = loader.stage2(new_projection=False)
        asker = Asker(
            model.language.share,
            lambda queries, images, prompts: write_about(model, tokenizer, queries, images, prompts, settings),
            template=task.prompt.strip(),
            chat=task.chat,
            fits=lambda prompt: len(tokenizer.tokens(prompt)) <= self._room(),
            batch_size=task.eval_batch_size,
        )
        self._check_prompts(tokenizer, [asker.alone(text) for text in sorted(asked)])
        return model.qformer, lambda image_BCHW, asked: asker.ask(model.encode(image_BCHW), asked)

    def _room(self) -> float:
        """Tokens that a prompt may have: in a conversation, and in OPT, which has a limit."""
        task, language = self.task, self.cfg.model.language
        room = task.chat_tokens if task.chat else np.inf
        return min(room, prompt_room(positions_of(language), self.cfg.model.qformer.num_queries, task.max_new_tokens))

    def _check_prompts(self, tokenizer: TextTokenizer, prompts: Sequence[str]) -> None:
        """Only the tokenizer can tell whether the prompts have room; the longest one goes to the terminal."""
        task, queries = self.task, self.cfg.model.qformer.num_queries
        longest = max(prompts, key=lambda prompt: len(tokenizer.tokens(prompt)))
        if longest:  # as its tokens say it: a small vocabulary lacks words
            self._print(f"prompt: {tokenizer.decode(tokenizer.tokens(longest))}")
        tokens = len(tokenizer.tokens(longest))
        if tokens <= self._room():
            return
        what = "task.prompt" if task.prompts is None else f"task.prompts={task.prompts}: the longest prompt"
        if task.chat and tokens > task.chat_tokens:
            raise UserError(f"{what} of {tokens} tokens is longer than task.chat_tokens={task.chat_tokens}; raise that")
        raise UserError(
            f"{what} of {tokens} tokens, {queries} queries and task.max_new_tokens={task.max_new_tokens} "
            f"make more than model.language.max_positions={self.cfg.model.language.max_positions}; shorten the prompt"
        )

    def _write(self, asked: Mapping[str, list[str]], done: Mapping[str, Entry]) -> int:
        """Write all files from the entries; how many rows predictions.jsonl has, or would have."""
        rows, cards = [], []
        for number, source in enumerate(asked):
            if source in done:
                own = self._rows(number, done[source])
                rows += own
                cards.append((done[source], own))
        formats = self.task.formats
        if PredictionFormat.jsonl in formats:
            self.run_folder.write_predictions(rows)
        if PredictionFormat.csv in formats:
            write_whole(self.run_folder.path("predictions.csv"), _csv(rows))
        if PredictionFormat.html in formats:
            write_whole(self.run_folder.path("predictions.html"), self._page(cards))
        cut = [r for entry in done.values() for place, r in enumerate(entry["replies"]) if r["earlier"] < place]
        if self.task.chat and cut:
            self._print(
                f"{len(cut)} questions were asked without the oldest turns, for which there was no room (task.chat_tokens)"
            )
        return len(rows)

    def _rows(self, number: int, entry: Entry) -> list[dict[str, Any]]:
        copy, attention = (entry[key] and base64.b64decode(entry[key]) for key in ("copy", "attention"))
        shared: dict[str, Any] = {"image": copy and write_thumbnail(self.run_folder, number, copy)}
        if attention:
            shared["attention"] = write_looks(self.run_folder, number, attention)
        if self.task.chat:
            shared["conversation"] = f"conversations/{number}.json"
            turns = [
                {
                    "question": reply["asked"],
                    "answer": reply["texts"][0],
                    "score": reply["scores"][0],
                    "prompt": reply["prompt"],
                    "earlier": reply["earlier"],
                }
                for reply in entry["replies"]
            ]
            self.run_folder.write_json({"source": entry["source"], "turns": turns}, "conversations", f"{number}.json")
        return [
            {
                "stage": self.run_folder.stage,
                "source": entry["source"],
                **({"asked": reply["asked"]} if self.task.prompts else {}),
                "prompt": reply["prompt"],
                **({"earlier": reply["earlier"]} if self.task.chat else {}),
                "texts": reply["texts"],
                "scores": reply["scores"],
                **shared,
            }
            for reply in entry["replies"]
        ]

    def _page(self, cards: Sequence[tuple[Entry, list[dict[str, Any]]]]) -> str:
        """The pictures that copies were kept of, each with what was said of it."""
        shown = [
            {
                "source": entry["source"],
                "picture": thumbnail_uri(base64.b64decode(entry["copy"])),
                "small": is_small(base64.b64decode(entry["copy"])),
                "attention": entry["attention"] and thumbnail_uri(base64.b64decode(entry["attention"])),
                "rows": rows,
            }
            for entry, rows in cards
            if entry["copy"]
        ]
        return render_page(
            Path(__file__).with_name("predict.html.jinja"),
            {},
            name=self.run_folder.root.name,
            weights=self.cfg.model.weights,
            cards=shown,
            total=len(cards),
            asks=self.task.prompts is not None,
            chat=self.task.chat,
        )

    def _picture(self, name: str) -> Picture:
        limit = self.cfg.dataset.max_pixels
        return WebImage(name, limit) if is_web_address(name) else PathImage(Path(name), limit)

    def _show(self, name: str, replies: Sequence[Reply]) -> None:
        """One text beside its picture's name and what was asked; several below it, with their scores."""
        for reply in replies:
            asked = f"{name}: {reply.asked}:" if self.task.prompts else f"{name}:"
            if len(reply.texts) == 1:
                self._print(f"{asked} {reply.texts[0].text or _EMPTY}")
            else:
                self._print(asked + "".join(f"\n  {text.score:7.2f}  {text.text or _EMPTY}" for text in reply.texts))

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _entry(source: str, asked: list[str], replies: Sequence[Reply], copy: bytes | None, share_QP: np.ndarray | None) -> Entry:
    """What is kept of a picture until all are done, as JSON holds it."""
    attention = looks_file(copy, share_QP) if copy and share_QP is not None else None
    return {
        "source": source,
        "asked": asked,
        "replies": [
            {
                "asked": reply.asked,
                "prompt": reply.prompt,
                "earlier": reply.earlier,
                "texts": [text.text for text in reply.texts],
                "scores": [text.score for text in reply.texts],
            }
            for reply in replies
        ],
        "copy": copy and base64.b64encode(copy).decode(),
        "attention": attention and base64.b64encode(attention).decode(),
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per text, the best of a prompt first."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for place, (text, score) in enumerate(zip(row["texts"], row["scores"], strict=True), start=1):
            writer.writerow({"asked": "", **row, "place": place, "text": text, "score": score})
    return buffer.getvalue()
