"""Where weights are: what the config names, and what a whole model's checkpoint brings or remembers of its parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from blip2x.config.dataset import DatasetConfig
from blip2x.config.model import Missing, ModelConfig
from blip2x.config.run import PathsConfig
from blip2x.errors import UserError
from blip2x.models.weights.describe import require_same_shape
from blip2x.models.weights.known import locate
from blip2x.models.weights.source import Source, open_source
from blip2x.models.weights.stored import StoredTensor

CLIP_NORMALISATION = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


@dataclass(frozen=True)
class Start:
    """What a task asks of `model.weights`."""

    tensors: str  # how the names of tensors start that have to be there
    tasks: tuple[str, ...]  # whose checkpoints have them
    hint: str = ""  # what a message adds to their names
    takes_questions: bool = False  # also a model whose Q-Former reads the question

    def __str__(self) -> str:
        """The tasks as a message names them."""
        *others, last = self.tasks
        return f"{', '.join(others)} or {last}{self.hint}" if others else f"{last}{self.hint}"


_WORDS = "qformer.text.word_embeddings"
_READS_TEXTS = re.compile(r"qformer\.(text\.(?!head_)|layers\.\d+\.text_ffn\.)")  # the head writes them

STAGE2 = Start("language_proj.", ("pretrain_stage2", "caption"))


class Weights:
    """The sources of a model's weights; what is not there and has a published name is fetched when it is first asked for.

    Args:
        cfg: the model.
        paths: where names are looked up, and whether missing ones may be fetched.
        whole: the value of `model.weights`; None: as if it were not set.

    Raises:
        UserError: `whole` cannot be had, or later, when a method looks: the same for a part.
    """

    def __init__(self, cfg: ModelConfig, paths: PathsConfig, whole: str | None):
        self.cfg = cfg
        self.paths = paths
        self.whole = None if whole is None else self.locate(whole, "model.weights")

    def locate(self, name: str, key: str) -> Path:
        """The folder or file that `key`'s value means."""
        return locate(name, Path(self.paths.weights), offline=self.paths.offline, key=key)

    @property
    def source(self) -> Source | None:
        """The whole model's."""
        return _opened(self.whole) if self.whole else None

    def brings(self, part: str) -> bool:
        """Whether the whole model's checkpoint holds the weights of `part`."""
        return self.source is not None and self.source.has(f"{part}.")

    def folder(self, part: str) -> Path | None:
        """Where the weights of `part` are: with the whole model's, else as configured, else where they were in training."""
        key, configured = f"model.{part}.weights", getattr(self.cfg, part).weights
        if self.brings(part):
            return self.whole
        if configured is not None:
            return self.locate(configured, key)
        origin = self.source.manifest["frozen"]["origin"].get(part) if self.source and self.source.manifest else None
        if origin is None:
            return None
        # a run folder that was moved or copied keeps its parts' places relative to each other
        beside = self.whole.resolve().parent.parent.joinpath(*Path(origin).parts[-2:])
        folder = next((folder for folder in (Path(origin), beside) if folder.exists()), None)
        if folder is None:
            raise UserError(f"{self.whole} was trained with the {part} weights of {origin}, which are not there; set {key}")
        return folder

    def part(self, part: str) -> Source | None:
        """The source of a part.

        Raises:
            UserError: it has nothing of that part, or is of another shape than the config's.
        """
        folder = self.folder(part)
        if folder is None:
            return None
        source = _opened(folder)
        if not source.has(f"{part}."):
            raise UserError(f"model.{part}.weights={folder} holds {source.what}, but nothing of the {part} part")
        require_same_shape(self.cfg, source, part)
        return source

    @property
    def reads_questions(self) -> bool:
        """Whether the whole model is one of stage 2 whose Q-Former reads texts: fine-tuned on questions."""
        return self.brings("language_proj") and self.brings(_WORDS)

    def refuse_questions(self, task: str) -> None:
        """Raise `UserError` where the whole model's Q-Former waits for a question, which `task` has not for it."""
        if self.reads_questions:
            raise UserError(
                f"model.weights={self.whole} was fine-tuned on questions, which its Q-Former reads, and {task} does not show "
                "them to it; use task=vqa_finetune task.train=false, or weights of stage 2"
            )

    def texts_folder(self) -> Path | None:
        """Where the Q-Former has what reads texts: with the whole model, else as model.qformer.weights says."""
        if self.brings(_WORDS):
            return self.whole
        configured = self.cfg.qformer.weights
        return None if configured is None else self.locate(configured, "model.qformer.weights")

    def texts_part(self) -> Source | None:
        """The source of what reads texts in a Q-Former of stage 2; None: it is to begin with random numbers.

        Raises:
            UserError: there is none, and model.missing=error; or it has no such part, or is of another shape.
        """
        folder = self.texts_folder()
        if folder is None:
            if self.cfg.missing is Missing.initialise:
                return None
            whole = f"model.weights={self.whole}" if self.whole else "the checkpoint of the stage before"
            raise UserError(
                f"{whole} lacks what reads texts in the Q-Former, as stage 2 leaves it out; set "
                "model.qformer.weights to weights of stage 1 (best those that stage 2 began with) or to a BERT, or "
                "model.missing=initialise to begin with random ones"
            )
        source = _opened(folder)
        if not source.has(_WORDS):
            raise UserError(
                f"model.qformer.weights={folder} holds {source.what}, but nothing that reads texts in a Q-Former; set it to "
                "weights of stage 1 or to a BERT"
            )
        require_same_shape(self.cfg, source, "qformer")
        return source

    def sources(self, parts: list[str], *, reads_texts: bool = False) -> Iterator[tuple[Source, dict[str, StoredTensor]]]:
        """The whole model's source with all of its tensors, then those of `parts` that it does not bring, with the part's.

        With `reads_texts`, what reads texts in a Q-Former of stage 2 is one of them.
        """
        if self.source:
            yield self.source, self.source.tensors
        if reads_texts and not self.brings(_WORDS) and (source := self.texts_part()):
            yield source, {name: tensor for name, tensor in source.tensors.items() if _READS_TEXTS.match(name)}
        for part in parts:
            if self.brings(part) or not (source := self.part(part)):
                continue
            tensors = {name: tensor for name, tensor in source.tensors.items() if name.startswith(f"{part}.")}
            if part == "vision" and source.family in ("EVA ViT", "CLIP ViT"):  # published with the block that BLIP-2 leaves out
                last = f"vision.blocks.{self.cfg.vision.depth}."
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(last)}
            yield source, tensors

    def require(self, start: Start, task: str) -> None:
        """Raise `UserError` unless `task` can start from the whole model's checkpoint."""
        if self.source is None:
            raise UserError(
                f"task={task} needs a trained model: set model.weights to a checkpoint of {start}, "
                "or run all stages with task=pipeline"
            )
        if not start.takes_questions:
            self.refuse_questions(f"task={task}")
        if not self.source.has(start.tensors):
            kind = self.source.manifest.get("kind", f"{self.source.what} ({self.source.family})")
            raise UserError(f"model.weights={self.whole} is a checkpoint of {kind}, but task={task} needs one of {start}")

    def require_same_shape(self) -> None:
        """Raise `UserError` where the whole model's checkpoint is of another model than the config's."""
        if self.source:
            require_same_shape(self.cfg, self.source)

    def check_pictures(self, dataset: DatasetConfig) -> None:
        """Raise `UserError` where a frozen image encoder would be shown pictures in other numbers than in training."""
        before = source_normalisation(self.source) if self.source else None
        now = normalisation(dataset)
        if before and before != now and self.cfg.vision.frozen:
            raise UserError(
                f"{self.whole} was trained on pictures normalised by mean={before['mean']} std={before['std']}, but "
                f"dataset={dataset.name} has mean={now['mean']} std={now['std']}; choose the data set that it was trained on, "
                "or set dataset.transform.mean and dataset.transform.std"
            )


