"""From a config to models with their weights, tokenizers and frozen parts; what was loaded is said in one line per source."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from blip2x.config.model import Missing
from blip2x.config.run import PrecisionName, RunConfig
from blip2x.config.task import WeightsType, weights_dtype
from blip2x.data.tokenize import TextTokenizer, build_tokenizer, has_tokenizer
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.models.assemblies.stage1 import Stage1Model, build_stage1
from blip2x.models.assemblies.stage2 import Stage2Model, build_stage2
from blip2x.models.freeze import freeze
from blip2x.models.precision import storage_types, store_compact, store_in
from blip2x.models.tensor_parallel import check_split
from blip2x.models.weights.checkpoint import Adapt, fill
from blip2x.models.weights.describe import follow_source
from blip2x.models.weights.known import locate_tokenizer
from blip2x.models.weights.names.language import OPT_WORDS
from blip2x.models.weights.stored import StoredTensor
from blip2x.parallel.context import TensorGroup
from blip2x.registry import LANGUAGE_MODELS
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.weights import Weights, require_trainable

_GROWING = ("qformer.text.word_embeddings.weight", "qformer.text.head_bias")  # BERT lacks [DEC]


class ModelLoader:
    """Builds what a task needs; each method returns a model in evaluation mode with its frozen parts frozen.

    Parameters that come from files get their memory when they are read, so a model is never in memory twice.

    Args:
        weights: the sources, and the model's config.
        texts: the data set's texts, where a tokenizer has to be made of them.
        say: told what was loaded.
        warn: told what may be a mistake; None: `say` is.
        precision: decides the types that frozen parts are stored in; the other parts have paddle's default type.
        weights_dtype: how image encoder and language model are kept, of a task that trains nothing.
        tensor: the ranks that share the matrices of `split`, parts that have to be frozen.
        split: of "language" and "vision" those that are split over `tensor`; this rank's model has its share of them.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        texts: Callable[[], Iterable[str]],
        say: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
        precision: PrecisionName = PrecisionName.fp32,
        weights_dtype: WeightsType = WeightsType.float32,
        tensor: TensorGroup = TensorGroup(),  # noqa: B008  # it is frozen
        split: Collection[str] = (),
    ):
        self.weights = weights
        self._precision, self._weights_dtype = precision, weights_dtype
        self._tensor, self._split = tensor, split if tensor.size > 1 else ()
        self.cfg = follow_source(weights.cfg, weights.source)
        self._texts = texts
        self._say, self._warn = say, warn or say

    @classmethod
    def of_run(cls, cfg: RunConfig, run: Run) -> ModelLoader:
        """The loader of a task's model."""

        def say(text: str) -> None:
            run.console.print(text, style="dim", markup=False, highlight=False)

        def warn(text: str) -> None:
            run.console.print(text, style="yellow", markup=False, highlight=False)

        tensor = run.context.tensor
        return cls(
            Weights(cfg.model, cfg.paths, cfg.model.weights),
            texts=lambda: build_source(cfg).texts(),  # most tokenizers come with weights and need no data set
            say=say,
            warn=warn,
            precision=cfg.precision.name,
            weights_dtype=weights_dtype(cfg.task),
            tensor=tensor,
            split=["language", "vision"] if tensor.size > 1 and cfg.parallelism.tp_vision else ["language"],
        )

    def stage1(self) -> tuple[Stage1Model, TextTokenizer]:
        """The stage-1 model, and the Q-Former's tokenizer.

        Raises:
            UserError: a frozen image encoder without weights, weights that do not fit, or a split that is not possible.
        """
        self._check_split("vision")
        tokenizer = self.qformer_tokenizer()
        return self.stage1_model(tokenizer.vocab_size), tokenizer

    def stage1_model(self, vocab_size: int) -> Stage1Model:
        """The stage-1 model alone; `vocab_size` as `build_stage1`. Errors as `stage1`."""
        with paddle.LazyGuard():
            model = build_stage1(self.cfg, vocab_size=vocab_size)
        if self.weights.brings("qformer"):
            new = [("temp", f"set to model.temperature={self.cfg.temperature}")]
            if self.cfg.missing is Missing.initialise:
                why = "model.missing=initialise: starts random, and has to be trained"
                new += [(name, why) for name in ("qformer.", "vision_proj.", "text_proj.", "itm_head.")]
            self._load(model, ["vision"], drop=[("language", "stage 1 has no language model")], new=new)
        else:
            whole = [
                ("ln_vision.", "new"),
                ("vision_proj.", "new"),
                ("text_proj.", "new"),
                ("itm_head.", "new"),
                ("temp", "new"),
            ]
            if self.weights.part("qformer"):
                looking = [f"qformer.layers.{i}.cross_attention." for i in range(self.cfg.qformer.depth)]
                whole += [(name, "not in BERT; new") for name in ("qformer.query_tokens", *looking)]
                whole += [("qformer.text.head_", "no language-model head there; new")]
            self._load(model, ["vision", "qformer"], drop=[], new=whole)
        self._freeze(model, ["vision"])
        return model

    def stage2(self, *, new_projection: bool) -> tuple[Stage2Model, TextTokenizer]:
        """The stage-2 model, and the language model's tokenizer.

        Args:
            new_projection: whether the weights may be of stage 1, which has no projection to the language model.

        Raises:
            UserError: a frozen part without weights, weights that do not fit, or a split that is not possible.
        """
        self._check_split("vision", "language")
        tokenizer = self.language_tokenizer()
        return self.stage2_model(tokenizer.vocab_size, new_projection=new_projection), tokenizer

    def stage2_model(self, vocab_size: int, *, new_projection: bool) -> Stage2Model:
        """The stage-2 model alone; `vocab_size` as `build_stage2`. Errors as `stage2`."""
        self.weights.refuse_questions("a model of stage 2")
        texts = [("qformer.text.", "stage 2 gives the Q-Former no text")]
        texts += [(f"qformer.layers.{i}.text_ffn.", texts[0][1]) for i in range(self.cfg.qformer.depth)]
        new = [("language_proj.", "new in stage 2")] if new_projection else []
        return self._stage2(vocab_size, None, drop=texts, new=new)

    def answering(self) -> tuple[Stage2Model, TextTokenizer, TextTokenizer]:
        """The stage-2 model whose Q-Former reads questions; the Q-Former's tokenizer and the language model's.

        Raises:
            UserError: as `stage2`, or nothing gives what reads texts in the Q-Former.
        """
        self._check_split("vision", "language")
        questions, language = self.question_tokenizer(), self.language_tokenizer()
        new = []
        if self.weights.texts_part() is None:
            why = "model.missing=initialise: starts random, and has to be trained"
            new = [("qformer.text.", why), *((f"qformer.layers.{i}.text_ffn.", why) for i in range(self.cfg.qformer.depth))]
        drop = [("qformer.text.head_", "no captions are written by the Q-Former")]
        return self._stage2(language.vocab_size, questions.vocab_size, drop=drop, new=new), questions, language

    def _stage2(
        self, vocab_size: int, question_vocab_size: int | None, *, drop: list[tuple[str, str]], new: list[tuple[str, str]]
    ) -> Stage2Model:
        # a language model that has no weights draws them as PaddleNLP does, which is not put off
        with paddle.LazyGuard() if self.weights.folder("language") else nullcontext():
            model = build_stage2(self.cfg, vocab_size=vocab_size, question_vocab_size=question_vocab_size)
        drop = [*drop, *((name, "only stage 1 uses it") for name in ("vision_proj.", "text_proj.", "itm_head.", "temp"))]
        self._load(model, ["vision", "language"], drop=drop, new=new, reads_texts=question_vocab_size is not None)
        self._freeze(model, ["vision", "language"])
        return model

    def language(self) -> tuple[nn.Layer, TextTokenizer]:
        """The language model alone, to be trained; from `model.language.weights` where that is set; and its tokenizer.

        What is trained is whole on every rank.
        """
        tokenizer = self.language_tokenizer()
        language = LANGUAGE_MODELS.get(self.cfg.language.kind)
        if not self.cfg.language.weights:
            return language(self.cfg.language, tokenizer.vocab_size), tokenizer
        with paddle.LazyGuard():
            alone = nn.LayerDict({"language": language(self.cfg.language, tokenizer.vocab_size)})
        source = self.weights.part("language")
        tensors = {name: tensor for name, tensor in source.tensors.items() if name.startswith("language.")}
        self._say(f"loaded {fill(alone, tensors, str(source.path), adapt=self._adapters(alone, tensors))}")
        return alone["language"], tokenizer

    def lay_out(self, model: nn.Layer, parts: Collection[str], *, compact: Collection[str]) -> None:
        """Give a model without memory this rank's share of those of `parts` that are split, and the types it is kept in.

        The parts of `compact` are kept as the task's `weights_dtype` says.

        Raises:
            UserError: a part cannot be split over the ranks.
        """
        for part in self._check_split(*parts):
            getattr(model, part).split_over(self._tensor)
        for part, dtype in storage_types(self._precision, self.cfg).items():
            if dtype != "float32" and hasattr(model, part):
                store_in(getattr(model, part), dtype)
            if part in compact:
                store_compact(getattr(model, part), self._weights_dtype, dtype)

    def frozen_origin(self, *parts: str) -> dict[str, str]:
        """Where the frozen ones of `parts` have their weights, for `save_checkpoint`."""
        origin = {}
        for part in parts:
            folder = self.weights.folder(part)
            if getattr(self.cfg, part).frozen and folder:
                origin[part] = str(folder.resolve())
        return origin

    def qformer_tokenizer(self) -> TextTokenizer:
        """The one saved with the weights, else the configured one."""
        return self._tokenizer("qformer", "bert", self._with_weights("qformer"))

    def question_tokenizer(self) -> TextTokenizer:
        """The Q-Former's in a model of stage 2: saved with what reads its texts, else the configured one."""
        folder = self.weights.texts_folder()
        places = [folder / "tokenizers" / "qformer", folder] if folder else []
        return self._tokenizer("qformer", "bert", next((place for place in places if has_tokenizer(place, "bert")), None))

    def language_tokenizer(self) -> TextTokenizer:
        """The one saved with the weights, else the configured one."""
        return self._tokenizer("language", self.cfg.language.kind, self._with_weights("language"))

    def own_tokenizer(self, part: str, *, fetch: bool) -> TextTokenizer | None:
        """The one that came with the weights; without one, the configured one if it is there or `fetch` says to fetch it."""
        if self._with_weights(part) is None and not fetch:
            name = getattr(self.cfg, part).tokenizer
            root = Path(self.weights.paths.weights)
            if not any(place.exists() for place in (Path(name), root / name, root / "tokenizers" / name)):
                return None
        return self.qformer_tokenizer() if part == "qformer" else self.language_tokenizer()

    def _with_weights(self, part: str) -> Path | None:
        family = "bert" if part == "qformer" else self.cfg.language.kind
        folders = [self.weights.whole, *([self.weights.folder("language")] if part == "language" else [])]
        places = [place for folder in folders if folder for place in (folder / "tokenizers" / part, folder)]
        return next((place for place in places if has_tokenizer(place, family)), None)

    def _tokenizer(self, part: str, family: str, found: Path | None) -> TextTokenizer:
        name = str(found) if found else getattr(self.cfg, part).tokenizer
        key, paths = f"model.{part}.tokenizer", self.weights.paths
        return build_tokenizer(
            name,
            family,
            locate=lambda name: locate_tokenizer(name, Path(paths.weights), offline=paths.offline, key=key),
            dataset_texts=self._texts,
        )

    def _load(
        self,
        model: nn.Layer,
        parts: list[str],
        *,
        drop: list[tuple[str, str]],
        new: list[tuple[str, str]],
        reads_texts: bool = False,
    ) -> None:
        """Fill `model` from all sources at once; what no source has is initialised where `new` allows it."""
        self.lay_out(model, parts, compact=[part for part in parts if part != "qformer" and self.weights.folder(part)])
        sources = list(self.weights.sources(parts, reads_texts=reads_texts))
        tensors: dict[str, StoredTensor] = {}
        for source, found in sources:
            tensors |= found
            self._say(source.summary())
        for part in parts:
            if not any(name.startswith(f"{part}.") for name in tensors):
                if part != "qformer":
                    require_trainable(self.cfg, part)
                new = [*new, (f"{part}.", "new")]
        where = " and ".join(str(source.path) for source, _ in sources)
        grows = _GROWING if any(source.family == "BERT" for source, _ in sources) else ()
        adapt = self._adapters(model, tensors)
        try:
            report = fill(model, tensors, where, drop=drop, allow_missing=new, adapt=adapt, grows=grows)
        except UserError as error:
            may_initialise = self.cfg.missing is Missing.error and self.weights.brings("qformer") and "language" not in parts
            if may_initialise and "lacks tensors" in str(error) and "qformer." in str(error):
                raise UserError(f"{error}; set model.missing=initialise to begin with random ones and train them") from error
            raise
        for source, found in sources:
            count = sum(name in found for name in report.loaded)
            self._say(f"loaded {count} tensors from {source.path}")
        self._tell_image_size(report.adapted, tensors)
        if len(sources) > 1 or (sources and (report.dropped or report.missing or report.adapted)):
            self._say(f"in all {report}")

    def _tell_image_size(self, adapted: Collection[str], tensors: dict[str, StoredTensor]) -> None:
        """Positions of another image size fit as well, but what was trained at one size is worth less at another."""
        vision = self.cfg.vision
        for name in adapted:
            if not name.startswith("vision.") or len(tensors[name].shape) != 3:  # another encoder's own
                continue
            size = math.isqrt(tensors[name].shape[1] - 1) * vision.patch_size  # beside the patches there is the class token
            self._warn(
                f"note: the image encoder's weights are of {size} pixels, its positions were brought to "
                f"model.vision.image_size={vision.image_size}; to evaluate what was trained at {size}, set it to {size}"
            )

    def _check_split(self, *parts: str) -> list[str]:
        """Those of `parts` that are split.

        Raises:
            UserError: one of them cannot be; call it before anything is fetched or read.
        """
        split = [part for part in parts if part in self._split]
        for part in split:
            check_split(self.cfg, part, self._tensor.size)
        return split

    def _freeze(self, model: nn.Layer, parts: list[str]) -> None:
        for part in parts:
            if getattr(self.cfg, part).frozen:
                freeze(getattr(model, part))
        model.eval()

    def _adapters(self, model: nn.Layer, tensors: dict[str, StoredTensor]) -> dict[str, Adapt]:
        """How tensors of another shape are brought to the model's: positions of another image size, words that it lacks."""
        adapt: dict[str, Adapt] = {}
        if hasattr(model, "vision"):
            adapt = {f"vision.{name}": adapter for name, adapter in model.vision.adapters().items()}
        words = {OPT_WORDS: 0, "language.shared.weight": 0, "language.lm_head.weight": 1}
        return adapt | {name: partial(_first_words, axis=axis) for name, axis in words.items() if name in tensors}


def _first_words(array: np.ndarray, wanted: tuple[int, ...], *, axis: int) -> np.ndarray:
    """Without the words behind the model's vocabulary: Hugging Face has added a token for images; with fewer, as it is."""
    return array.take(np.arange(wanted[axis]), axis=axis) if array.shape[axis] > wanted[axis] else array
