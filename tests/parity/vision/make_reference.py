"""Makes the file beside it with PyTorch: tiny random EVA and CLIP encoders, their features, and interpolated positions.

    pip install torch==2.13.0 transformers==4.57.6
    python make_reference.py

The models compute in float64 from weights that float32 holds exactly, so that what a comparison finds is only our rounding.
Weights are stored under blip2x's names and layouts: a linear layer is [in, out] here and [out, in] in PyTorch.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

HERE = Path(__file__).parent
# No two sides of a matrix are equal, so a missed transpose does not fit.
SIZES = {
    "image_size": 20,
    "patch_size": 5,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
BATCH = 2
generator = torch.Generator().manual_seed(0)

NORMS = {"layer_norm1": "norm1", "layer_norm2": "norm2"}
EVA_BLOCK = {"self_attn.qkv": "attention.qkv", "self_attn.projection": "attention.out", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
CLIP_BLOCK = {"self_attn.out_proj": "attention.out", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}

Arrays = dict[str, torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def enliven(model: torch.nn.Module) -> None:
    """Random biases and norms, attention that is neither flat nor sharp, and a first norm whose epsilon counts."""
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            # as small as the square root of CLIP's epsilon: another one changes what the first norm gives
            parameter.copy_(0.004 * random(*parameter.shape))
        elif parameter.ndim == 1:
            parameter.copy_(0.3 * random(*parameter.shape) + ("norm" in name and name.endswith("weight")))
        else:
            parameter.copy_(parameter.shape[1] ** -0.5 * random(*parameter.shape))


def block_weights(state: Arrays, theirs: str, ours: str, linears: dict[str, str]) -> Arrays:
    weights = {}
    for source, target in {**linears, **NORMS}.items():
        for kind in ("weight", "bias"):
            tensor = state[f"{theirs}.{source}.{kind}"]
            weights[f"{ours}.{target}.{kind}"] = tensor.T if tensor.ndim == 2 else tensor
    return weights


def eva_weights(state: Arrays) -> Arrays:
    weights = {
        "embeddings.class_token": state["embeddings.class_embedding"],
        "embeddings.positions": state["embeddings.position_embedding"],
        "embeddings.projection.weight": state["embeddings.patch_embedding.weight"],
        "embeddings.projection.bias": state["embeddings.patch_embedding.bias"],
    }
    for index in range(SIZES["num_hidden_layers"]):
        block = block_weights(state, f"encoder.layers.{index}", f"blocks.{index}", EVA_BLOCK)
        query, key, value = block.pop(f"blocks.{index}.attention.qkv.bias").chunk(3)
        assert not key.any()  # there is none in EVA
        weights |= {
            **block,
            f"blocks.{index}.attention.query_bias": query,
            f"blocks.{index}.attention.value_bias": value,
        }
    return weights


def clip_weights(state: Arrays) -> Arrays:
    weights = {
        "embeddings.class_token": state["embeddings.class_embedding"][None, None],
        "embeddings.positions": state["embeddings.position_embedding.weight"][None],
        "embeddings.projection.weight": state["embeddings.patch_embedding.weight"],
        "norm.weight": state["pre_layrnorm.weight"],
        "norm.bias": state["pre_layrnorm.bias"],
    }
    for index in range(SIZES["num_hidden_layers"]):
        theirs, ours = f"encoder.layers.{index}", f"blocks.{index}"
        packed = [[state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"] for kind in ("weight", "bias")]
        weights |= {
            **block_weights(state, theirs, ours, CLIP_BLOCK),
            f"{ours}.attention.qkv.weight": torch.cat(packed[0]).T,
            f"{ours}.attention.qkv.bias": torch.cat(packed[1]),
        }
    return weights


def eva() -> torch.nn.Module:
    model = Blip2VisionModel(Blip2VisionConfig(**SIZES)).eval()
    enliven(model)
    width = SIZES["hidden_size"]
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.qkv.bias[width : 2 * width] = 0
    return model


def clip() -> torch.nn.Module:
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval().vision_model
    enliven(model)
    return model


def features(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """What leaves the last block: BLIP-2 puts a norm of its own behind it in LAVIS, Hugging Face counts it to the encoder."""
    hidden = model.embeddings(image)
    if hasattr(model, "pre_layrnorm"):
        hidden = model.pre_layrnorm(hidden)
    return model.encoder(inputs_embeds=hidden).last_hidden_state


def positions() -> Arrays:
    """As LAVIS interpolates: EVA's positions without aligned corners, CLIP's with them."""
    stored = random(1, 1 + 4 * 4, 6)
    grid = stored[:, 1:].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    arrays = {"positions": stored}
    for side in (3, 7):
        for aligned in (False, True):
            new = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=aligned)
            rows = new.permute(0, 2, 3, 1).reshape(1, side * side, 6)
            arrays[f"positions_{side}_{aligned}"] = torch.cat([stored[:, :1], rows], dim=1)
    return arrays


def main() -> None:
    image, probe = random(BATCH, 3, 20, 20), random(BATCH, 17, 24)
    arrays = {"image": image, "probe": probe, **positions()}
    for name, build, rename in (("eva", eva, eva_weights), ("clip", clip, clip_weights)):
        model = build()
        arrays |= {f"{name}.{key}": tensor for key, tensor in rename(model.state_dict()).items()}
        with torch.no_grad():
            single = features(model, image)
        exact = image.double().requires_grad_()
        out = features(model.double(), exact)
        (out * probe).sum().backward()
        arrays |= {f"{name}_features": out, f"{name}_image_gradient": exact.grad}
        print(
            f"{name}: features up to {out.abs().max():.1f}, PyTorch's rounding in float32 {(single - out).abs().max():.0e}, "
            f"image gradients up to {exact.grad.abs().max():.1f}"
        )
    np.savez_compressed(
        HERE / "reference.npz", **{name: tensor.detach().float().contiguous().numpy() for name, tensor in arrays.items()}
    )


if __name__ == "__main__":
    main()
