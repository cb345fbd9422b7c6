"""What transformers computes from the folders that test_export.py has left, beside what blip2x computed: prints and asserts.

BLIP2X_EXPORTS=/tmp/exports pytest tests/parity/export          # with blip2x
python tests/parity/export/check_export.py /tmp/exports         # with torch==2.13.0 and transformers==4.57.6

No tensor may be missing in a folder, and none too many. Tokens have to be equal, and numbers, which are of order one to ten,
1e-5 apart at most: both sides compute in float32, whose seven digits the sums of some ten layers make six.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, Blip2ForImageTextRetrieval

ATOL = 1e-5
PIXELS_ATOL = 2e-6  # of numbers up to 2.7, behind the same resizing of eight-bit pixels
TOKENS = ("greedy", "beams")

Arrays = dict[str, np.ndarray]


def main(root: Path) -> None:
    """Check each folder below `root`."""
    transformers.logging.set_verbosity_error()
    folders = sorted(path.parent for path in root.glob("*/ours.npz"))
    if not folders:
        raise SystemExit(f"{root} has no exports; see the top of this file")
    for folder in folders:
        check(folder)
    print(f"{len(folders)} models are the same in transformers {transformers.__version__}")


@torch.no_grad()
def check(folder: Path) -> None:
    """Compare one model."""
    stored = np.load(folder / "ours.npz")
    inputs = {key.removeprefix("input."): torch.tensor(stored[key]) for key in stored.files if key.startswith("input.")}
    ours = {key: stored[key] for key in stored.files if not key.startswith("input.")}
    config = json.loads((folder / "converted" / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, report = kind.from_pretrained(folder / "converted", output_loading_info=True)
    assert not any(report.values()), report
    model.eval()
    outputs = retrieval if kind is Blip2ForImageTextRetrieval else generation
    print(folder.name)
    theirs = outputs(model, inputs)
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
        if name.startswith(TOKENS):
            require_same_tokens(f"{folder.name}: {name}", ours[name], array, model.generation_config)
        else:
            close(name, ours[name], array, ATOL)
    if (folder / "texts.json").is_file():
        check_processor(folder, model)


def close(name: str, ours: np.ndarray, theirs: np.ndarray, atol: float) -> None:
    """Print how far apart they are, and require that it is not far."""
    difference = float(np.abs(ours - theirs).max())
    print(f"  {name:<24} up to {np.abs(theirs).max():8.3f}, differs by {difference:.1e} of {atol:.1e}")
    assert ours.shape == theirs.shape and difference <= atol, name


def require_same_tokens(name: str, ours: np.ndarray, theirs: np.ndarray, settings: transformers.GenerationConfig) -> None:
    """Row by row up to the end token; what fills a row behind it differs."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        assert upto_end(one, settings) == upto_end(other, settings), f"{name}: {one} here, {other} in transformers"
    print(f"  {name.split(': ')[1]:<24} {len(ours)} texts are equal")


def upto_end(row: list[int], settings: transformers.GenerationConfig) -> list[int]:
    """Without what follows the first end."""
    return row[: row.index(settings.eos_token_id) + 1] if settings.eos_token_id in row else row


def features(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What the tower's last block, the norm behind it and the Q-Former give."""
    kept = {}
    hook = model.vision_model.encoder.register_forward_hook(lambda _, __, out: kept.update(tower=out.last_hidden_state))
    kept["patches"] = model.vision_model(image).last_hidden_state
    hook.remove()
    tokens = model.query_tokens.expand(len(image), -1, -1)
    kept["queries"] = model.qformer(query_embeds=tokens, encoder_hidden_states=kept["patches"]).last_hidden_state
    return kept


def retrieval(model: nn.Module, inputs: dict[str, Tensor]) -> Arrays:
    """Stage 1."""
    image, ids, mask = (inputs[name] for name in ("image", "ids", "mask"))
    contrast = model(image, ids, mask)
    match = model(image, ids, mask, use_image_text_matching_head=True)
    outputs = features(model, image) | {"image_vectors": contrast.image_embeds, "text_vectors": contrast.text_embeds}
    outputs |= {"itc": contrast.logits_per_image, "itm": match.logits_per_image}
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def generation(model: nn.Module, inputs: dict[str, Tensor]) -> Arrays:
    """Stage 2; the image's tokens stand before the text, padding too."""
    image, ids, mask = (inputs[name] for name in ("image", "ids", "mask"))
    outputs = features(model, image) | {"projected": model.get_image_features(image)}
    places = torch.full((len(ids), model.config.num_query_tokens), model.config.image_token_index)
    prompt = {"input_ids": torch.cat([places, ids], dim=1), "attention_mask": torch.cat([torch.ones_like(places), mask], dim=1)}
    encoder = {"decoder_input_ids": inputs["decoder_ids"]} if "decoder_ids" in inputs else {}
    outputs["logits"] = model(image, **prompt, **encoder).logits
    if not encoder:
        outputs["logits"] = outputs["logits"][:, -ids.shape[1] :][mask.bool()]
    for name, options in {"greedy": {}, "beams": {"num_beams": 3, "length_penalty": -1.0}}.items():
        for suffix, given in (("", prompt), ("_without_prompt", {})):
            written = model.generate(image, **given, **options, max_new_tokens=8)
            read = places.shape[1] + (ids.shape[1] if given else 1)  # given ids, OPT repeats them
            outputs[name + suffix] = written if encoder else written[:, read:]
    return {name: tensor.numpy() for name, tensor in outputs.items()}


@torch.no_grad()
def check_processor(folder: Path, model: nn.Module) -> None:
    """Pixels, ids and texts of the folder's own processor."""
    stored = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    picture = Image.open(folder / "picture.png")
    processor = AutoProcessor.from_pretrained(folder / "converted")
    pixels = processor(images=picture, return_tensors="np")["pixel_values"]
    close("pixels", np.load(folder / "pixel_values.npy"), pixels, PIXELS_ATOL)
    for text, ids in zip(stored["texts"], stored["ids"], strict=True):
        assert processor.tokenizer(text)["input_ids"] == ids, (text, processor.tokenizer(text)["input_ids"], ids)
    print(f"  {'tokens':<24} {len(stored['texts'])} texts are equal")
    if stored["written"] is None:
        return
    processor.tokenizer.padding_side = "left"
    for text, written in zip(stored["texts"], stored["written"], strict=True):
        given = processor(images=picture, text=text, return_tensors="pt")
        assert (given["input_ids"] == model.config.image_token_index).sum() == model.config.num_query_tokens
        ids = model.generate(**given, max_new_tokens=6)
        new = ids if model.config.text_config.is_encoder_decoder else ids[:, given["input_ids"].shape[1] :]
        assert processor.batch_decode(new, skip_special_tokens=True)[0].strip() == written
    print(f"  {'texts behind prompts':<24} {len(stored['texts'])} texts are equal")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
