"""One rank of two that share models: `tensor_worker.py <folder>`; writes rank<n>.json there.

Every rank also has the whole models, and says what these compute.
"""

import json
import os
import sys
from pathlib import Path

from blip2x.startup import prepare_process

prepare_process(threads=1)

# ruff: noqa: E402  # has to run before paddle is imported
import numpy as np
import paddle

from blip2x.config.run import Device, HybridConfig
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.losses.lm import lm_loss
from blip2x.models.freeze import freeze
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.models.vision.eva_vit import EvaVit
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.registry import STRATEGIES

WIDTH, WORDS = 16, 23  # 12 words on the first rank, 11 and padding on the second
READER = {"width": WIDTH, "num_heads": 4, "mlp_width": 24, "vocab_size": WORDS, "dropout": 0.5, "recompute": True}
T5 = {"encoder_depth": 2, "decoder_depth": 2, "head_width": 6, "relative_buckets": 8, "relative_max_distance": 16}
VIT = {"image_size": 12, "patch_size": 4, "width": WIDTH, "depth": 2, "num_heads": 4, "mlp_width": 24}
BUILDERS = {
    "opt": lambda: OptLanguageModel(**READER, depth=2, max_positions=16),
    "t5": lambda: T5LanguageModel(**READER, **T5, exact_gelu=True),
    "vision": lambda: EvaVit(**VIT, drop_path_rate=0.1, recompute=False),
}


def models(kind, tensor, folder):
    """The whole one, which is livelier than a fresh one, and this rank's share of it, read from a file of the whole."""
    paddle.seed(0)
    whole = BUILDERS[kind]()
    for parameter in whole.parameters():
        parameter.set_value(parameter + 0.3 * paddle.randn(parameter.shape))
    path = save_checkpoint(folder / f"{kind}{tensor.rank}", whole, kind=kind, step=0)
    with paddle.LazyGuard():
        split = BUILDERS[kind]()
    split.split_over(tensor)
    load_checkpoint(path, split, prefix="vision." if kind == "vision" else "language.")
    for model in (whole, split):
        freeze(model)
    return whole, split


def read(model):
    """The reader's loss behind trained queries, as in stage 2, and what it writes behind them."""
    random = np.random.default_rng(0)
    query = paddle.to_tensor(random.normal(size=(2, 3, WIDTH)).astype("f4"), stop_gradient=False)
    ids, mask = paddle.to_tensor(random.integers(3, WORDS, (2, 4))), paddle.to_tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    embeds = paddle.concat([query * 1.0, model.embed(ids)], axis=1)
    prefix = (embeds, paddle.concat([paddle.ones([2, 3], "int64"), mask], axis=1))
    logits = model(*prefix, ids, mask) if model.is_encoder_decoder else model(*prefix)[:, 2:-1]
    loss = lm_loss(logits, ids)
    loss.backward()
    found = {"logits": logits, "loss": loss, "gradient": query.grad, "embeddings": model.embed(ids)}
    for name, beams in (("greedy", 1), ("beam", 3)):
        settings = GenerationSettings(max_new_tokens=6, min_new_tokens=4, num_beams=beams, repetition_penalty=1.5)
        out = generate(model, (prefix[0].detach(), prefix[1]), settings, eos_id=2, pad_id=0)
        found |= {name: out.ids, f"{name}_scores": out.scores}
    return found


def look(model):
    """The encoder's features, and, as it may stand behind something trained, the gradient of its input."""
    image = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype("f4"), stop_gradient=False)
    features = model(image)
    features.square().mean().backward()
    return {"features": features, "gradient": image.grad}


def main(folder):
    layout = HybridConfig(dp=-1, sharding=1, sharding_stage=0, tp=2, tp_vision=True)
    context = STRATEGIES.get("hybrid")(layout, Device.cpu)
    found = {"place": [context.data_rank, context.data_size, context.tensor.rank, context.tensor.size]}
    for kind in BUILDERS:
        work = look if kind == "vision" else read
        for name, model in zip(("whole", "split"), models(kind, context.tensor, folder), strict=True):
            values = {key: np.asarray(value).tolist() for key, value in work(model).items()}
            count = sum(parameter.size for parameter in model.parameters())
            found[f"{kind}_{name}"] = {**values, "parameters": count}
    partial = folder / f".rank{context.rank}.json"
    partial.write_text(json.dumps(found))
    partial.rename(folder / f"rank{context.rank}.json")
    context.barrier()
    os._exit(0)  # now and then paddle's gloo crashes while the interpreter shuts down, after everything is done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
