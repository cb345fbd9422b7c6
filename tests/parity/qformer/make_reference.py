"""Makes the file beside it with PyTorch: a tiny random BLIP-2, what stage 1 computes from it, and what stage 2 does.

    pip install torch==2.13.0 transformers==4.57.6
    python make_reference.py

Hugging Face has matching, contrast and the whole of stage 2, but no captions from the Q-Former and no losses of stage 1: these
are written here. The models compute in float64 from weights that float32 holds exactly, so that what a comparison finds is only
our rounding. Weights are stored under blip2x's names and layouts: a linear layer is [in, out] here and [out, in] in PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, OPTConfig

HERE = Path(__file__).parent
# No two widths are equal, so a missed transpose fits in square matrices only, and there the numbers show it.
VISION = {"image_size": 12, "patch_size": 4, "hidden_size": 20, "intermediate_size": 28}
VISION |= {"num_hidden_layers": 2, "num_attention_heads": 2}
QFORMER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 37}
QFORMER |= {"max_position_embeddings": 11, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPT = {"hidden_size": 18, "word_embed_proj_dim": 18, "ffn_dim": 30, "num_hidden_layers": 2, "num_attention_heads": 3}
OPT |= {"vocab_size": 41, "max_position_embeddings": 24, "dropout": 0.0}
QUERIES, EMBED_DIM = 5, 14
CLS, DEC, IMAGE_TOKEN = 35, 36, 40
LN_VISION_EPS, TEMPERATURE, SMOOTHING = 1e-5, 0.07, 0.1
NEGATIVE_IMAGE, NEGATIVE_TEXT = [1, 2, 0], [2, 0, 1]
# Every kind of parameter, and both ways of the gradient: through the queries' pass and the cache that captions read.
GRADIENTS = [
    "ln_vision.weight",
    "qformer.layers.0.attention.value.weight",
    "qformer.layers.0.cross_attention.key.weight",
    "qformer.layers.1.query_ffn.fc1.weight",
    "qformer.layers.1.text_ffn.fc1.weight",
    "qformer.layers.2.cross_attention.norm.weight",
    "qformer.query_tokens",
    "qformer.text.head_transform.weight",
    "qformer.text.word_embeddings.weight",
    "temp",
    "text_proj.weight",
    "vision_proj.weight",
]
RENAMES = [  # in this order
    ("vision_model.embeddings.class_embedding", "vision.embeddings.class_token"),
    ("vision_model.embeddings.position_embedding", "vision.embeddings.positions"),
    ("vision_model.embeddings.patch_embedding", "vision.embeddings.projection"),
    ("vision_model.encoder.layers", "vision.blocks"),
    ("vision_model.post_layernorm", "ln_vision"),
    ("self_attn.projection", "attention.out"),
    ("self_attn.qkv", "attention.qkv"),
    (".layer_norm", ".norm"),
    ("mlp.fc", "fc"),
    ("qformer.layernorm", "qformer.embeddings_norm"),
    ("qformer.encoder.layer.", "qformer.layers."),
    ("crossattention.attention.", "cross_attention."),
    ("crossattention.output.dense", "cross_attention.out"),
    ("crossattention.output.LayerNorm", "cross_attention.norm"),
    ("attention.attention.", "attention."),
    ("attention.output.dense", "attention.out"),
    ("attention.output.LayerNorm", "attention.norm"),
    ("intermediate_query.dense", "query_ffn.fc1"),
    ("output_query.dense", "query_ffn.fc2"),
    ("output_query.LayerNorm", "query_ffn.norm"),
    ("intermediate.dense", "text_ffn.fc1"),
    ("output.dense", "text_ffn.fc2"),
    ("output.LayerNorm", "text_ffn.norm"),
    ("vision_projection", "vision_proj"),
    ("text_projection", "text_proj"),
    ("language_projection", "language_proj"),
    ("language_model.model.decoder.embed_tokens", "language.opt.embeddings.word_embeddings"),
    ("language_model.model.decoder.embed_positions", "language.opt.embeddings.position_embeddings"),
    ("language_model.model.decoder.", "language.opt.decoder."),
    ("self_attn_layer_norm", "norm1"),
]
generator = torch.Generator().manual_seed(0)

Arrays = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Random biases and norms, attention that is neither flat nor sharp, and queries as small as BERT draws them."""
    for name, parameter in module.named_parameters():
        if name == "query_tokens":
            parameter.copy_(0.02 * random(*parameter.shape))  # their variance is small: the first norm's epsilon counts
        elif parameter.ndim < 2:
            parameter.copy_(0.3 * random(*parameter.shape) + ("norm" in name.lower() and name.endswith("weight")))
        elif "embed" in name:
            parameter.copy_(0.3 * random(*parameter.shape))
        else:
            parameter.copy_(parameter.shape[1] ** -0.5 * random(*parameter.shape))