@lru_cache(maxsize=4)
def _open(path: Path, _: float) -> Source:
    return open_source(path)


def _opened(path: Path) -> Source:
    """A source, opened once, unless its manifest or file has changed since."""
    manifest = path / "manifest.json"
    return _open(path, (manifest if manifest.is_file() else path).stat().st_mtime)


def normalisation(dataset: DatasetConfig) -> dict[str, list[float]]:
    """How a data set's pictures become numbers, for a checkpoint to remember."""
    return {"mean": list(dataset.transform.mean), "std": list(dataset.transform.std)}


def source_normalisation(source: Source) -> dict[str, list[float]] | None:
    """The one that a model was trained with: recorded, in Hugging Face's preprocessor_config.json, or CLIP's, as published.

    None: an own checkpoint that does not say.
    """
    if source.manifest:
        return source.manifest["extra"].get("normalisation")
    config = source.settings.get("preprocessor_config.json", {})
    mean, std = config.get("image_mean"), config.get("image_std")
    return {"mean": list(mean), "std": list(std)} if mean and std else CLIP_NORMALISATION


def require_trainable(cfg: ModelConfig, part: str) -> None:
    """Raise `UserError` where `part` is frozen; call it where nothing gives its weights, so that it would stay random."""
    if getattr(getattr(cfg, part), "frozen", False):  # the Q-Former never is
        raise UserError(
            f"model.{part}.frozen=true, but nothing says where its weights come from; set model.{part}.weights, or "
            f"model.{part}.frozen=false to train it"
        )
