"""Random models, pictures, texts and token numbers that both sides read: python -m tests.speed.made FOLDER MODEL

The folder then has

    stage2/, stage1/          Hugging Face's folders, written by blip2x's export, with blip2x's tokenizers in them
    stage1_head.safetensors   what writes captions in stage 1, for which Hugging Face has no place
    pictures/, captions.json, questions.json   a data set of its own (dataset=custom)
    inputs.npz, meta.json     the same as arrays and token numbers, and the settings

Weights are drawn so that numbers keep their size from layer to layer, attention is neither flat nor sharp, and the words that
are written depend on the picture. What ReLU adds to every position alike would have OPT write the same few words again and
again, so that the last norm's bias takes it away. A random model as good as never writes the end token: its row among the
embeddings is END times as long as a word's, so that it is now likely and now unlikely, and texts end after different numbers of
words.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip2x.startup import prepare_process_once

prepare_process_once()

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from paddle import Tensor, nn  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from blip2x.config.compose import compose_config  # noqa: E402
from blip2x.config.model import ModelConfig  # noqa: E402
from blip2x.config.run import RunConfig  # noqa: E402
from blip2x.data.collate import LoadedCaption, Stage1Collate, Stage2Collate, Stage2EncoderDecoderCollate  # noqa: E402
from blip2x.data.tokenize import TextTokenizer, clean_question, train_tokenizer  # noqa: E402
from blip2x.data.transforms import EvalTransform  # noqa: E402
from blip2x.models.assemblies.stage1 import build_stage1  # noqa: E402
from blip2x.models.assemblies.stage2 import Stage2Model, build_stage2, join_prefix  # noqa: E402
from blip2x.models.weights.checkpoint import fill  # noqa: E402
from blip2x.models.weights.describe import follow_source  # noqa: E402
from blip2x.models.weights.export import huggingface_config, to_huggingface, write_json, write_shards  # noqa: E402
from blip2x.models.weights.stored import StoredTensor  # noqa: E402
from blip2x.tasks.common.captioning import encode_prompts  # noqa: E402
from tests.speed.rows import CAPTION_WORDS, SIZES, Sizes  # noqa: E402

DATASET = ("dataset=custom", "dataset.images=.")
END = 6.0
SHARPNESS = 3.0  # standard deviation of the language model's logits
WORDS = 1000  # of a model that leaves the size of its vocabulary open
IMAGE_TOKEN = {"opt": 0, "t5": 2}  # that no text has
READ = ("question", "short", "answer", "a", "photo", "of", ":", "?")  # words of the prompts


def make(folder: Path, model: str) -> None:
    """Everything for `model`, drawn with a fixed seed."""
    rng, sizes = np.random.default_rng(0), SIZES[model]
    cfg = compose_config(["task=caption", f"model={model}", *DATASET])
    cfg.model = follow_source(cfg.model, None)
    language = tokenizer_of(cfg.model.language.kind, cfg.model.language.vocab_size or WORDS, spare=0)
    bert = tokenizer_of("bert", cfg.model.qformer.vocab_size or WORDS, spare=1)  # [DEC] is added
    with paddle.LazyGuard():
        stage2 = build_stage2(cfg.model, vocab_size=language.vocab_size)
        stage1 = build_stage1(cfg.model, vocab_size=bert.vocab_size)
    end, pad, image = language.end_id, language.pad_id, IMAGE_TOKEN[cfg.model.language.kind]
    special, temperature = {"end": end, "pad": pad, "image": image}, cfg.model.temperature
    transform = EvalTransform(cfg.dataset.transform, cfg.model.vision.image_size)
    images = pictures(folder / "pictures", sizes.images, transform, rng)
    tensors = drawn(stage2, rng, end=end, temperature=temperature)
    if cfg.model.language.kind == "opt":
        centre(stage2, tensors, images[:4], rng)
    export(folder / "stage2", tensors, cfg.model, language, "language", special)
    tensors = drawn(stage1, rng, end=end, temperature=temperature)
    export(folder / "stage1", tensors, cfg.model, bert, "qformer", special)
    head = {name: tensor.read() for name, tensor in tensors.items() if name.startswith("qformer.text.head_")}
    save_file(head, folder / "stage1_head.safetensors")
    meta = {"model": model, "sizes": asdict(sizes), **special, "kind": cfg.model.language.kind}
    meta |= {"dec": bert.dec_id, "temperature": temperature, "dropout": cfg.model.qformer.dropout}
    meta["silent"] = [number for number in range(len(READ)) if not language.decode([number])]  # special tokens
    make_inputs(folder, meta, sizes, cfg, transform, images, language, bert, rng)


def tokenizer_of(family: str, size: int, spare: int) -> TextTokenizer:
    """A word for each number, so that whatever is written can be read; `spare` tokens come by themselves."""
    special = train_tokenizer([], family).vocab_size - spare
    words = [*READ, *(f"w{number}" for number in range(size - special - spare - len(READ)))]
    found = train_tokenizer(words, family)
    if found.vocab_size != size:
        raise ValueError(f"the tokenizer has {found.vocab_size} tokens, not {size}")
    return found


def drawn(model: nn.Layer, rng: np.random.Generator, *, end: int, temperature: float) -> dict[str, StoredTensor]:
    """Numbers for every parameter of `model`."""
    found = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        array = rng.standard_normal(shape, dtype=np.float32)
        if name == "temp":
            array = np.full(shape, temperature)
        elif len(shape) == 1:
            is_norm = "norm" in name and name.endswith("weight")
            array = 0.1 * array + is_norm
        elif name == "qformer.query_tokens" or name.endswith(("positions", "class_token", "position_embeddings.weight")):
            array *= 0.3
        elif name.startswith("language.") and name.endswith(("word_embeddings.weight", "shared.weight")):
            array *= SHARPNESS * shape[1] ** -0.5
            array[end] *= END
        elif name.endswith("lm_head.weight"):  # [D, V]
            array *= SHARPNESS * shape[0] ** -0.5
            array[:, end] *= END
        elif name.endswith("word_embeddings.weight"):
            array *= shape[1] ** -0.5
        elif "relative" in name:
            pass
        elif len(shape) == 4:  # patches
            array *= np.prod(shape[1:]) ** -0.5
        else:
            array *= shape[0] ** -0.5
        found[name] = StoredTensor.of(name, array.astype(np.float32))
    return found


@paddle.no_grad()
def centre(model: Stage2Model, tensors: dict[str, StoredTensor], images: list[np.ndarray], rng: np.random.Generator) -> None:
    """Let what OPT's last norm gives behind pictures, of random words, be 0 in the mean."""
    fill(model, tensors, "random numbers")
    model.eval()
    found: list[Tensor] = []
    hook = model.language.opt.decoder.final_layer_norm.register_forward_post_hook(lambda _layer, _in, out: found.append(out))
    ids_BL = paddle.to_tensor(rng.integers(5, model.language.vocab_size, (len(images), 24)))
    query_BQD = model.encode(paddle.to_tensor(np.stack(images)))
    model.language(*join_prefix(model.language, query_BQD, ids_BL, paddle.ones_like(ids_BL)))
    hook.remove()
    mean_D = found[0][:, -ids_BL.shape[1] :].mean(axis=[0, 1]).numpy()
    name = "language.opt.decoder.final_layer_norm.bias"
    tensors[name] = StoredTensor.of(name, tensors[name].read() - mean_D)


