"""Token numbers of Hugging Face transformers 4.57.6 on five hundred awkward texts, and ours: none may differ.

`TextTokenizer` drops blanks around a text, so the reference was given the texts without them; LAVIS strips its captions too.
"""

from __future__ import annotations

import gzip
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from blip2x.data.tokenize import TextTokenizer, build_tokenizer

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "reference.json").read_text(encoding="utf-8"))
FAMILIES = {"bert": "bert", "opt": "opt", "opt_image": "opt", "t5": "t5"}
UNKNOWN = {"bert": "[UNK]", "opt": "<unk>", "opt_image": "<unk>", "t5": "<unk>"}
MAX_LENGTH = 32


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, TextTokenizer]:
    """Each built from the files that a published model has."""
    built = {}
    for name, family in FAMILIES.items():
        folder = HERE / name
        if (packed := folder / "tokenizer.json.gz").is_file():
            folder = tmp_path_factory.mktemp(name)
            (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
        built[name] = build_tokenizer(str(folder), family, locate=Path, dataset_texts=list)
    return built


@pytest.mark.parametrize("name", FAMILIES)
def test_token_numbers(tokenizers, name, close):
    texts, expected = REFERENCE["texts"], REFERENCE["ids"][name]
    assert len(set(texts)) == len(texts) == 500 and "" in texts
    ours = [tokenizers[name].tokens(text) for text in texts]
    assert not [text for text, own, theirs in zip(texts, ours, expected, strict=True) if own != theirs]
    assert tokenizers[name].vocab_size == REFERENCE["size"][name]
    close(f"token numbers, {name}", list(chain(*ours)), list(chain(*expected)), atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoded_texts(tokenizers, name):
    """Special tokens are left out; only unknown words stay visible in ours, so texts with one are not compared."""
    unknown = tokenizers[name].tokenizer.token_to_id(UNKNOWN[name])
    compared = 0
    for ids, text in zip(REFERENCE["ids"][name][::3], REFERENCE["decoded"][name], strict=True):
        if unknown not in ids:
            assert tokenizers[name].decode(ids) == text.strip()
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_padded_and_truncated_rows(tokenizers, name):
    ids_BL, mask_BL = tokenizers[name].encode(REFERENCE["sentences"], max_length=MAX_LENGTH)
    assert np.array_equal(ids_BL, REFERENCE["batches"][name]["ids"])
    assert np.array_equal(mask_BL, REFERENCE["batches"][name]["mask"])


def test_opt_rows_end_with_the_line_break(tokenizers):
    """Theirs lose it where a text is cut, and with it the sign to stop; ours give up the last word instead."""
    opt, expected = tokenizers["opt"], REFERENCE["batches"]["opt"]
    ids_BL, mask_BL = opt.encode(REFERENCE["sentences"], max_length=MAX_LENGTH)
    cut_B = np.asarray(expected["ids"])[:, -1] == ids_BL[3, -2]
    assert cut_B.tolist() == [False, False, False, True, False, False]
    assert np.array_equal(ids_BL[~cut_B], np.asarray(expected["ids"])[~cut_B])
    assert np.array_equal(mask_BL, expected["mask"])
    assert ids_BL[cut_B][0].tolist() == [*np.asarray(expected["ids"])[cut_B][0, :-1], opt.end_id]


def test_opt_prompts_are_padded_on_the_left(tokenizers):
    ids_BL, mask_BL = tokenizers["opt"].encode(
        REFERENCE["sentences"], max_length=MAX_LENGTH, padding_side="left", add_end=False
    )
    assert np.array_equal(ids_BL, REFERENCE["batches"]["opt_prompts"]["ids"])
    assert np.array_equal(mask_BL, REFERENCE["batches"]["opt_prompts"]["mask"])


def test_published_places_in_berts_vocabulary(tokenizers):
    bert = tokenizers["bert"]
    assert (bert.pad_id, bert.bos_id, bert.end_id, bert.dec_id, bert.vocab_size) == (0, 101, 102, 30522, 30523)
    assert bert.tokens("[CLS] a photo [DEC]") == [101, 1037, 6302, 30522]


def test_the_image_token_is_one_row_more(tokenizers):
    """Hugging Face's BLIP-2 files of OPT have it; plain texts keep their numbers."""
    plain, image = tokenizers["opt"], tokenizers["opt_image"]
    assert image.tokens("<image>") == [plain.vocab_size] == [image.vocab_size - 1]
    assert (image.pad_id, image.bos_id, image.end_id) == (plain.pad_id, plain.bos_id, plain.end_id)
    assert image.decode(image.tokens("<image>a cat")) == "a cat"
    same = [one == other for one, other in zip(REFERENCE["ids"]["opt"], REFERENCE["ids"]["opt_image"], strict=True)]
    assert same == ["<image>" not in text for text in REFERENCE["texts"]]
