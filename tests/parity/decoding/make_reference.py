"""Makes the files beside it with transformers: two tiny random BLIP-2, and what they write in random decoding cases.

    pip install torch==2.13.0 transformers==4.57.6
    python make_reference.py

Float32 noise decides a case in which two texts score nearly the same. Such cases are found by rule: a case is *close* if any of
these changes a token of it: computing in float64, or one of NUDGES random relative changes of NUDGE in all weights. A nudge
moves logits some hundred times as far as float32 noise does (both are printed), so that it turns about half of the cases which
noise can turn, and all NUDGES together miss one in 2 ** NUDGES of these, which are rare to begin with. What is not close has to
be the same everywhere.

Prompts have no placeholders in the stored cases, since blip2x puts the queries in front itself. Hugging Face gets them in front
of the padding. For OPT it gets embeddings and not ids: then its repetition penalty sees the new tokens only, as in LAVIS's
current code and in blip2x; given ids, the penalty would count the prompt, its padding and the placeholders too.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, GenerationConfig, OPTConfig, T5Config

HERE = Path(__file__).parent
BATCHES, CASES_PER_BATCH = 24, 10  # of each family
NUDGES, NUDGE = 4, 3e-5
VOCABULARY, IMAGE_TOKEN, QUERIES, IMAGES = 50, 49, 5, 8
PAD = {"opt": 1, "t5": 0}
SEED = {"opt": 3, "t5": 7}  # of weights that write many different words, T5's start token among them
# Each part has a width of its own, so a missed transpose fits in square matrices only, and there the numbers show it.
VISION = {"image_size": 12, "patch_size": 4, "hidden_size": 20, "intermediate_size": 28}
VISION |= {"num_hidden_layers": 2, "num_attention_heads": 2}
QFORMER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 37}
OPT = {"hidden_size": 18, "word_embed_proj_dim": 18, "ffn_dim": 30, "num_hidden_layers": 2, "num_attention_heads": 3}
OPT |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
T5 = {"d_model": 16, "d_kv": 5, "d_ff": 22, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"vocab_size": VOCABULARY, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
# as the published files say: the exact gelu in spite of the name, a head of its own
T5 |= {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}

Case = dict[str, Any]
Result = tuple[list[list[int]], list[float]]  # tokens and score of each text


def tiny_model(family: str, generator: torch.Generator) -> Blip2ForConditionalGeneration:
    text = OPTConfig(**OPT) if family == "opt" else T5Config(**T5)
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    enliven(model, generator)
    return model


@torch.no_grad()
def enliven(model: Blip2ForConditionalGeneration, generator: torch.Generator) -> None:
    """Random biases and norms, and predictions sharp enough that texts differ, and end, early and late."""

    def normal(parameter: Tensor, std: float) -> Tensor:
        return std * torch.randn(parameter.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(normal(parameter, 0.2) + ("norm" in name.lower() and name.endswith("weight")))
        elif name.endswith(("embed_tokens.weight", "shared.weight", "lm_head.weight")):
            parameter.copy_(normal(parameter, 0.6))
        elif "relative_attention_bias" in name:
            parameter.copy_(normal(parameter, 1.0))
        else:
            fan_in = 1 if name.endswith(("query_tokens", "embedding", "embed_positions.weight")) else parameter[0].numel()
            parameter.copy_(normal(parameter, gain(name) * fan_in**-0.5))
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.qkv.bias[VISION["hidden_size"] : 2 * VISION["hidden_size"]] = 0  # EVA has no bias on keys


def gain(name: str) -> float:
    """T5 divides nothing by the head's width, and its decoder has to be told to look at the prefix."""
    if "EncDecAttention" in name:
        return 1.0 if name.endswith(("q.weight", "k.weight")) else 2.5
    if "SelfAttention" in name:
        return 0.8
    return 1.0 if "DenseReluDense" in name else 1.5


def draw_batch(family: str, rng: random.Random) -> dict[str, Any]:
    """One to three images with prompts of unequal length: OPT's padded on the left, T5's on either side."""
    rows = rng.randint(1, 3)
    lengths = rng.sample(range(1, 7), rows)
    on_the_left = family == "opt" or rng.random() < 0.5
    ids, mask = [], []
    for length in lengths:
        words = [rng.randrange(3, IMAGE_TOKEN) for _ in range(length - 1)]
        words = [2, *words] if family == "opt" else [*words, 1]  # </s> stands in front, or at the end
        padding = max(lengths) - length
        ids.append([PAD[family]] * padding + words if on_the_left else words + [PAD[family]] * padding)
        mask.append([0] * padding + [1] * length if on_the_left else [1] * length + [0] * padding)
    return {"images": rng.sample(range(IMAGES), rows), "ids": ids, "mask": mask}


def draw_settings(rng: random.Random) -> Case:
    beams = rng.randint(1, 5)
    return {
        "num_beams": beams,
        "length_penalty": rng.choice([-1.0, 0.0, 1.0, 2.0]),
        "repetition_penalty": rng.choice([1.0, 1.2, 1.5]),
        "min_new_tokens": rng.randint(0, 4),
        "max_new_tokens": rng.randint(4, 14),
        "early_stopping": rng.random() < 0.5,
        "num_return_sequences": rng.randint(1, beams),
    }


