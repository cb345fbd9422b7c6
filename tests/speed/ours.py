"""blip2x's side: python -m tests.speed.ours --row ROW --way WAY --folder FOLDER --threads N; see worker.py."""

from __future__ import annotations

from tests.speed.worker import Answer, Inputs, Prepared, arguments, serve

if __name__ == "__main__":
    from blip2x.startup import prepare_process

    prepare_process(arguments().threads)

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from rich.console import Console
from safetensors.numpy import load_file

from blip2x.config.compose import compose_config
from blip2x.config.run import RunConfig
from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.engine.versions import versions
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.models.freeze import set_eval_mode, set_train_mode
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.optim.build import build_optimizer
from blip2x.parallel.context import Context
from blip2x.tasks.common.answering import Answering
from blip2x.tasks.common.captioning import HeldOutCaptions
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.vqa_zeroshot import VqaZeroshot

Batch = dict[str, Tensor]


class Made(Inputs):
    """Also the config of any task on it."""

    def tensor(self, array: np.ndarray) -> Tensor:
        return paddle.to_tensor(array)

    def config(self, task: str, *words: str) -> RunConfig:
        stage = "stage1" if task == "pretrain_stage1" else "stage2"
        return compose_config(
            [
                *(f"task={task}", f"model={self.meta['model']}", f"model.weights={self.folder / stage}", "dataset=custom"),
                *(f"dataset.images={self.folder / 'pictures'}", f"dataset.eval_captions={self.folder / 'captions.json'}"),
                *(f"dataset.eval_questions={self.folder / 'questions.json'}", "dataset.num_workers=0"),
                *(f"paths.cache={self.folder / 'cache'}", "optim=adamw", *words),
            ]
        )

    def run(self) -> Run:
        """Of which nothing is seen."""
        return Run(self.folder, self.folder, "speed", Context(), Console(file=io.StringIO()), Loggers())


def prepare(row: str, way: str, folder: Path) -> Prepared:
    """Load what `row` needs, and give what a run of it calls."""
    made = Made(folder)
    if row in ("vision", "qformer", "language", "language_backward"):
        return PARTS[row](made), None
    return ROWS[row](made, way)


def caption(made: Made, way: str) -> Prepared:
    cfg, run = made.config("caption", f"task.eval_batch_size={made.sizes['captions']}"), made.run()
    model, tokenizer = ModelLoader.of_run(cfg, run).stage2(new_projection=False)
    samples, settings = build_source(cfg).captions("eval"), GenerationSettings.from_config(cfg.task)

    def captions() -> Answer:
        held_out = HeldOutCaptions(cfg, run, model, tokenizer, samples, settings=settings, limit=None)
        held_out.caption()
        return {"texts": [row["caption"] for row in held_out.rows]}

    return captions, None


class Asked(VqaZeroshot):
    """The task up to where it begins to answer."""

    answering: Answering

    def results(self, answering: Answering, *_: Any) -> dict[str, float]:
        self.answering = answering
        return {}


def vqa(made: Made, way: str) -> Prepared:
    task = Asked(made.config("vqa_zeroshot", f"task.eval_batch_size={made.sizes['batch']}"), made.run())
    task.run()

    def answers() -> Answer:
        return {"texts": [answer["prediction"] for _, answer in task.answering.answer()]}

    return answers, None


def stage1_model(made: Made) -> tuple[RunConfig, Stage1Model, int]:
    """With the head for captions that Hugging Face's folder lacks; and [DEC]."""
    cfg = made.config("pretrain_stage1", "model.missing=initialise")
    model, tokenizer = ModelLoader.of_run(cfg, made.run()).stage1()
    parameters = dict(model.named_parameters())
    for name, array in load_file(made.folder / "stage1_head.safetensors").items():
        parameters[name].set_value(array)
    return cfg, model, tokenizer.dec_id


def stage1(made: Made, way: str, *, keeps: bool) -> Prepared:
    """With `keeps`, the way "ours" has the image encoder's outputs as `dataset.cache=features` keeps them."""
    cfg, model, dec_id = stage1_model(made)
    objective, batch = Stage1Objective(model, Context(), cfg.task, dec_id=dec_id), made.batch("stage1")
    given = {key: batch.pop(key) for key in ("negative_image_B", "negative_text_B")}
    if not (keeps and way == "ours"):
        return training(cfg, objective, lambda: batch, given)
    with paddle.no_grad():
        kept_BPD = model.vision(batch.pop("image_BCHW")).astype("float16").numpy()
    return training(cfg, objective, lambda: {"encoded_BPD": paddle.to_tensor(kept_BPD).astype("float32"), **batch}, given)


