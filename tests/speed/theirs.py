"""The side of PyTorch: python -m tests.speed.theirs --row ROW --way WAY --folder FOLDER --threads N; see worker.py.

"hf" is transformers as its documentation has it. "lavis" is what LAVIS computes, in its order and with its loops over the rows
of a batch, out of transformers' modules. LAVIS's own attention is written out, while transformers' image encoder and language
model call PyTorch's fused one, so that LAVIS itself would be slower than this.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, GenerationConfig

from tests.speed.worker import Answer, Inputs, Prepared, arguments, serve

Batch = dict[str, Tensor]


class Made(Inputs):
    """Also the model that writes, and pictures from their files."""

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array)

    def writer(self) -> Blip2ForConditionalGeneration:
        model = Blip2ForConditionalGeneration.from_pretrained(self.folder / "stage2").eval()
        set_dropout(model.qformer, self.meta["dropout"])
        return model

    def pictures(self, count: int) -> Tensor:
        """Read from their files and normalised, as the tasks of blip2x do it within a run."""
        mean, std = (np.array(self.meta[name], dtype=np.float32) for name in ("mean", "std"))
        images = [Image.open(self.folder / "pictures" / f"{number}.png").convert("RGB") for number in range(count)]
        arrays = [(np.asarray(image, dtype=np.float32) / 255 - mean) / std for image in images]
        return torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2).copy())


def set_dropout(qformer: nn.Module, share: float) -> None:
    """Of the model's config, which Hugging Face's folder does not keep."""
    for module in qformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = share


def prepare(row: str, way: str, folder: Path) -> Prepared:
    """Load what `row` needs, and give what a run of it calls."""
    made = Made(folder)
    if row in PARTS:
        return PARTS[row](made), None
    if row in ("stage1", "stage1_features"):
        return Stage1(made).prepared()
    if row == "rerank":
        return (rerank_with_pixels if way == "hf" else rerank_with_patches)(made), None
    return {"caption": caption, "vqa": vqa, "stage2": stage2, "load": load}[row](made)


class Writer:
    """Texts behind images and prompts, as transformers' `generate` writes them."""

    def __init__(self, made: Made, settings: dict[str, Any]):
        self._made, self._model = made, made.writer()
        self._tokenizer = Tokenizer.from_file(str(made.folder / "stage2/tokenizers/language/tokenizer.json"))
        meta = made.meta
        self._config = GenerationConfig(
            **settings,
            do_sample=False,
            eos_token_id=meta["end"],
            pad_token_id=meta["pad"],
            bos_token_id=2,
            decoder_start_token_id=0,
        )

    @torch.no_grad()
    def write(self, pixel_values: Tensor, prompts: list[list[int]]) -> list[str]:
        """A text for each image and its prompt."""
        meta, length = self._made.meta, max(map(len, prompts))
        ids, mask = [], []
        for prompt in prompts:
            gap = [meta["pad"]] * (length - len(prompt))
            is_opt = meta["kind"] == "opt"
            ids.append(gap + prompt if is_opt else prompt + gap)
            mask.append([0] * len(gap) + [1] * len(prompt) if is_opt else [1] * len(prompt) + [0] * len(gap))
        placeholder = torch.full((len(prompts), meta["queries"]), meta["image"])
        written = self._model.generate(
            pixel_values=pixel_values,
            input_ids=torch.cat([placeholder, torch.tensor(ids)], dim=1),
            attention_mask=torch.cat([torch.ones_like(placeholder), torch.tensor(mask)], dim=1),
            generation_config=self._config,
        )
        skipped = meta["queries"] + length if meta["kind"] == "opt" else 1
        return [self._text(row) for row in written[:, skipped:].tolist()]

    def _text(self, ids: list[int]) -> str:
        ids = ids[: ids.index(self._made.meta["end"])] if self._made.meta["end"] in ids else ids
        silent = self._made.meta["silent"]
        return self._tokenizer.decode([number for number in ids if number not in silent], skip_special_tokens=False).strip()


def caption(made: Made) -> Prepared:
    writer, count = Writer(made, made.meta["decoding"]["caption"]), made.sizes["captions"]

    def captions() -> Answer:
        return {"texts": writer.write(made.pictures(count), [made.meta["caption_prompt"]] * count)}

    return captions, None


def vqa(made: Made) -> Prepared:
    writer, asked, size = Writer(made, made.meta["decoding"]["vqa"]), made.meta["asked"], made.sizes["batch"]

    def answers() -> Answer:
        pixels, texts = made.pictures(made.sizes["asked"]), []
        for first in range(0, len(asked), size):
            rows = slice(first, first + size)
            texts += writer.write(pixels[asked[rows]], made.meta["questions"][rows])
        return {"texts": texts}

    return answers, None