class CaptionHead(nn.Module):
    """BERT's language-model head; its matrix is the word embeddings'. `temp` has no other place to be."""

    def __init__(self):
        super().__init__()
        self.head_transform = nn.Linear(QFORMER["hidden_size"], QFORMER["hidden_size"])
        self.head_norm = nn.LayerNorm(QFORMER["hidden_size"], eps=1e-12)
        self.head_bias = nn.Parameter(torch.zeros(QFORMER["vocab_size"]))
        self.temp = nn.Parameter(torch.tensor(0.0))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        return self.head_norm(F.gelu(self.head_transform(hidden))) @ words.T + self.head_bias


class Stage1:
    """LAVIS's Blip2Qformer from Hugging Face's parts."""

    def __init__(self):
        config = Blip2Config(
            vision_config=VISION,
            qformer_config={**QFORMER, "use_qformer_text_input": True},
            num_query_tokens=QUERIES,
            image_text_hidden_size=EMBED_DIM,
        )
        self.model, self.head = Blip2ForImageTextRetrieval(config).eval(), CaptionHead()
        self.model.vision_model.post_layernorm.eps = LN_VISION_EPS
        enliven(self.model)
        enliven(self.head)
        width = VISION["hidden_size"]
        with torch.no_grad():
            self.head.temp.fill_(TEMPERATURE)
            for layer in self.model.vision_model.encoder.layers:
                layer.self_attn.qkv.bias[width : 2 * width] = 0  # there is none in EVA

    def parameters(self) -> Arrays:
        """By our names, in PyTorch's layouts."""
        named = {our_name(name): parameter for name, parameter in self.model.named_parameters()}
        head = {f"qformer.text.{name}": parameter for name, parameter in self.head.named_parameters()}
        temp = head.pop("qformer.text.temp")
        return {**named, **head, "temp": temp}

    def patches(self, image: Tensor) -> Tensor:
        return self.model.vision_model(image).last_hidden_state

    def queries(self, patches: Tensor) -> Tensor:
        tokens = self.model.query_tokens.expand(len(patches), -1, -1)
        return self.model.qformer(query_embeds=tokens, encoder_hidden_states=patches).last_hidden_state

    def texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        embeds = self.model.embeddings(input_ids=ids)
        return self.model.qformer(query_embeds=embeds, query_length=0, attention_mask=mask).last_hidden_state

    def pairs(self, patches: Tensor, ids: Tensor, visible: Tensor) -> Tensor:
        """[queries][text] in one pass; `visible` [B, T] or [B, T, T]."""
        tokens = self.model.query_tokens.expand(len(patches), -1, -1)
        return self.model.qformer(
            query_embeds=self.model.embeddings(input_ids=ids, query_embeds=tokens),
            query_length=QUERIES,
            attention_mask=visible,
            encoder_hidden_states=patches,
        ).last_hidden_state

    def match(self, patches: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        visible = torch.cat([torch.ones(len(ids), QUERIES, dtype=mask.dtype), mask], dim=1)
        return self.model.itm_head(self.pairs(patches, ids, visible)[:, :QUERIES]).mean(dim=1)

    def captions(self, patches: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Queries see queries; text sees queries and the text before it: one pass with a mask in place of a cache."""
        ids = torch.cat([torch.full_like(ids[:, :1], DEC), ids[:, 1:]], dim=1)
        length = QUERIES + ids.shape[1]
        visible = torch.zeros(len(ids), length, length, dtype=mask.dtype)
        visible[:, :, :QUERIES] = 1
        visible[:, QUERIES:, QUERIES:] = torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=mask.dtype)) * mask[:, None]
        return self.head(self.pairs(patches, ids, visible)[:, QUERIES:], self.model.embeddings.word_embeddings.weight)

    def run(self, image: Tensor, ids: Tensor, mask: Tensor) -> Arrays:
        model, rows = self.model, len(image)
        patches = self.patches(image)
        queries = self.queries(patches)
        image_features = F.normalize(model.vision_projection(queries), dim=-1)
        text_features = F.normalize(model.text_projection(self.texts(ids, mask)[:, 0]), dim=-1)
        # as in LAVIS, whose gathered features carry no gradient
        i2t = (image_features @ text_features.detach().T).max(dim=1).values
        t2i = (image_features.detach() @ text_features.T).max(dim=1).values.T
        itc = [F.cross_entropy(s / self.head.temp, torch.arange(rows), label_smoothing=SMOOTHING) for s in (i2t, t2i)]

        itm_logits = self.match(
            torch.cat([patches, patches[NEGATIVE_IMAGE], patches]),
            torch.cat([ids, ids, ids[NEGATIVE_TEXT]]),
            torch.cat([mask, mask, mask[NEGATIVE_TEXT]]),
        )
        itm = F.cross_entropy(itm_logits, torch.tensor([1] * rows + [0] * 2 * rows))

        caption_logits = self.captions(patches, ids, mask)
        label = ids.masked_fill(mask == 0, -100)[:, 1:]
        lm = F.cross_entropy(caption_logits[:, :-1].flatten(0, 1), label.flatten(), label_smoothing=SMOOTHING)
        return {
            "patches": patches,
            "queries": queries,
            "image_features": image_features,
            "text_features": text_features,
            "similarity": i2t,
            "itm_logits": itm_logits,
            "caption_logits": caption_logits,
            "itc": sum(itc) / 2,
            "itm": itm,
            "lm": lm,
        }

    def check(self, out: Arrays, image: Tensor, ids: Tensor, mask: Tensor) -> None:
        """The pieces above are Hugging Face's own forward passes where it has them."""
        contrast = self.model(image, ids, mask)
        match = self.model(image, ids, mask, use_image_text_matching_head=True)
        torch.testing.assert_close(out["image_features"], contrast.image_embeds)
        torch.testing.assert_close(out["text_features"], contrast.text_embeds)
        torch.testing.assert_close(out["similarity"], contrast.logits_per_image)
        torch.testing.assert_close(out["itm_logits"][: len(image)], match.logits_per_image)


def stage2(first: Stage1, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Arrays, Arrays]:
    """Hugging Face's whole model around the same image encoder and Q-Former: its own weights by our names, and outputs."""
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=OPTConfig(**OPT).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    model.vision_model.post_layernorm.eps = LN_VISION_EPS
    enliven(model)
    own = {our_name(name): p for name, p in model.named_parameters() if name.startswith("language_")}
    left = model.load_state_dict(first.model.state_dict(), strict=False)
    assert all(name.startswith("language_") for name in left.missing_keys)
    weights = our_layout(own)
    model = model.double()
    placeholder = torch.full((len(ids), QUERIES), IMAGE_TOKEN)
    all_ids, all_mask = torch.cat([placeholder, ids], dim=1), torch.cat([torch.ones_like(placeholder), mask], dim=1)
    label = all_ids.masked_fill((all_mask == 0) | (torch.arange(all_ids.shape[1]) < QUERIES), -100)
    with torch.no_grad():
        out = model(pixel_values=image, input_ids=all_ids, attention_mask=all_mask, labels=label)
        prompt = model.get_image_features(image)
    return weights, {"stage2_prompt": prompt, "stage2_logits": out.logits, "stage2_loss": out.loss}


def our_name(name: str) -> str:
    if name == "query_tokens":
        return "qformer.query_tokens"
    if name.startswith("embeddings."):
        return "qformer.text." + name.removeprefix("embeddings.")
    for theirs, ours in RENAMES:
        name = name.replace(theirs, ours)
    if name.startswith("language.opt.decoder.layers."):
        for theirs, ours in (("final_layer_norm", "norm2"), ("fc1", "linear1"), ("fc2", "linear2")):
            name = name.replace(theirs, ours)
    return name


def our_layout(parameters: Arrays) -> Arrays:
    weights = {}
    for name, tensor in parameters.items():
        tensor = tensor.detach().clone()
        if name.endswith("qkv.bias"):
            query, key, value = tensor.chunk(3)
            assert not key.any()
            weights |= {name.replace("qkv.bias", f"{kind}_bias"): part for kind, part in (("query", query), ("value", value))}
        else:
            weights[name] = tensor.T if tensor.ndim == 2 and "embeddings" not in name else tensor
    return weights


def main() -> None:
    image = random(3, 3, 12, 12)
    ids = torch.randint(1, CLS, (3, 7), generator=generator)
    ids[:, 0] = CLS
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    ids = ids * mask  # padding is 0
    opt_ids = torch.randint(3, IMAGE_TOKEN, (3, 6), generator=generator)
    opt_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    opt_ids = torch.where(opt_mask == 1, opt_ids, 1)
    arrays = {"image": image, "ids": ids, "mask": mask, "opt_ids": opt_ids, "opt_mask": opt_mask}

    first = Stage1()
    weights = our_layout(first.parameters())
    with torch.no_grad():
        single = first.run(image, ids, mask)
    second_weights, second = stage2(first, image.double(), opt_ids, opt_mask)
    first.model.double()
    first.head.double()
    out = first.run(image.double(), ids, mask)
    first.check(out, image.double(), ids, mask)
    (out["itc"] + out["itm"] + out["lm"]).backward()
    gradients = our_layout({name: first.parameters()[name].grad for name in GRADIENTS})
    for name, tensor in out.items():
        noise = (single[name] - tensor).abs().max()
        print(f"{name}: up to {tensor.detach().abs().max():.2f}, PyTorch's rounding in float32 {noise:.0e}")
    arrays |= {**out, **second, **{f"gradient.{name}": tensor for name, tensor in gradients.items()}}
    arrays |= {f"stage1.{name}": tensor for name, tensor in weights.items()}
    arrays |= {f"stage2.{name}": tensor for name, tensor in second_weights.items()}
    stored = {name: tensor.detach().contiguous().numpy() for name, tensor in arrays.items()}
    np.savez_compressed(
        HERE / "reference.npz", **{n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in stored.items()}
    )
    print({name: f"up to {np.abs(stored[name]).max():.2f}" for name in (*second, *(f"gradient.{name}" for name in gradients))})


if __name__ == "__main__":
    main()
