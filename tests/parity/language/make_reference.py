"""Makes the files beside it with PyTorch: tiny random OPT and T5 models, their logits, and what transformers decodes from them.

    pip install torch==2.13.0 transformers==4.57.6
    python make_reference.py

Float noise of 1e-5 can change tokens where two texts score nearly the same, so cases are kept only if perturbing the input by
1e-4 leaves the tokens unchanged.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN

HERE = Path(__file__).parent
VOCABULARY, BATCH, LENGTH = 41, 4, 9
generator = torch.Generator().manual_seed(0)


def tiny_opt() -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        word_embed_proj_dim=24,
        num_hidden_layers=2,
        ffn_dim=40,
        num_attention_heads=3,
        max_position_embeddings=32,
    )
    return OPTForCausalLM(config).eval()


def tiny_t5(activation: str) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=20,
        d_kv=6,
        d_ff=36,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.act = ACT2FN[activation]
    return model


@torch.no_grad()
def enliven(model: torch.nn.Module, scale: float) -> None:
    """Random biases and norms, and sharper predictions than fresh weights give."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif "relative_attention_bias" in name:
            parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.mul_(scale)


def decoding_cases() -> list[dict]:
    cases = []
    for beams, length_penalty, repetition_penalty, shortest, early in itertools.product(
        (1, 2, 5), (-1.0, 0.0, 1.0, 2.0), (1.0, 1.5), (0, 4), (False, True)
    ):
        if beams == 1 and (length_penalty != 1 or early):
            continue
        cases.append(
            {
                "num_beams": beams,
                "length_penalty": length_penalty,
                "repetition_penalty": repetition_penalty,
                "min_new_tokens": shortest,
                "early_stopping": early,
                "max_new_tokens": 8,
                "num_return_sequences": min(beams, 2),
            }
        )
    return cases


def decode(model, embeds, mask, case: dict, eos: int):
    config = GenerationConfig(
        **case,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0 if model.config.is_encoder_decoder else 1,
        decoder_start_token_id=0,
        bos_token_id=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        out = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
    ids = out.sequences[:, 1:] if model.config.is_encoder_decoder else out.sequences
    return ids, out.sequences_scores if case["num_beams"] > 1 else None


def common_tokens(model, embeds, mask) -> list[int]:
    """What the model likes to write: as end tokens they end texts early, late, and several beams at once."""
    free = {"num_beams": 5, "num_return_sequences": 5, "max_new_tokens": 8}
    ids, _ = decode(model, embeds, mask, free, eos=VOCABULARY - 1)
    return torch.bincount(ids.flatten(), minlength=VOCABULARY)[3:].topk(2).indices.add(3).tolist()


def main() -> None:
    torch.manual_seed(0)
    opt, t5, t5_tanh = tiny_opt(), tiny_t5("gelu"), tiny_t5("gelu_new")
    enliven(opt, 12.0)
    enliven(t5, 1.0)
    with torch.no_grad():
        t5.lm_head.weight.mul_(0.4)
    t5_tanh.load_state_dict(t5.state_dict())
    opt.save_pretrained(HERE / "opt")
    t5.save_pretrained(HERE / "t5")
    half = tiny_opt().to(torch.bfloat16)
    half.load_state_dict(opt.state_dict())
    half.save_pretrained(HERE / "opt_bfloat16_shards", max_shard_size="10KB")
    half.save_pretrained(HERE / "opt_bfloat16_torch", safe_serialization=False)

    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    for row in range(BATCH):
        mask[row, 3 : 3 + row] = 0  # a gap between the queries and a prompt that is padded on the left
    mask[3, 0] = 0
    decoder_ids = torch.randint(2, VOCABULARY, (BATCH, 6), generator=generator)
    decoder_mask = torch.ones_like(decoder_ids)
    decoder_mask[1, 4:] = 0
    arrays = {"mask": mask, "decoder_ids": decoder_ids, "decoder_mask": decoder_mask}
    embeds = {name: torch.randn(BATCH, LENGTH, width, generator=generator) for name, width in (("opt", 24), ("t5", 20))}
    with torch.no_grad():
        arrays["opt_logits"] = opt(inputs_embeds=embeds["opt"], attention_mask=mask).logits
        for name, model in (("t5", t5), ("t5_tanh", t5_tanh)):
            arrays[f"{name}_logits"] = model(
                inputs_embeds=embeds["t5"],
                attention_mask=mask,
                decoder_input_ids=decoder_ids,
                decoder_attention_mask=decoder_mask,
            ).logits
    kept = []
    for name, model in (("opt", opt), ("t5", t5)):
        arrays[f"{name}_embeds"] = embeds[name]
        for eos, case in itertools.product(common_tokens(model, embeds[name], mask), decoding_cases()):
            ids, scores = decode(model, embeds[name], mask, case, eos)
            noise = 1e-4 * torch.randn(embeds[name].shape, generator=generator)
            again, _ = decode(model, embeds[name] + noise, mask, case, eos)
            if ids.shape != again.shape or not torch.equal(ids, again):
                continue
            arrays[f"ids_{len(kept)}"] = ids
            if scores is not None:
                arrays[f"scores_{len(kept)}"] = scores
            kept.append({"model": name, "eos": eos, "settings": case})
    np.savez_compressed(HERE / "reference.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    (HERE / "cases.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in kept) + "\n]\n")
    for file in HERE.glob("*/*.safetensors"):
        file.chmod(0o644)
    for leftover in HERE.glob("*/generation_config.json"):
        leftover.unlink()
    ended = sum((arrays[f"ids_{n}"] == case["eos"]).any(dim=1).sum().item() for n, case in enumerate(kept))
    print(f"{len(kept)} of {4 * len(decoding_cases())} cases kept; {ended} texts end by themselves")


if __name__ == "__main__":
    main()