class Cached(NamedTuple):
    """Keys and values [B, Q, D] of the queries in one layer's self-attention."""

    key_BQD: Tensor
    value_BQD: Tensor


class Head(nn.Module):
    """What stage 1 writes captions with; the matrix to words is that of the embeddings."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        super().__init__()
        own = {name.removeprefix("qformer.text.head_"): torch.from_numpy(array) for name, array in tensors.items()}
        width = len(own["norm.bias"])
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(own["bias"])
        self.transform.load_state_dict({"weight": own["transform.weight"].T, "bias": own["transform.bias"]})
        self.norm.load_state_dict({"weight": own["norm.weight"], "bias": own["norm.bias"]})

    def forward(self, hidden_BLD: Tensor, words_VD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(hidden_BLD))) @ words_VD.T + self.bias


class Stage1(nn.Module):
    """Contrast, matching and captions, step by step as in LAVIS's Blip2Qformer.forward (one process)."""

    def __init__(self, made: Made):
        super().__init__()
        self.model = Blip2ForImageTextRetrieval.from_pretrained(made.folder / "stage1")
        self.head = Head(load_file(made.folder / "stage1_head.safetensors"))
        self.temp = nn.Parameter(torch.tensor(made.meta["temperature"]))
        self.model.vision_model.encoder.requires_grad_(False)
        self.model.vision_model.embeddings.requires_grad_(False)
        set_dropout(self.model.qformer, made.meta["dropout"])
        self._smoothing, self._dec = made.meta["training"]["smoothing"], made.meta["dec"]
        self._made = made

    def prepared(self) -> Prepared:
        """A training step, and the losses of the first one without dropout."""
        batch = self._made.batch("stage1")
        given = {key: batch.pop(key) for key in ("negative_image_B", "negative_text_B")}
        self.eval()
        with torch.no_grad():
            parts = self({**batch, **given})
        losses = {name: value.numpy() for name, value in parts.items()}
        self.train()
        return training_step(self, lambda: self(batch)["loss"], self._made), losses

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        model, ids_BL, mask_BL = self.model, batch["text_ids_BL"], batch["text_mask_BL"]
        rows = len(ids_BL)
        patch_BPD = model.vision_model(batch["image_BCHW"]).last_hidden_state
        query_BQD = model.query_tokens.expand(rows, -1, -1)
        with self._caching() as cache:
            seen_BQD = model.qformer(query_embeds=query_BQD, encoder_hidden_states=patch_BPD).last_hidden_state
        image_BQE = F.normalize(model.vision_projection(seen_BQD), dim=-1)
        embeds_BLD = model.embeddings(input_ids=ids_BL)
        read_BLD = model.qformer(query_embeds=embeds_BLD, query_length=0, attention_mask=mask_BL).last_hidden_state
        text_BE = F.normalize(model.text_projection(read_BLD[:, 0]), dim=-1)

        i2t_BB = torch.matmul(image_BQE.unsqueeze(1), text_BE.unsqueeze(-1)).squeeze(-1).max(dim=-1).values / self.temp
        t2i_BB = torch.matmul(text_BE[:, None, None], image_BQE.transpose(1, 2)).squeeze(2).max(dim=-1).values / self.temp
        target_B = torch.arange(rows)
        itc = sum(F.cross_entropy(scores, target_B, label_smoothing=self._smoothing) for scores in (i2t_BB, t2i_BB)) / 2

        itm = self._match(patch_BPD, batch, i2t_BB, t2i_BB)
        decoder_ids_BL = ids_BL.clone()
        decoder_ids_BL[:, 0] = self._dec
        label_BL = decoder_ids_BL.masked_fill(mask_BL == 0, -100)
        logits_BLV = self._caption_logits(decoder_ids_BL, mask_BL, cache)[:, :-1]
        lm = F.cross_entropy(logits_BLV.flatten(0, 1), label_BL[:, 1:].flatten(), label_smoothing=self._smoothing)
        return {"itc": itc, "itm": itm, "lm": lm, "loss": itc + itm + lm}

    def _match(self, patch_BPD: Tensor, batch: Batch, i2t_BB: Tensor, t2i_BB: Tensor) -> Tensor:
        ids_BL, mask_BL = batch["text_ids_BL"], batch["text_mask_BL"]
        rows = len(ids_BL)
        if "negative_image_B" in batch:
            images, texts = batch["negative_image_B"].tolist(), batch["negative_text_B"].tolist()
        else:
            with torch.no_grad():
                weights = [scores.clone().fill_diagonal_(-10000).softmax(dim=1) for scores in (t2i_BB, i2t_BB)]
            images, texts = ([torch.multinomial(each[b], 1).item() for b in range(rows)] for each in weights)
        logits_N2 = matching_logits(
            self.model,
            torch.cat([patch_BPD, torch.stack([patch_BPD[b] for b in images]), patch_BPD]),
            torch.cat([ids_BL, ids_BL, torch.stack([ids_BL[b] for b in texts])]),
            torch.cat([mask_BL, mask_BL, torch.stack([mask_BL[b] for b in texts])]),
        )
        label_N = torch.cat([torch.ones(rows, dtype=torch.long), torch.zeros(2 * rows, dtype=torch.long)])
        return F.cross_entropy(logits_N2, label_N)

    @contextmanager
    def _caching(self) -> Iterator[list[Cached]]:
        """Keep the queries' keys and values, which transformers' Q-Former computes and lets go."""
        cache: list[Cached] = []
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            kept.append(output)

        attentions = [layer.attention.attention for layer in self.model.qformer.encoder.layer]
        hooks = [linear.register_forward_hook(keep) for each in attentions for linear in (each.key, each.value)]
        try:
            yield cache
        finally:
            for hook in hooks:
                hook.remove()
        cache.extend(Cached(*kept[first : first + 2]) for first in range(0, len(kept), 2))

    def _caption_logits(self, ids_BL: Tensor, mask_BL: Tensor, cache: list[Cached]) -> Tensor:
        """Tokens that see the queries and the tokens before them."""
        qformer, length = self.model.qformer, ids_BL.shape[1]
        hidden_BLD = qformer.dropout(qformer.layernorm(self.model.embeddings(input_ids=ids_BL)))
        past = cache[0].key_BQD.shape[1]
        visible_BLL = torch.tril(torch.ones(length, length)) * mask_BL[:, None]
        visible_BLS = torch.cat([visible_BLL.new_ones(len(ids_BL), length, past), visible_BLL], dim=2)
        bias_B1LS = ((1 - visible_BLS) * -10000.0).unsqueeze(1)
        for layer, (key_BQD, value_BQD) in zip(qformer.encoder.layer, cache, strict=True):
            attention = layer.attention.attention
            split = attention.transpose_for_scores
            key = torch.cat([split(key_BQD), split(attention.key(hidden_BLD))], dim=2)
            value = torch.cat([split(value_BQD), split(attention.value(hidden_BLD))], dim=2)
            scores = split(attention.query(hidden_BLD)) @ key.transpose(-1, -2) / attention.attention_head_size**0.5
            mixed = attention.dropout((scores + bias_B1LS).softmax(dim=-1)) @ value
            hidden_BLD = layer.attention.output(mixed.transpose(1, 2).flatten(2), hidden_BLD)
            hidden_BLD = layer.feed_forward_chunk(hidden_BLD)
        return self.head(hidden_BLD, self.model.embeddings.word_embeddings.weight)