def stage2(made: Made, way: str) -> Prepared:
    cfg = made.config("pretrain_stage2")
    model, _ = ModelLoader.of_run(cfg, made.run()).stage2(new_projection=False)
    batch = made.batch("stage2")
    return training(cfg, Stage2Objective(model), lambda: batch, {})


def training(
    cfg: RunConfig, objective: Stage1Objective | Stage2Objective, batch: Callable[[], Batch], given: Batch
) -> Prepared:
    """The losses of the first step without dropout, with the negatives that are `given`; and steps as Training makes them."""
    set_eval_mode(objective)
    with paddle.no_grad():
        parts = objective(objective.prepare([{**batch(), **given}])[0])
    losses = {name: parts[name].numpy() for name in ("itc", "itm", "lm", "loss") if name in parts}
    optimizer, schedule = build_optimizer(cfg.optim, objective, 10_000)
    set_train_mode(objective)

    def step() -> None:
        objective(objective.prepare([batch()])[0])["loss"].backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()

    return step, losses


def rerank(made: Made, way: str) -> Prepared:
    _, model, _ = stage1_model(made)
    image_BCHW = made.array("image_BCHW")[: made.sizes["judged"]]
    ids_NL, mask_NL = made.array("rerank.ids_NL"), made.array("rerank.mask_NL")
    candidates, size = made.sizes["candidates"], made.sizes["batch"]

    @paddle.no_grad()
    def judge() -> Answer:
        patch_BPD, found = model.ln_vision(model.vision(image_BCHW)), []
        for image in range(image_BCHW.shape[0]):
            for first in range(image * candidates, (image + 1) * candidates, size):
                rows = slice(first, min(first + size, (image + 1) * candidates))
                found.append(model.itm_logits(patch_BPD[image : image + 1], ids_NL[rows], mask_NL[rows]).numpy())
        return {"logits": np.concatenate(found)}

    return judge, None


def load(made: Made, way: str) -> Prepared:
    cfg, kept = made.config("caption"), []

    def read() -> None:
        kept.clear()  # a second model is not to be beside the first
        kept.append(ModelLoader.of_run(cfg, made.run()).stage2(new_projection=False)[0])

    return read, None


def stage2_model(made: Made) -> Stage2Model:
    return ModelLoader.of_run(made.config("caption"), made.run()).stage2(new_projection=False)[0]


def vision(made: Made) -> Callable[[], Answer]:
    model, image_BCHW = stage2_model(made), made.array("image_BCHW")[: made.sizes["inputs"]]

    @paddle.no_grad()
    def encode() -> Answer:
        return {"patches": model.ln_vision(model.vision(image_BCHW)).numpy()}

    return encode


def qformer(made: Made) -> Callable[[], Answer]:
    model, patch_BPD = stage2_model(made), made.array("qformer.patch_BPD")

    @paddle.no_grad()
    def look() -> Answer:
        return {"queries": model.qformer.encode_image(patch_BPD)[0].numpy()}

    return look


def language(made: Made, *, backward: bool) -> Callable[[], Answer]:
    """Logits of all positions, as a hash would not tell how far apart they are: those of the first text."""
    model, embeds_BLD = stage2_model(made).language, made.array("language.embeds_BLD")
    mask_BL = paddle.ones(embeds_BLD.shape[:2], dtype="int64")
    decoder = (paddle.ones_like(mask_BL), mask_BL) if model.is_encoder_decoder else ()
    embeds_BLD.stop_gradient = not backward

    def read() -> Answer:
        logits_BLV = model(embeds_BLD, mask_BL, *decoder)
        if not backward:
            return {"logits": logits_BLV[0].numpy()}
        logits_BLV.mean().backward()
        gradient = embeds_BLD.grad.numpy()
        embeds_BLD.clear_gradient()
        return {"gradient": gradient}

    return read if backward else paddle.no_grad()(read)


PARTS = {"vision": vision, "qformer": qformer, "language": partial(language, backward=False)}
PARTS["language_backward"] = partial(language, backward=True)
ROWS = {
    "caption": caption,
    "vqa": vqa,
    "stage1": partial(stage1, keeps=False),
    "stage1_features": partial(stage1, keeps=True),
    "stage2": stage2,
    "rerank": rerank,
    "load": load,
}


if __name__ == "__main__":
    names = ("blip2x", "paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "python")
    serve(arguments(), prepare, {name: version for name, version in versions().items() if name in names and version})