class Writer:
    """A model with one batch: what it writes in any settings."""

    def __init__(self, family: str, model: Blip2ForConditionalGeneration, batch: dict[str, Any], images: Tensor):
        self.family, self.model = family, model
        self.pixels = images[batch["images"]].to(model.dtype)
        ids, mask = torch.tensor(batch["ids"]), torch.tensor(batch["mask"])
        placeholder = torch.full((len(ids), QUERIES), IMAGE_TOKEN)
        self.ids = torch.cat([placeholder, ids], dim=1)
        self.mask = torch.cat([torch.ones_like(placeholder), mask], dim=1)

    def inputs(self, *, by_ids: bool) -> dict[str, Tensor]:
        if by_ids or self.family == "t5":
            return {"pixel_values": self.pixels, "input_ids": self.ids, "attention_mask": self.mask}
        embeds = self.model.get_input_embeddings()(self.ids)
        return {"pixel_values": self.pixels, "inputs_embeds": embeds, "attention_mask": self.mask}

    @torch.no_grad()
    def write(self, settings: Case, eos: int, *, by_ids: bool = False) -> Result:
        config = GenerationConfig(
            **settings,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=PAD[self.family],
            bos_token_id=2,
            decoder_start_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
        out = self.model.generate(**self.inputs(by_ids=by_ids), generation_config=config)
        skipped = 1 if self.family == "t5" else self.ids.shape[1] if by_ids else 0
        texts = [until(row, eos) for row in out.sequences[:, skipped:].tolist()]
        if settings["num_beams"] > 1:
            return texts, out.sequences_scores.tolist()
        logprob_TBV = torch.stack(out.logits).double().log_softmax(-1)
        sums = [sum(logprob_TBV[t, row, token].item() for t, token in enumerate(text)) for row, text in enumerate(texts)]
        return texts, [total / len(text) ** settings["length_penalty"] for total, text in zip(sums, texts, strict=True)]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the first new token, [B, V]."""
        start = {"decoder_input_ids": torch.zeros(len(self.ids), 1, dtype=torch.long)} if self.family == "t5" else {}
        return self.model(**self.inputs(by_ids=True), **start).logits[:, -1].double()


def until(tokens: list[int], eos: int) -> list[int]:
    """Up to the end token: what stands behind it differs by mode."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@torch.no_grad()
def nudged(model: Blip2ForConditionalGeneration, generator: torch.Generator) -> Blip2ForConditionalGeneration:
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))
    return model


def common_tokens(writer: Writer) -> list[int]:
    """What the model likes to write: as end tokens they end texts early, late, and several beams at once."""
    free = {"num_beams": 5, "num_return_sequences": 5, "max_new_tokens": 12}
    texts, _ = writer.write(free, eos=IMAGE_TOKEN)
    counts = Counter(token for text in texts for token in text if token > 2)
    return [token for token, _ in counts.most_common(4)]


def make_family(family: str, images: Tensor) -> dict[str, list]:
    rng, generator = random.Random(family), torch.Generator().manual_seed(SEED[family])
    model = tiny_model(family, generator)
    model.save_pretrained(HERE / family)
    others = [copy.deepcopy(model).double(), *(nudged(model, generator) for _ in range(NUDGES))]
    batches, cases, differences = [], [], defaultdict(float)
    same_by_ids = {"with": [], "without": []}  # a repetition penalty
    for number in range(BATCHES):
        batch = draw_batch(family, rng)
        batches.append(batch)
        writer, exact, *nudges = (Writer(family, each, batch, images) for each in (model, *others))
        logits_BV = exact.logits()
        for name, moved in (("float32", [writer]), ("nudges", nudges)):
            differences[name] = max(differences[name], *((each.logits() - logits_BV).abs().max().item() for each in moved))
        ends = common_tokens(writer)
        for _ in range(CASES_PER_BATCH):
            settings, eos = draw_settings(rng), rng.choice(ends)
            case = {"batch": number, "eos": eos, "settings": settings}
            texts, rounded_scores = writer.write(settings, eos)
            exact_texts, scores = exact.write(settings, eos)
            if any(other != texts for other in (exact_texts, *(each.write(settings, eos)[0] for each in nudges))):
                cases.append({**case, "close": True})
                continue
            cases.append({**case, "texts": texts, "scores": [round(score, 7) for score in scores]})
            score_differences = (abs(a - b) for a, b in zip(rounded_scores, scores, strict=True))
            differences["scores"] = max(differences["scores"], *score_differences)
            if family == "opt":
                same = writer.write(settings, eos, by_ids=True)[0] == texts
                same_by_ids["without" if settings["repetition_penalty"] == 1 else "with"].append(same)
    report(family, cases)
    print(f"  logits: float32 moves them up to {differences['float32']:.0e}, nudges up to {differences['nudges']:.0e}")
    print(f"  scores: float32 moves them up to {differences['scores']:.0e}")
    for penalty, same in same_by_ids.items():
        if same:
            print(f"  given ids, {penalty} a repetition penalty: {sum(same)} of {len(same)} the same")
    assert all(same_by_ids["without"])
    return {"batches": batches, "cases": cases}


def report(family: str, cases: list[Case]) -> None:
    decided = [case for case in cases if "texts" in case]
    texts = [(text, case) for case in decided for text in case["texts"]]
    ended = [text for text, case in texts if text[-1] == case["eos"]]
    print(f"{family}: {len(decided)} of {len(cases)} cases decided; {len(ended)} of {len(texts)} texts end by themselves")
    print(f"  lengths of ended texts: {sorted(Counter(map(len, ended)).items())}")
    print(
        f"  first words: {len({text[0] for text, _ in texts})}; texts with padding: {sum(PAD[family] in t for t, _ in texts)}"
    )


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, VISION["image_size"], VISION["image_size"])
    np.save(HERE / "images.npy", images.numpy())
    for family in PAD:
        made = make_family(family, images)
        parts = (f'"{key}": [\n' + ",\n".join(map(json.dumps, made[key])) + "\n]" for key in made)
        (HERE / f"{family}.json").write_text("{" + ", ".join(parts) + "}\n")
    for file in HERE.glob("*/*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    main()