def matching_logits(model: Blip2ForImageTextRetrieval, patch_NPD: Tensor, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """Logits [N, 2], as LAVIS's compute_itm."""
    query_NQD = model.query_tokens.expand(len(ids_NL), -1, -1)
    count = query_NQD.shape[1]
    hidden_NTD = model.qformer(
        query_embeds=model.embeddings(input_ids=ids_NL, query_embeds=query_NQD),
        query_length=count,
        attention_mask=torch.cat([torch.ones(query_NQD.shape[:2], dtype=torch.long), mask_NL], dim=1),
        encoder_hidden_states=patch_NPD,
        encoder_attention_mask=torch.ones(patch_NPD.shape[:2], dtype=torch.long),
    ).last_hidden_state
    return model.itm_head(hidden_NTD[:, :count]).mean(dim=1)


def training_step(module: nn.Module, loss: Callable[[], Tensor], made: Made) -> Callable[[], None]:
    """Forward, backward and AdamW, with weight decay where a parameter has two axes or more."""
    own = made.meta["training"]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": own["weight_decay"]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=own["lr"], betas=(own["beta1"], own["beta2"]), eps=own["eps"])

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stage2(made: Made) -> Prepared:
    model, batch, meta = made.writer(), made.batch("stage2"), made.meta
    for part in (model.vision_model.encoder, model.vision_model.embeddings, model.language_model):
        part.requires_grad_(False)
    images = batch["image_BCHW"]
    places = torch.full((len(images), meta["queries"]), meta["image"])
    if meta["kind"] == "opt":
        ids_BL, mask_BL = batch["text_ids_BL"], batch["text_mask_BL"]
        label_BL = ids_BL.masked_fill(batch["label_mask_BL"] == 0, -100)
        labels = torch.cat([torch.full_like(places, -100), label_BL], dim=1)
    else:
        ids_BL, mask_BL = batch["input_ids_BL"], batch["input_mask_BL"]
        labels = batch["output_ids_BT"].masked_fill(batch["output_mask_BT"] == 0, -100)
    inputs = {
        "pixel_values": images,
        "input_ids": torch.cat([places, ids_BL], dim=1),
        "attention_mask": torch.cat([torch.ones_like(places), mask_BL], dim=1),
        "labels": labels,
    }
    with torch.no_grad():
        losses = {"loss": model(**inputs).loss.numpy()}
    model.qformer.train()
    return training_step(model, lambda: model(**inputs).loss, made), losses


def rerank_with_pixels(made: Made) -> Callable[[], Answer]:
    model = Blip2ForImageTextRetrieval.from_pretrained(made.folder / "stage1").eval()
    model.config.image_token_index = None  # the texts have no placeholders
    image_BCHW, ids_NL, mask_NL, places, size = _pairs(made)

    @torch.no_grad()
    def judge() -> Answer:
        found = []
        for first in range(0, len(places), size):
            rows = slice(first, first + size)
            pixels = image_BCHW[places[rows]]
            out = model(pixels, ids_NL[rows], mask_NL[rows], use_image_text_matching_head=True)
            found.append(out.logits_per_image)
        return {"logits": torch.cat(found).numpy()}

    return judge


def rerank_with_patches(made: Made) -> Callable[[], Answer]:
    model = Blip2ForImageTextRetrieval.from_pretrained(made.folder / "stage1").eval()
    image_BCHW, ids_NL, mask_NL, _, size = _pairs(made)
    candidates = made.sizes["candidates"]

    @torch.no_grad()
    def judge() -> Answer:
        patch_BPD, found = model.vision_model(image_BCHW).last_hidden_state, []
        for image in range(len(image_BCHW)):
            end = (image + 1) * candidates
            for first in range(image * candidates, end, size):
                rows = slice(first, min(first + size, end))
                repeated = patch_BPD[image].repeat(rows.stop - rows.start, 1, 1)
                found.append(matching_logits(model, repeated, ids_NL[rows], mask_NL[rows]))
        return {"logits": torch.cat(found).numpy()}

    return judge


def _pairs(made: Made) -> tuple[Tensor, Tensor, Tensor, list[int], int]:
    """Images, texts, the image of each text, and how many pairs a pass takes."""
    images, candidates = made.sizes["judged"], made.sizes["candidates"]
    places = [image for image in range(images) for _ in range(candidates)]
    return made.array("image_BCHW")[:images], *made.batch("rerank").values(), places, made.sizes["batch"]


def load(made: Made) -> Prepared:
    kept = []

    def read() -> None:
        kept.clear()  # a second model is not to be beside the first
        kept.append(Blip2ForConditionalGeneration.from_pretrained(made.folder / "stage2"))

    return read, None


def vision(made: Made) -> Callable[[], Answer]:
    model, image_BCHW = made.writer().vision_model, made.array("image_BCHW")[: made.sizes["inputs"]]

    @torch.no_grad()
    def encode() -> Answer:
        return {"patches": model(image_BCHW).last_hidden_state.numpy()}

    return encode


def qformer(made: Made) -> Callable[[], Answer]:
    model, patch_BPD = made.writer(), made.array("qformer.patch_BPD")

    @torch.no_grad()
    def look() -> Answer:
        query_BQD = model.query_tokens.expand(len(patch_BPD), -1, -1)
        return {"queries": model.qformer(query_embeds=query_BQD, encoder_hidden_states=patch_BPD).last_hidden_state.numpy()}

    return look


def language(made: Made, *, backward: bool) -> Callable[[], Answer]:
    model, embeds_BLD = made.writer().language_model.requires_grad_(False), made.array("language.embeds_BLD")
    inputs = {"inputs_embeds": embeds_BLD, "attention_mask": torch.ones(embeds_BLD.shape[:2], dtype=torch.long)}
    if made.meta["kind"] == "t5":
        inputs["decoder_input_ids"] = torch.ones(embeds_BLD.shape[:2], dtype=torch.long)
    embeds_BLD.requires_grad_(backward)

    def read() -> Answer:
        logits_BLV = model(**inputs, use_cache=False).logits
        if not backward:
            return {"logits": logits_BLV[0].numpy()}
        logits_BLV.mean().backward()
        gradient = embeds_BLD.grad.numpy()
        embeds_BLD.grad = None
        return {"gradient": gradient}

    return read if backward else torch.no_grad()(read)


PARTS = {"vision": vision, "qformer": qformer, "language": partial(language, backward=False)}
PARTS["language_backward"] = partial(language, backward=True)


if __name__ == "__main__":
    args = arguments()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python (PyTorch's)": platform.python_version(),
    }
    serve(args, prepare, names)
