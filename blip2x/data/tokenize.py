"""Texts to token numbers: one wrapper for the three families of tokenizers that BLIP-2 meets.

Shapes: B texts, L tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from blip2x.errors import UserError

_FAMILY_FILE = "tokenizer_family.json"
_MAX_WORDS = 1_000_000  # of a trained tokenizer: in practice all words
_DEC = "[DEC]"


@dataclass(frozen=True)
class Family:
    """Special tokens. A text becomes: bos, its tokens, end."""

    pad: str
    unknown: str
    bos: str | None
    eos: str
    end: str  # what closes a text, and what generation stops at
    trained: tuple[str, ...]  # the first tokens of a tokenizer that is trained here, in the published order
    files: str  # what a folder has to contain


FAMILIES = {
    "bert": Family(
        pad="[PAD]", unknown="[UNK]", bos="[CLS]", eos="[SEP]", end="[SEP]",
        trained=("[PAD]", "[UNK]", "[CLS]", "[SEP]"), files="tokenizer.json or vocab.txt",
    ),
    "opt": Family(
        pad="<pad>", unknown="<unk>", bos="</s>", eos="</s>", end="\n",
        trained=("<s>", "<pad>", "</s>", "<unk>", "\n"), files="tokenizer.json, or vocab.json and merges.txt",
    ),
    "t5": Family(
        pad="<pad>", unknown="<unk>", bos=None, eos="</s>", end="</s>",
        trained=("<pad>", "</s>", "<unk>"), files="tokenizer.json (spiece.model alone does not do)",
    ),
}  # fmt: skip


class TextTokenizer:
    """A `tokenizers.Tokenizer` and the special tokens of its family: "bert" (Q-Former), "opt" or "t5".

    Attributes:
        pad_id, eos_id: as in the published models; T5's decoder starts with `pad_id`.
        bos, bos_id: before every text; None for T5. Written inside a text, `bos` is that one token.
        end_id: after every text, where generation stops: [SEP], OPT's line break, T5's </s>.
        dec_id: [DEC], with which the Q-Former starts captions; None for the other families.
    """

    def __init__(self, tokenizer: Tokenizer, family: str):
        self.family = family
        special = FAMILIES[family]
        if family == "bert" and tokenizer.token_to_id(_DEC) is None:
            tokenizer.add_special_tokens([_DEC])  # the last row of the embedding, as in BLIP-2's weights
        tokenizer.no_truncation()  # what a published tokenizer.json says of lengths is not for our texts
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.pad_id = self._special(special.pad)
        self.eos_id = self._special(special.eos)
        self.bos = special.bos
        self.bos_id = None if special.bos is None else self._special(special.bos)
        self.end_id = self._special(special.end)
        self.dec_id = self._special(_DEC) if family == "bert" else None
        skipped = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        skipped |= {self.pad_id, self.eos_id, self.bos_id, self.dec_id}
        self._skipped = skipped - {tokenizer.token_to_id(special.unknown), tokenizer.token_to_id("\n")}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special and added ones included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def tokens(self, text: str) -> list[int]:
        """The text's own tokens, no special ones; blanks around the text are dropped, they would become tokens of their own."""
        return self.tokenizer.encode(text.strip(), add_special_tokens=False).ids

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None,
        padding_side: Literal["left", "right"] = "right",
        add_bos: bool = True,
        add_end: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers and mask (1: token, 0: padding), both [B, L] int64; L is the longest text's.

        Args:
            texts: at least one.
            max_length: longer texts lose their last words, never bos or end; None: no limit.
            padding_side: "right" to train, "left" for prompts that a decoder continues.
            add_bos: put `bos_id` first, where the family has one.
            add_end: put `end_id` last; not for prompts that a decoder continues.
        """
        before = [self.bos_id] if add_bos and self.bos_id is not None else []
        after = [self.end_id] if add_end else []
        room = None if max_length is None else max_length - len(before) - len(after)
        if room is not None and room < 1:
            raise UserError(f"texts of {max_length} tokens have no room for a word; allow at least {max_length - room + 1}")
        encoded = self.tokenizer.encode_batch([text.strip() for text in texts], add_special_tokens=False)
        rows = [before + one.ids[:room] + after for one in encoded]
        length = max(map(len, rows))
        ids_BL = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        mask_BL = np.zeros((len(rows), length), dtype=np.int64)
        for b, row in enumerate(rows):
            where = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
            ids_BL[b, where] = row
            mask_BL[b, where] = 1
        return ids_BL, mask_BL

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one row of tokens, special ones left out but for unknown words, which shall be seen."""
        text = self.tokenizer.decode([int(i) for i in ids if int(i) not in self._skipped], skip_special_tokens=False).strip()
        return text.replace(" ' ", "'") if self.family == "bert" else text  # "the dog ' s bone", as Hugging Face tidies it up

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder`, for `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        (folder / _FAMILY_FILE).write_text(json.dumps({"family": self.family}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read what `save` wrote."""
        path = Path(folder) / _FAMILY_FILE
        if not path.is_file():
            raise UserError(f"{folder} is no tokenizer of blip2x: it has no {_FAMILY_FILE}")
        family = json.loads(path.read_text(encoding="utf-8"))["family"]
        return cls(_read(Path(folder), family), family)

    def _special(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        if index is None:  # a line break has another name in a byte-level vocabulary
            ids = self.tokenizer.encode(token, add_special_tokens=False).ids
            index = ids[0] if len(ids) == 1 and ids[0] != self.tokenizer.token_to_id(FAMILIES[self.family].unknown) else None
        if index is None:
            raise UserError(f"the tokenizer has no token {token!r}, which one of the family {self.family!r} needs")
        return index


def train_tokenizer(texts: Iterable[str], family: str) -> TextTokenizer:
    """A small tokenizer of the lower-cased words and punctuation marks in `texts`; the same texts give the same numbers."""
    special = FAMILIES[family]
    tokenizer = Tokenizer(models.WordLevel(unk_token=special.unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=_MAX_WORDS, special_tokens=list(special.trained), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(tokenizer, family)


def build_tokenizer(
    name: str, family: str, *, locate: Callable[[str], Path], dataset_texts: Callable[[], Iterable[str]]
) -> TextTokenizer:
    """The tokenizer that the config calls `name`.

    Args:
        name: "dataset", a folder, or a name of published weights.
        family: "bert", "opt" or "t5".
        locate: gives the folder of a name, or raises `UserError`.
        dataset_texts: gives the texts to train on where `name` is "dataset".

    Raises:
        UserError: there is no such folder, or it lacks the files or tokens of `family`.
    """
    if name == "dataset":
        return train_tokenizer(dataset_texts(), family)
    folder = locate(name)
    if (folder / _FAMILY_FILE).is_file():
        tokenizer = TextTokenizer.load(folder)
        if tokenizer.family != family:
            raise UserError(f"the tokenizer in {folder} is of the family {tokenizer.family!r}, not {family!r}")
        return tokenizer
    return TextTokenizer(_read(folder, family), family)


def has_tokenizer(folder: Path, family: str) -> bool:
    """Whether a folder has the files of a tokenizer of `family`, or of one of ours."""
    names = {"bert": ("vocab.txt",), "opt": ("vocab.json", "merges.txt"), "t5": ()}[family]
    return (folder / "tokenizer.json").is_file() or (bool(names) and all((folder / name).is_file() for name in names))


def clean_caption(text: str, max_words: int = 50) -> str:
    """A training caption as BLIP prepares it: lower case, most punctuation to blanks, at most `max_words` words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """A question as in the prompts of LAVIS's evaluations: lower case, most punctuation left out, at most `max_words` words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', "", text.lower()).rstrip(" ").split(" ")[:max_words])


def _read(folder: Path, family: str) -> Tokenizer:
    files = {name: folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")}
    try:
        if files["tokenizer.json"].is_file():
            return Tokenizer.from_file(str(files["tokenizer.json"]))
        if family == "opt" and files["vocab.json"].is_file() and files["merges.txt"].is_file():
            return _byte_level(models.BPE.from_file(str(files["vocab.json"]), str(files["merges.txt"])))
        if family == "bert" and files["vocab.txt"].is_file():
            return _word_piece(models.WordPiece.from_file(str(files["vocab.txt"]), unk_token="[UNK]"))
    except Exception as error:  # the library raises bare Exceptions for files that it cannot parse
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error
    raise UserError(f"no tokenizer in {folder}: it needs {FAMILIES[family].files}")


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _mark_special(tokenizer, ["<pad>", "</s>"])  # not <s> and <unk>: published settings do not use these rows of the vocabulary
    return tokenizer


def _word_piece(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _mark_special(tokenizer, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def _mark_special(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """One token each wherever they are written, as a tokenizer.json says; those that the vocabulary lacks are not added."""
    tokenizer.add_special_tokens([token for token in tokens if tokenizer.token_to_id(token) is not None])
