"""Makes the files beside it: the weights of ../lavis and ../language as PaddleMIX's BLIP-2 names, lays out and saves them.

    pip install torch==2.13.0 paddlepaddle==3.3.1 safetensors
    python make_pdparams.py

The names are those of paddlemix/models/blip2 at 6afaf05 and of PaddleNLP's OPT. PaddleMIX keeps two heads that LAVIS ties: the
Q-Former's decoder and OPT's lm_head; a converted checkpoint holds copies of the embeddings there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import torch
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
IN_QFORMER = ("query_tokens", "ln_vision.", "vision_proj.", "text_proj.", "itm_head.")  # at the top in LAVIS
OPT_RENAMES = [  # Hugging Face's names to PaddleNLP's, in this order
    ("model.decoder.embed_tokens", "opt.embeddings.word_embeddings"),
    ("model.decoder.embed_positions", "opt.embeddings.position_embeddings"),
    ("model.decoder.", "opt.decoder."),
    ("self_attn_layer_norm", "norm1"),
    ("fc1", "linear1"),
    ("fc2", "linear2"),
]

Arrays = dict[str, np.ndarray]


def read_lavis(name: str) -> Arrays:
    path = HERE.parent / "lavis" / name
    content = torch.load(path, weights_only=True)
    return {name: tensor.numpy() for name, tensor in content.get("model", content).items()}


def in_paddle(name: str, array: np.ndarray) -> np.ndarray:
    """Linear layers are [in, out]; embeddings, also PaddleNLP's head of OPT, are [vocabulary, width]."""
    return array.T if array.ndim == 2 and "embed" not in name else array


def bridge(lavis: Arrays) -> Arrays:
    """The Q-Former and what PaddleMIX keeps in it."""
    arrays = {}
    for name, array in lavis.items():
        if name.startswith("visual_encoder.") or name.endswith("position_ids"):  # the buffer is not saved
            continue
        array = in_paddle(name, array)
        if name == "temp":
            array = array.reshape([1])
        elif name.startswith(IN_QFORMER):
            name = f"Qformer.{name}"
        elif name.startswith("opt_proj."):
            name = name.replace("opt_proj", "Qformer.language_projection")
        arrays[name] = array
    return arrays


def vision(lavis: Arrays) -> Arrays:
    """The image encoder: packed biases, zero for keys."""
    arrays = {}
    for name, array in lavis.items():
        if name.endswith("v_bias"):
            continue
        if name.endswith("q_bias"):
            value = lavis[name.replace("q_bias", "v_bias")]
            name, array = name.replace("q_bias", "qkv.bias"), np.concatenate([array, np.zeros_like(array), value])
        arrays[f"visual_encoder.{name}"] = in_paddle(name, array)
    return arrays


def opt() -> Arrays:
    arrays = {}
    for name, array in load_file(HERE.parent / "language" / "opt" / "model.safetensors").items():
        array = in_paddle(name, array)
        for theirs, ours in OPT_RENAMES:
            name = name.replace(theirs, ours)
        if name.startswith("opt.decoder.layers."):
            name = name.replace("final_layer_norm", "norm2")
        arrays[f"language_model.{name}"] = array
    words = arrays["language_model.opt.embeddings.word_embeddings.weight"]
    return {**arrays, "language_model.lm_head.decoder_weight": words}


def save(folder: str, arrays: Arrays) -> None:
    """As `paddle.save(model.state_dict())` writes a model's parameters."""
    layer = paddle.nn.Layer()
    state = {}
    for index, (name, array) in enumerate(arrays.items()):
        parameter = layer.create_parameter(array.shape, attr=paddle.ParamAttr(name=f"{folder}_{index}"))
        parameter.set_value(np.ascontiguousarray(array))
        state[name] = parameter
    (HERE / folder).mkdir(exist_ok=True)
    paddle.save(state, str(HERE / folder / "model_state.pdparams"))


def main() -> None:
    encoder = vision(read_lavis("eva_vit_g.pth"))
    save("stage1", {**encoder, **bridge(read_lavis("stage1.pth"))})
    save("stage2_opt", {**encoder, **bridge(read_lavis("stage2_opt.pth")), **opt()})


if __name__ == "__main__":
    main()
