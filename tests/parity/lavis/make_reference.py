"""Makes the files beside it with LAVIS: tiny random checkpoints under its names, and what its own code computes from them.

    pip install torch==2.13.0 transformers==4.57.6
    pip install --no-deps git+https://github.com/salesforce/LAVIS@506965b
    python make_reference.py

What runs is LAVIS's own `forward`: that of `Blip2Qformer` in a process group of one, with fixed hard negatives in place of
those that `torch.multinomial` draws, and those of `Blip2OPT` and `Blip2T5` around the tiny language models of ../language.
Replaced are tokenizers (token ids are the texts), sizes, constructors that download, and modules that the import wants and a
loss does not. The released 1.0.2 has the same losses of stage 1 where no `image_id` is given, which it does not know; only
the weights that negatives are drawn with are older there. The models compute in float64 from weights that float32 holds
exactly, so that what a comparison finds is our rounding; only the language models take a softmax or a norm in float32 on the
way.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import tempfile
import types
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, OPTForCausalLM, T5Config, modeling_utils, pytorch_utils

HERE = Path(__file__).parent
# No two widths are equal, so a missed transpose fits in square matrices only, and there the numbers show it.
IMAGE_SIZE, PATCH_SIZE, VISION_WIDTH, VISION_MLP, VISION_DEPTH, VISION_HEADS = 12, 4, 16, 26, 2, 2
QFORMER = {"hidden_size": 18, "intermediate_size": 30, "num_hidden_layers": 3, "num_attention_heads": 3}
QFORMER |= {"vocab_size": 36, "max_position_embeddings": 11}  # [DEC] is added to the vocabulary
QFORMER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUERIES, EMBED_DIM, OPT_WIDTH, T5_WIDTH = 5, 14, 24, 20  # the last two as in ../language
PAD, CLS, SEP, DEC = 0, 34, 35, 36
IMAGE_ID = [7, 3, 7, 5]
NEGATIVE_IMAGE, NEGATIVE_TEXT = [1, 2, 3, 0], [3, 0, 1, 2]  # of another image id
# Token ids; OPT's begin with </s>, T5's end with it. The first of OPT's tokens are the prompt.
OPT_TEXTS, PROMPT_LENGTH = ["2 9 4 17 30 22 11", "2 9 4 8 40", "2 9 4 35 12 6", "2 9 4 21 3 3 29"], 3
T5_INPUTS, T5_OUTPUTS = ["7 31 9 1", "12 1", "5 5 1", "38 20 1"], ["14 3 1", "22 9 17 6 1", "40 1", "33 2 1"]
STEPS, LEARNING_RATE, BETAS, WEIGHT_DECAY = 5, 1e-3, (0.9, 0.98), 0.05
RENAMES = [  # LAVIS's names to blip2x's, in this order
    ("opt_proj.", "language_proj."),
    ("t5_proj.", "language_proj."),
    ("Qformer.bert.embeddings.LayerNorm", "qformer.embeddings_norm"),
    ("Qformer.bert.embeddings", "qformer.text"),
    ("Qformer.bert.encoder.layer.", "qformer.layers."),
    ("Qformer.cls.predictions.transform.dense", "qformer.text.head_transform"),
    ("Qformer.cls.predictions.transform.LayerNorm", "qformer.text.head_norm"),
    ("Qformer.cls.predictions.bias", "qformer.text.head_bias"),
    ("crossattention.", "cross_attention."),
    ("attention.self.", "attention."),
    ("attention.output.dense", "attention.out"),
    ("attention.output.LayerNorm", "attention.norm"),
    ("cross_attention.self.", "cross_attention."),
    ("intermediate_query.dense", "query_ffn.fc1"),
    ("output_query.dense", "query_ffn.fc2"),
    ("output_query.LayerNorm", "query_ffn.norm"),
    ("intermediate.dense", "text_ffn.fc1"),
    ("output.dense", "text_ffn.fc2"),
    ("output.LayerNorm", "text_ffn.norm"),
]
# What EVA's blocks read and add to, and what CLIP's first norm reads.
ADDED_UP = ("cls_token", "pos_embed", "patch_embed.", "attn.proj.", "mlp.fc2.")
ADDED_UP += ("class_embedding", "positional_embedding", "conv1")
STAGE1_ONLY = ("Qformer.cls.", "Qformer.bert.embeddings.word_", "Qformer.bert.embeddings.position_embeddings")
STAGE1_ONLY += ("vision_proj.", "text_proj.", "itm_head.", "temp", "visual_encoder.")
generator = torch.Generator().manual_seed(0)

Arrays = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def import_lavis() -> types.SimpleNamespace:
    """LAVIS's modules of BLIP-2, without those of its other models, data sets and downloads."""
    root = Path(importlib.util.find_spec("lavis").submodule_search_locations[0])

    def module(name: str, **content: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        vars(sys.modules[name]).update(content)

    for name in ("lavis", "lavis.common", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models"):
        module(name)
    module(
        "lavis.common.dist_utils",
        download_cached_file=None,
        is_dist_avail_and_initialized=dist.is_initialized,
        get_rank=dist.get_rank,
        get_world_size=dist.get_world_size,
    )
    module("lavis.common.utils", is_url=None, get_abs_path=None)
    module("lavis.common.logger", MetricLogger=None)
    module("lavis.common.registry", registry=types.SimpleNamespace(register_model=lambda name: lambda cls: cls))
    module("omegaconf", OmegaConf=None)
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
        module(name)
    module("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=None)
    for name in ("timm", "timm.models"):
        module(name)
    module("timm.models.layers", drop_path=None, to_2tuple=lambda n: (n, n), trunc_normal_=nn.init.trunc_normal_)
    module("timm.models.registry", register_model=None)

    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        setattr(modeling_utils, name, getattr(pytorch_utils, name))  # they have moved since
    from lavis.models import clip_vit, eva_vit
    from lavis.models.blip2_models import Qformer, blip2, blip2_image_text_matching, blip2_opt, blip2_qformer, blip2_t5

    return types.SimpleNamespace(
        clip_vit=clip_vit,
        eva_vit=eva_vit,
        qformer=Qformer,
        blip2=blip2,
        Blip2Qformer=blip2_qformer.Blip2Qformer,
        Blip2ITM=blip2_image_text_matching.Blip2ITM,
        Blip2OPT=blip2_opt.Blip2OPT,
        Blip2T5=blip2_t5.Blip2T5,
        T5ForConditionalGeneration=blip2_t5.T5ForConditionalGeneration,
    )


class Ids(types.SimpleNamespace):
    """What a tokenizer returns."""

    def to(self, device: torch.device) -> Ids:
        return self


class Tokenizer:
    """Texts are token ids and their mask already."""

    bos_token_id, pad_token_id = DEC, PAD

    def __len__(self) -> int:
        return QFORMER["vocab_size"] + 1

    def __call__(self, text: tuple[Tensor, Tensor], **options: Any) -> Ids:
        return Ids(input_ids=text[0], attention_mask=text[1])


class LanguageTokenizer:
    """Texts are token ids in decimal."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, texts: list[str], **options: Any) -> Ids:
        rows = [torch.tensor([int(word) for word in text.split()]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        return Ids(input_ids=ids, attention_mask=(ids != self.pad_token_id).long())


def tiny_eva(lavis: types.SimpleNamespace) -> nn.Module:
    """`create_eva_vit_g` in small."""
    return lavis.eva_vit.VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        use_mean_pooling=False,
        embed_dim=VISION_WIDTH,
        depth=VISION_DEPTH,
        num_heads=VISION_HEADS,
        mlp_ratio=(VISION_MLP + 0.5) / VISION_WIDTH,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def tiny_clip(lavis: types.SimpleNamespace, image_size: int) -> nn.Module:
    """`create_clip_vit_L` in small."""
    return lavis.clip_vit.VisionTransformer(
        image_size, PATCH_SIZE, VISION_WIDTH, VISION_DEPTH, VISION_HEADS, use_grad_checkpointing=False
    )


def tiny_model(lavis: types.SimpleNamespace) -> nn.Module:
    """LAVIS's own constructor around small parts."""
    config = BertConfig(
        **QFORMER, encoder_width=VISION_WIDTH, add_cross_attention=True, cross_attention_freq=2, query_length=QUERIES
    )
    vision = (tiny_eva(lavis), lavis.blip2.LayerNorm(VISION_WIDTH))
    qformer = (lavis.qformer.BertLMHeadModel(config), nn.Parameter(torch.zeros(1, QUERIES, QFORMER["hidden_size"])))
    with (
        mock.patch.object(lavis.Blip2ITM, "init_tokenizer", return_value=Tokenizer()),
        mock.patch.object(lavis.Blip2ITM, "init_vision_encoder", return_value=vision),
        mock.patch.object(lavis.Blip2ITM, "init_Qformer", return_value=qformer),
    ):
        return lavis.Blip2ITM(embed_dim=EMBED_DIM)


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Random biases and norms, attention that is neither flat nor sharp, and small sums before norms whose epsilons count."""
    for name, parameter in module.named_parameters():
        if name == "temp":
            continue
        if name == "query_tokens":
            scale = 0.02  # as BERT draws them
        elif any(part in name for part in ADDED_UP):
            scale = 0.004
        elif parameter.ndim < 2 or "embeddings" in name:
            scale = 0.3
        else:
            scale = parameter[0].numel() ** -0.5
        norm = name.endswith("weight") and any(part in name.lower() for part in ("norm", "ln_"))
        parameter.copy_(scale * random(*parameter.shape) + norm)


def in_float64(lavis: types.SimpleNamespace, module: nn.Module) -> nn.Module:
    """A copy that computes in float64; LAVIS's LayerNorms go through float32, PyTorch's, which they extend, do not."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if isinstance(part, lavis.blip2.LayerNorm | lavis.clip_vit.LayerNorm):
            part.__class__ = nn.LayerNorm
    return module


def losses(
    lavis: types.SimpleNamespace, model: nn.Module, samples: dict[str, Any], weights: list[Tensor] | None = None
) -> Arrays:
    """Of LAVIS's training forward pass; `weights` gets the distributions that it would draw negatives from."""
    negatives = iter([*NEGATIVE_IMAGE, *NEGATIVE_TEXT])  # in the order in which it asks for them

    def multinomial(distribution: Tensor, count: int) -> Tensor:
        if weights is not None:
            weights.append(distribution)
        negative = next(negatives)
        assert distribution[negative] > 0
        return torch.tensor([negative])

    with mock.patch.object(torch, "multinomial", multinomial):
        out = lavis.Blip2Qformer.forward(model, samples)
    return {"loss": out.loss, "itc": out.loss_itc, "itm": out.loss_itm, "lm": out.loss_lm}


def trained(model: nn.Module) -> Arrays:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def five_steps(lavis: types.SimpleNamespace, model: nn.Module, samples: dict[str, Any]) -> Tensor:
    """Losses [6, 4] before each step and after the last, in the order of `losses`."""
    model = copy.deepcopy(model)
    parameters = trained(model).values()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)
    rows = []
    for _ in range(STEPS):
        parts = losses(lavis, model, samples)
        rows.append(torch.stack(list(parts.values())).detach())
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    rows.append(torch.stack(list(losses(lavis, model, samples).values())).detach())
    return torch.stack(rows)


@torch.no_grad()
def features(lavis: types.SimpleNamespace, model: nn.Module, samples: dict[str, Any]) -> Arrays:
    """Of inference: what LAVIS's retrieval contrasts and matches."""
    image, text = samples["image"], model.tokenizer(samples["text_input"])
    queries, patches = model.forward_image(image)
    image_features = F.normalize(model.vision_proj(queries), dim=-1)
    text_features = F.normalize(model.text_proj(model.forward_text(text)), dim=-1)
    similarity = torch.stack([(one @ text_features.T).max(dim=0).values for one in image_features])
    with mock.patch.object(Tensor, "float", lambda tensor: tensor):  # float64 has to stay
        pairs = model(samples, match_head="itc")[:, 0]
        itm_logits = model(samples, match_head="itm")
    torch.testing.assert_close(pairs, similarity.diag())
    return {
        "encoder": model.visual_encoder(image),
        "patches": patches,
        "queries": queries,
        "image_features": image_features,
        "text_features": text_features,
        "similarity": similarity,
        "itm_logits": itm_logits,
    }


def stage2(lavis: types.SimpleNamespace, first: nn.Module, kind: str, projection: nn.Linear) -> nn.Module:
    """LAVIS's stage 2 around the parts of `first`, without the downloads of its constructor."""
    folder, pad = str(HERE.parent / "language" / kind), {"opt": 1, "t5": 0}[kind]
    cls = {"opt": lavis.Blip2OPT, "t5": lavis.Blip2T5}[kind]
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    for name in ("visual_encoder", "ln_vision", "Qformer", "query_tokens"):
        setattr(model, name, copy.deepcopy(getattr(first, name)))
    if kind == "opt":
        language: nn.Module = OPTForCausalLM.from_pretrained(folder)
    else:
        config = T5Config.from_pretrained(folder)
        config.dense_act_fn = "gelu"  # as the constructor does
        language = lavis.T5ForConditionalGeneration(config)
        left = language.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
        assert {name.split(".")[1] for name in left.missing_keys} == {"embed_tokens"} and not left.unexpected_keys
    setattr(model, f"{kind}_model", language.requires_grad_(False))
    setattr(model, f"{kind}_proj", copy.deepcopy(projection))
    setattr(model, f"{kind}_tokenizer", LanguageTokenizer(pad))
    model.max_txt_len, model.prompt = 32, ""
    return model.double().eval()  # no dropout


def stage2_losses(lavis: types.SimpleNamespace, first: nn.Module, projections: dict[str, nn.Linear], image: Tensor) -> Arrays:
    """Losses, and the gradients of what stage 2 trains."""
    arrays: Arrays = {}
    for kind in ("opt", "t5"):
        model = stage2(lavis, first, kind, projections[f"{kind}_proj"])
        texts = {"text_input": OPT_TEXTS} if kind == "opt" else {"text_input": T5_INPUTS, "text_output": T5_OUTPUTS}
        if kind == "opt":
            arrays["opt.loss_without_prompt"] = model({"image": image, **texts})["loss"]
            model.prompt, model.prompt_length = "a prompt", torch.tensor([PROMPT_LENGTH])
        loss = model({"image": image, **texts})["loss"]
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.startswith("visual_")}
        arrays |= {f"{kind}.loss": loss, **{f"{kind}.gradient.{n}": t for n, t in our_layout(gradients).items()}}
        for name, text in texts.items():
            tokens = getattr(model, f"{kind}_tokenizer")(text)
            arrays |= {f"{kind}.{name}.ids": tokens.input_ids, f"{kind}.{name}.mask": tokens.attention_mask}
    return arrays


def our_layout(parameters: Arrays) -> Arrays:
    """By blip2x's names; a linear layer is [in, out] here and [out, in] in PyTorch."""
    arrays = {}
    for name, tensor in parameters.items():
        for theirs, ours in RENAMES:
            name = name.replace(theirs, ours)
        name = "qformer.query_tokens" if name == "query_tokens" else name
        arrays[name] = tensor.T if tensor.ndim == 2 and "embeddings" not in name else tensor.reshape(tensor.shape or 1)
    return arrays


def is_text_ffn(name: str) -> bool:
    return ".intermediate.dense" in name or (".output." in name and "attention" not in name)


def save_checkpoints(model: nn.Module, clip: nn.Module, projections: dict[str, nn.Linear]) -> None:
    """As LAVIS's runner writes them, some with what a training run keeps beside the weights; and flat image encoders."""
    optimizer = torch.optim.AdamW([model.temp, model.itm_head.bias], lr=LEARNING_RATE)
    (model.temp + model.itm_head.bias.sum()).backward()
    state = model.state_dict()
    weights = copy.deepcopy(state)
    optimizer.step()
    model.load_state_dict(weights)
    model.zero_grad()
    beside = {
        "optimizer": optimizer.state_dict(),
        "config": {"run": {"task": "image_text_pretrain", "init_lr": 1e-4, "amp": True}, "model": {"arch": "blip2"}},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        "epoch": 9,
    }
    torch.save({"model": state, **beside}, HERE / "stage1.pth")
    common = {n: t for n, t in state.items() if not n.startswith(STAGE1_ONLY) and not is_text_ffn(n)}
    for name, projection in projections.items():
        own = {f"{name}.{kind}": tensor for kind, tensor in projection.state_dict().items()}
        path = HERE / f"stage2_{name.removesuffix('_proj')}.pth"
        torch.save({"model": {**common, **own}, **beside} if name == "opt_proj" else {"model": {**common, **own}}, path)
    prefix = "visual_encoder."
    torch.save({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, HERE / "eva_vit_g.pth")
    torch.save(clip.state_dict(), HERE / "clip_vit_L.pth")


@torch.no_grad()
def clip_features(
    lavis: types.SimpleNamespace, clip: nn.Module, model: nn.Module, projection: nn.Linear, image: Tensor, large: Tensor
) -> Arrays:
    """CLIP's, as stage 2 reads them too; and of larger images, with positions interpolated as LAVIS does when it loads."""
    weights = {name: tensor.double() for name, tensor in clip.state_dict().items()}  # what float16 kept of them
    small, big = (in_float64(lavis, tiny_clip(lavis, pixels.shape[-1])) for pixels in (image, large))
    small.load_state_dict(weights)
    resized = {name: tensor.clone() for name, tensor in weights.items()}
    lavis.clip_vit.interpolate_pos_embed(big, resized)
    big.load_state_dict(resized)
    model = copy.copy(model)
    model._modules = {**model._modules, "visual_encoder": small}
    queries, _ = model.forward_image(image)
    prompt = F.linear(queries, projection.weight.double(), projection.bias.double())
    return {"clip": small(image), "clip_large": big(large), "clip_t5_proj": prompt}


@torch.no_grad()
def eva_large(lavis: types.SimpleNamespace, model: nn.Module, large: Tensor) -> Tensor:
    """The image encoder for larger images, its positions interpolated as LAVIS does when it loads."""
    weights = {name: tensor.clone() for name, tensor in model.visual_encoder.state_dict().items()}
    with mock.patch.dict(globals(), {"IMAGE_SIZE": large.shape[-1]}):
        encoder = in_float64(lavis, tiny_eva(lavis))
    with mock.patch.object(Tensor, "float", lambda tensor: tensor):
        lavis.eva_vit.interpolate_pos_embed(encoder, weights)
    encoder.load_state_dict(weights)
    return encoder(large)


def report(name: str, exact: Tensor, single: Tensor) -> None:
    noise = (exact.detach() - single.detach()).abs().max()
    print(f"{name}: up to {exact.detach().abs().max():.3f}, PyTorch's rounding in float32 {noise:.1e}")


def main() -> None:
    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    lavis = import_lavis()
    model, clip = tiny_model(lavis), tiny_clip(lavis, IMAGE_SIZE)
    projections = {f"{kind}_proj": nn.Linear(QFORMER["hidden_size"], n) for kind, n in (("opt", OPT_WIDTH), ("t5", T5_WIDTH))}
    for module in (model, clip, *projections.values()):
        enliven(module)
    lavis.eva_vit.convert_weights_to_fp16(clip)  # linear and convolution layers only, as for `vit_precision: fp16`
    save_checkpoints(model, clip, projections)

    image, large = random(4, 3, IMAGE_SIZE, IMAGE_SIZE), random(2, 3, 20, 20)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]])
    ids = torch.randint(1, CLS, mask.shape, generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(4), mask.sum(dim=1) - 1] = SEP
    ids = ids * mask  # padding is 0
    arrays = {"image": image, "large_image": large, "ids": ids, "mask": mask, "image_ids": torch.tensor(IMAGE_ID)}
    arrays |= {"negative_image": torch.tensor(NEGATIVE_IMAGE), "negative_text": torch.tensor(NEGATIVE_TEXT)}

    exact = in_float64(lavis, model)
    for case, beside in (("", {}), ("same_image.", {"image_id": arrays["image_ids"]})):
        samples = {"image": image, "text_input": (ids, mask), **beside}
        exact_samples = {**samples, "image": image.double()}
        exact.train(), model.train()
        exact.zero_grad(), model.zero_grad()
        weights: list[Tensor] = []
        parts = losses(lavis, exact, exact_samples, weights)
        single = losses(lavis, model, samples)
        parts["loss"].backward(), single["loss"].backward()
        arrays |= {f"{case}{name}": loss for name, loss in parts.items()}
        arrays |= {f"{case}image_weights": torch.stack(weights[:4]), f"{case}text_weights": torch.stack(weights[4:])}
        gradients, single_gradients = ({n: p.grad for n, p in trained(m).items()} for m in (exact, model))
        arrays |= {f"{case}gradient.{name}": tensor.clone() for name, tensor in our_layout(gradients).items()}
        arrays[f"{case}steps"] = five_steps(lavis, exact, exact_samples)
        for name, loss in parts.items():
            report(f"{case}{name}", loss, single[name])
        worst = max(gradients, key=lambda n: (gradients[n] - single_gradients[n]).abs().max())
        report(f"{case}gradient, {worst}", gradients[worst], single_gradients[worst])
        report(f"{case}steps", arrays[f"{case}steps"], five_steps(lavis, model, samples))
        print(arrays[f"{case}steps"].numpy())

    exact.eval(), model.eval()
    arrays |= features(lavis, exact, exact_samples)
    for name, tensor in features(lavis, model, samples).items():
        report(name, arrays[name], tensor)
    for name, projection in projections.items():
        arrays[name] = F.linear(arrays["queries"], projection.weight.double(), projection.bias.double())
    arrays |= stage2_losses(lavis, exact, projections, image.double())
    arrays |= clip_features(lavis, clip, exact, projections["t5_proj"], image.double(), large.double())
    arrays["encoder_large"] = eva_large(lavis, model, large.double())

    stored = {name: tensor.detach().contiguous().numpy() for name, tensor in arrays.items()}
    stored = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in stored.items()}
    np.savez_compressed(HERE / "reference.npz", **stored)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
