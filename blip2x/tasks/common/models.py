"""From a config to models with their weights, tokenizers and frozen parts; what was loaded is said in one line each."""

from __future__ import annotations

from pathlib import Path

from paddle import nn

from blip2x.config.run import RunConfig
from blip2x.data.tokenize import TextTokenizer, build_tokenizer
from blip2x.engine.run import Run
from blip2x.models.assemblies.stage1 import Stage1Model, build_stage1
from blip2x.models.assemblies.stage2 import Stage2Model, build_stage2
from blip2x.models.freeze import freeze
from blip2x.models.weights.bert import load_bert
from blip2x.models.weights.checkpoint import LoadReport, load_checkpoint, read_manifest
from blip2x.models.weights.huggingface_language import is_huggingface_folder, load_huggingface_language
from blip2x.registry import LANGUAGE_MODELS
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.weights import Weights, require_trainable, weights_folder

_STAGE1_HEADS = "only stage 1 uses it"


class ModelLoader:
    """Builds what a task needs; each method returns a model in evaluation mode with its frozen parts frozen."""

    def __init__(self, cfg: RunConfig, run: Run):
        self.cfg = cfg.model
        self.console = run.console
        self.weights = Weights(cfg, cfg.model.weights)
        self._texts = lambda: build_source(cfg).texts()  # most tokenizers come with weights and need no data set

    def stage1(self) -> tuple[Stage1Model, TextTokenizer]:
        """The stage-1 model, and the Q-Former's tokenizer.

        Raises:
            UserError: a frozen image encoder without weights, or weights that do not fit.
        """
        tokenizer = self.qformer_tokenizer()
        model = build_stage1(self.cfg, vocab_size=tokenizer.vocab_size)
        bert = self.cfg.qformer.weights
        if self.weights.whole:
            self._say(self._load_whole(model, drop=[], new=[]))
        elif bert:
            self._say(load_bert(weights_folder(bert, self.weights.root, "model.qformer.weights"), model.qformer))
        self._finish(model, ["vision"])
        return model, tokenizer

    def stage2(self, *, new_projection: bool) -> tuple[Stage2Model, TextTokenizer]:
        """The stage-2 model, and the language model's tokenizer.

        Args:
            new_projection: whether the weights may be of stage 1, which has no projection to the language model.

        Raises:
            UserError: a frozen part without weights, or weights that do not fit.
        """
        tokenizer = self.language_tokenizer()
        model = build_stage2(self.cfg, vocab_size=tokenizer.vocab_size)
        drop = [("qformer.text.", "stage 2 gives the Q-Former no text")]
        drop += [(f"qformer.layers.{i}.text_ffn.", drop[0][1]) for i in range(self.cfg.qformer.depth)]
        drop += [(name, _STAGE1_HEADS) for name in ("vision_proj.", "text_proj.", "itm_head.", "temp")]
        new = [("language_proj.", "new in stage 2")] if new_projection else []
        self._say(self._load_whole(model, drop=drop, new=new))
        self._finish(model, ["vision", "language"])
        return model, tokenizer

    def language(self) -> tuple[nn.Layer, TextTokenizer]:
        """The language model alone, to be trained; from `model.language.weights` where that is set."""
        tokenizer = self.language_tokenizer()
        model = LANGUAGE_MODELS.get(self.cfg.language.kind)(self.cfg.language, tokenizer.vocab_size)
        given = self.cfg.language.weights
        if given:
            folder = weights_folder(given, self.weights.root, "model.language.weights")
            self._say(_load_part(folder, model, "language"))
        return model, tokenizer

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
        return self._tokenizer("qformer", "bert", [self.weights.whole])

    def language_tokenizer(self) -> TextTokenizer:
        """The one saved with the weights, else the configured one."""
        return self._tokenizer("language", self.cfg.language.kind, [self.weights.whole, self.weights.folder("language")])

    def _tokenizer(self, part: str, family: str, folders: list[Path | None]) -> TextTokenizer:
        saved = [folder / "tokenizers" / part for folder in folders if folder and (folder / "tokenizers" / part).is_dir()]
        name = str(saved[0]) if saved else getattr(self.cfg, part).tokenizer
        return build_tokenizer(name, family, weights_root=self.weights.root, dataset_texts=self._texts)

    def _load_whole(self, model: nn.Layer, *, drop: list[tuple[str, str]], new: list[tuple[str, str]]) -> LoadReport:
        parts = [part for part in ("vision", "language") if not self.weights.brings(part)]
        elsewhere = [(f"{part}.", f"from model.{part}.weights") for part in parts]
        adapt = {f"vision.{name}": adapter for name, adapter in model.vision.adapters().items()}
        return load_checkpoint(self.weights.whole, model, drop=drop, allow_missing=[*elsewhere, *new], adapt=adapt)

    def _finish(self, model: nn.Layer, parts: list[str]) -> None:
        """Load the parts that the whole model's checkpoint did not bring, and freeze what the config says."""
        for part in parts:
            layer, folder = getattr(model, part), self.weights.folder(part)
            if folder is None:
                require_trainable(self.cfg, part)
            elif not self.weights.brings(part):
                self._say(_load_part(folder, layer, part))
            if getattr(self.cfg, part).frozen:
                freeze(layer)
        model.eval()

    def _say(self, report: LoadReport) -> None:
        self.console.print(f"loaded {report}", style="dim", markup=False, highlight=False)


def _load_part(folder: Path, layer: nn.Layer, part: str) -> LoadReport:
    """Load a part that was fitted alone, or as part of something larger, whose other tensors are left out."""
    if part == "language" and is_huggingface_folder(folder):
        return load_huggingface_language(folder, layer)
    names, prefix = read_manifest(folder)["tensors"], f"{part}."
    others = [name for name in names if not name.startswith(prefix)]
    if len(others) == len(names):
        prefix, others = "", []
    drop = [(name, f"not the {part} part's") for name in others]
    return load_checkpoint(folder, layer, prefix=prefix, drop=drop, adapt=layer.adapters() if part == "vision" else None)