def pictures(folder: Path, count: int, transform: EvalTransform, rng: np.random.Generator) -> list[np.ndarray]:
    """Squares of some colours with noise: as files, and as the model reads them [3, S, S]."""
    folder.mkdir(parents=True)
    size, images = transform.size[0], []
    for number in range(count):
        blocks = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((size // 4, size // 4, 1)))
        picture = Image.fromarray(np.clip(blocks + rng.normal(0, 20, blocks.shape), 0, 255).astype(np.uint8))
        picture.save(folder / f"{number}.png")
        images.append(transform(picture))
    return images


def export(
    folder: Path,
    tensors: dict[str, StoredTensor],
    cfg: ModelConfig,
    tokenizer: TextTokenizer,
    part: str,
    special: dict[str, int],
) -> None:
    """As task=convert writes it."""
    folder.mkdir(parents=True)
    theirs, _ = to_huggingface(tensors)
    write_shards(folder, theirs, max_gb=5.0)
    write_json(folder / "config.json", huggingface_config(cfg, tensors, **special))
    own = {"eos_token_id": special["end"], "pad_token_id": special["pad"], "decoder_start_token_id": 0}
    write_json(folder / "generation_config.json", own)
    tokenizer.save(folder / "tokenizers" / part)


def make_inputs(
    folder: Path,
    meta: dict[str, Any],
    sizes: Sizes,
    caption: RunConfig,
    transform: EvalTransform,
    images: list[np.ndarray],
    language: TextTokenizer,
    bert: TextTokenizer,
    rng: np.random.Generator,
) -> None:
    """Texts, as files and as arrays."""

    def text(least: int, most: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(0, 900, rng.integers(least, most + 1)))

    captions = [text(*CAPTION_WORDS) for _ in images]
    questions = [text(4, 11) for _ in range(sizes.questions)]
    rows = [{"image": f"{n}.png", "caption": captions[n], "image_id": n} for n in range(sizes.captions)]
    write_json(folder / "captions.json", rows)
    asked = [n * sizes.asked // sizes.questions for n in range(sizes.questions)]
    rows = [
        {"image": f"{image}.png", "image_id": image, "question": question, "question_id": n, "answer": ["yes"] * 10}
        for n, (image, question) in enumerate(zip(asked, questions, strict=True))
    ]
    write_json(folder / "questions.json", rows)

    words = [f"model={meta['model']}", *DATASET]
    vqa, training = (compose_config([f"task={task}", *words]) for task in ("vqa_zeroshot", "pretrain_stage1"))
    pairs = [LoadedCaption(images[n], n, captions[n]) for n in range(sizes.batch)]
    stage1 = Stage1Collate(transform, bert, sizes.text_tokens)
    if language.family == "t5":
        stage2 = Stage2EncoderDecoderCollate(transform, language, sizes.text_tokens, "", False)([(pair, 0) for pair in pairs])
    else:
        stage2 = Stage2Collate(transform, language, sizes.text_tokens, "")(pairs)
    candidates = bert.encode(
        [text(*CAPTION_WORDS) for _ in range(sizes.judged * sizes.candidates)], max_length=sizes.text_tokens
    )
    arrays = {"image_BCHW": np.stack(images)}
    arrays |= {f"stage1.{name}": array for name, array in stage1(pairs).items()}
    arrays |= {f"stage2.{name}": array for name, array in stage2.items()}
    arrays |= dict(zip(("rerank.ids_NL", "rerank.mask_NL"), candidates, strict=True))
    arrays["stage1.negative_image_B"] = np.roll(np.arange(sizes.batch), 1)
    arrays["stage1.negative_text_B"] = np.roll(np.arange(sizes.batch), -1)
    shape = caption.model
    queries, width = shape.qformer.num_queries, shape.language.width
    arrays["language.embeds_BLD"] = rng.standard_normal((sizes.inputs, queries + sizes.text_tokens, width), dtype=np.float32)
    patches = (shape.vision.image_size // shape.vision.patch_size) ** 2 + 1
    arrays["qformer.patch_BPD"] = rng.standard_normal((sizes.inputs, patches, shape.vision.width), dtype=np.float32)
    np.savez(folder / "inputs.npz", **arrays)

    def ids(prompt: str) -> list[int]:
        return encode_prompts(language, [prompt])[0][0].tolist()

    meta |= {"queries": queries, "caption_prompt": ids(caption.task.prompt), "asked": asked}
    meta["questions"] = [ids(vqa.task.prompt.replace("{}", clean_question(question))) for question in questions]
    meta["decoding"] = {kind: decoding(each.task) for kind, each in (("caption", caption), ("vqa", vqa))}
    meta["training"] = {"smoothing": training.task.label_smoothing}
    meta["training"] |= {name: getattr(training.optim, name) for name in ("lr", "weight_decay", "beta1", "beta2", "eps")}
    meta |= {"mean": list(caption.dataset.transform.mean), "std": list(caption.dataset.transform.std)}
    write_json(folder / "meta.json", meta)


def decoding(task: Any) -> dict[str, Any]:
    """The options that both sides have by the same names."""
    names = ("num_beams", "length_penalty", "repetition_penalty", "min_new_tokens", "max_new_tokens", "early_stopping")
    return {name: getattr(task, name) for name in names}


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
