"""Tokenizers, and what the models get to read: exactly, with token numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip2x.config.task import AnsweringConfig, CaptionConfig, DecodingConfig, PretrainStage2Config
from blip2x.config.tools import PredictConfig
from blip2x.data.collate import LanguageCollate, LanguageEncoderDecoderCollate, LoadedCaption, QuestionTexts, Stage1Collate
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.tokenize import FAMILIES, TextTokenizer
from blip2x.errors import UserError
from blip2x.tasks.checkup.data import reads, samples_of
from blip2x.tasks.checkup.examined import Examined
from blip2x.tasks.checkup.findings import Findings, sentence
from blip2x.tasks.common.answering import asked
from blip2x.tasks.common.captioning import encode_prompts, stage2_collate
from blip2x.tasks.predict import pictures_and_prompts

_DRAWN = 1000  # texts
_CUT_SHARE = 0.01  # above which cutting texts off is worth a look, as in the audit
_SHOWN_IDS = 48
_PUBLISHED = {  # of the vocabularies that come with published weights
    "bert": {"pad_id": 0, "bos_id": 101, "end_id": 102, "dec_id": 30522},
    "opt": {"pad_id": 1, "bos_id": 2, "end_id": 50118},  # the line break, which is what the model was taught to end with
    "t5": {"pad_id": 0, "end_id": 1},
}
_PUBLISHED_SIZE = {"bert": 30_522, "opt": 50_265, "t5": 32_000}  # at least


def check_tokenizers(examined: Examined) -> Findings:
    """Vocabulary, special tokens, a text there and back, and how many texts of the training are cut off."""
    out = Findings(examined.name)
    for part, tokenizer in examined.tokenizers.items():
        title, key = ("Q-Former" if part == "qformer" else "language model"), f"model.{part}.tokenizer"
        if tokenizer is None:
            name = getattr(examined.cfg.model, part).tokenizer
            out.look(f"{title}'s tokenizer", f"{key}={name} is not here", "it is fetched when the task starts")
            continue
        _judge_tokenizer(out, f"{title}'s tokenizer", tokenizer, getattr(examined.cfg.model, part).vocab_size)
        try:
            texts = _drawn(examined, part)
        except UserError:  # the line on the data says it
            continue
        if texts:
            text = texts[0].splitlines()[0]
            ids = tokenizer.tokens(text)
            out.shown.append(f"{title}: {text!r} is {_ids(ids)}, and back {tokenizer.decode(ids)!r}")
            unknown = tokenizer.tokenizer.token_to_id(FAMILIES[tokenizer.family].unknown)
            count = sum(unknown in tokenizer.tokens(text) for text in texts)
            if unknown is not None and count:
                said = f"{count:,} of {len(texts):,} texts drawn by lot have some"
                out.look(f"{title}'s unknown words", said, f"{key} says which vocabulary it has")
        limit = getattr(examined.cfg.task, "max_txt_len", None)
        if texts and limit and examined.trains:
            prompt = getattr(examined.cfg.task, "prompt", "") if part == "language" else ""
            if tokenizer.family == "t5" and examined.stage != "answering":
                prompt = ""  # the encoder's, and the texts are the decoder's
            _judge_lengths(out, title, tokenizer, texts, prompt.replace("{}", ""), limit)
    return out


def check_prompts(examined: Examined) -> Findings:
    """The token numbers of one real sample, made by what makes them in the task itself."""
    out, tokenizers = Findings(examined.name), examined.tokenizers
    if not tokenizers or None in tokenizers.values():
        return out
    task = examined.cfg.task
    prompt = getattr(task, "prompt", None)
    if prompt is not None and prompt != prompt.strip():
        out.fine(
            "blanks of the prompt", f"{prompt!r} is read as {prompt.strip()!r}: a blank at the end would be a token of its own"
        )
    try:
        found = _read_by_models(examined, tokenizers)
    except UserError as error:
        out.look("prompts", f"no sample to show: {sentence(error)}")
        return out
    for title, (tokenizer, ids) in found.items():
        words = [tokenizer.tokenizer.id_to_token(int(index)) for index in ids]
        out.shown.append(f"{title}: {' '.join(map(repr, words[:_SHOWN_IDS]))}{' ...' if len(words) > _SHOWN_IDS else ''}")
        out.shown.append(f"    {_ids(list(map(int, ids)))}")
        out.record.setdefault("prompts", {})[title] = {"ids": list(map(int, ids)), "tokens": words}
    if found:
        out.fine("what the models read", "; ".join(f"{title}: {len(ids)} tokens" for title, (_, ids) in found.items()))
    return out


def _read_by_models(examined: Examined, tokenizers: Mapping[str, TextTokenizer]) -> dict[str, tuple[TextTokenizer, np.ndarray]]:
    """What is read -> (tokenizer, token numbers [L])."""
    task, stage, found = examined.cfg.task, examined.stage, {}
    language, qformer = tokenizers.get("language"), tokenizers.get("qformer")
    sample = _first_sample(examined)
    lot, picture = random.Random(examined.cfg.seed), np.zeros((3, 1, 1), dtype=np.float32)
    if stage == "language":
        collate = LanguageEncoderDecoderCollate if language.family == "t5" else LanguageCollate
        made = collate(language, task.max_txt_len)
        return _rows(language, made([made.load(sample, lot)]), "the language model")
    if stage == "stage1" and isinstance(sample, CaptionSample):
        batch = Stage1Collate(None, qformer, _limit(task))([LoadedCaption(picture, 0, sample.captions[0])])
        return _rows(qformer, batch, "the Q-Former")
    if stage == "answering":
        texts = QuestionTexts(qformer, language, task.prompt, task.max_txt_len, clean=task.clean_questions)
        found |= _rows(qformer, texts.asked([sample.question]), "the Q-Former")
        if task.train and sample.answers:
            answered = texts.answered([sample.question], [sample.answers[0]])
            found |= _rows(language, answered, "the language model in training")
    elif isinstance(task, (PretrainStage2Config, CaptionConfig)) and examined.trains:
        item = LoadedCaption(picture, 0, sample.captions[0])
        batch = stage2_collate(task, language, None)([(item, 0) if language.family == "t5" else item])
        found |= _rows(language, batch, "the language model in training")
    if isinstance(task, DecodingConfig) and language:
        asks = isinstance(task, AnsweringConfig)
        text = asked(task.prompt, sample, clean=task.clean_questions) if asks else task.prompt
        if isinstance(task, PredictConfig):
            text = next(iter(pictures_and_prompts(task).values()))[0]
        found["the language model, to write behind"] = (language, encode_prompts(language, [text.strip()])[0][0])
    return found


def _limit(task: Any) -> int:
    return getattr(task, "max_txt_len", None) or task.eval_max_txt_len


def _rows(tokenizer: TextTokenizer, batch: Mapping[str, np.ndarray], who: str) -> dict[str, tuple[TextTokenizer, np.ndarray]]:
    """The rows of token numbers of a batch of one, without padding."""
    named = {"text": who, "question": f"{who}, the question", "input": f"{who}, its encoder", "output": f"{who}, its decoder"}
    return {
        named[kind]: (tokenizer, ids[0][batch[key.replace("_ids_", "_mask_")][0] == 1])
        for key, ids in batch.items()
        if "_ids_" in key and (kind := key.partition("_ids_")[0])
    }


def _first_sample(examined: Examined) -> Any:
    for what, split in reads(examined):
        if what != "labels" and len(samples := samples_of(examined, what, split)):
            return samples[0]
    return None


def _drawn(examined: Examined, part: str) -> list[str]:
    """Up to a thousand texts that `part` reads of what the task trains on, else of what it evaluates."""
    wanted = sorted(reads(examined), key=lambda entry: entry[1] not in ("train", None))
    if not wanted or wanted[0][0] == "labels":
        return []
    samples: Sequence[Any] = samples_of(examined, *wanted[0])
    lot = random.Random(examined.cfg.seed)
    texts = []
    for place in lot.sample(range(len(samples)), min(_DRAWN, len(samples))):
        sample = samples[place]
        if isinstance(sample, CaptionSample):
            texts += [lot.choice(sample.captions)] if sample.captions else []
        elif isinstance(sample, QuestionSample):
            # one that goes on with the answer has to have room for both, an encoder for the question alone
            goes_on = part == "language" and examined.cfg.model.language.kind != "t5" and examined.trains
            answers = sample.answers if goes_on else ()
            texts.append(f"{sample.question} {max(answers, key=len)}" if answers else sample.question)
        else:
            texts.append(sample)
    return texts


def _judge_tokenizer(out: Findings, title: str, tokenizer: TextTokenizer, vocab_size: int | None) -> None:
    family, size = tokenizer.family, tokenizer.vocab_size
    ids = {name: getattr(tokenizer, name) for name in ("bos_id", "end_id", "pad_id", "dec_id")}
    names = {"bos_id": FAMILIES[family].bos, "end_id": FAMILIES[family].end, "pad_id": FAMILIES[family].pad, "dec_id": "[DEC]"}
    words = {"bos_id": "begin", "end_id": "end", "pad_id": "padding", "dec_id": "caption's begin"}
    said = ", ".join(f"{words[name]} {names[name]!r} {index}" for name, index in ids.items() if index is not None)
    said = f"{family}, {size:,} tokens; {said}"
    out.record.setdefault("tokenizers", {})[title] = {"family": family, "size": size, **ids}
    wrong = {}
    if size >= _PUBLISHED_SIZE[family]:
        wrong = {name: index for name, index in _PUBLISHED[family].items() if ids[name] != index}
    if wrong:
        expected = ", ".join(f"{words[name]} {index}" for name, index in wrong.items())
        out.broken(title, f"{said}; published weights have {expected}", "use the tokenizer that came with the weights")
    elif vocab_size and size > vocab_size:
        out.broken(title, f"{said}; the model has {vocab_size:,} words only", "use the tokenizer that came with the weights")
    else:
        out.fine(title, said)


def _judge_lengths(out: Findings, title: str, tokenizer: TextTokenizer, texts: list[str], prompt: str, limit: int) -> None:
    around = 1 + (tokenizer.bos_id is not None) + len(tokenizer.tokens(prompt))
    lengths = [len(tokenizer.tokens(text)) + around for text in texts]
    cut = sum(length > limit for length in lengths)
    said = f"{cut:,} of {len(texts):,} drawn by lot are cut at task.max_txt_len={limit}; the longest has {max(lengths)} tokens"
    if cut / len(texts) > _CUT_SHARE:
        out.look(f"lengths for the {title}", said, "raise task.max_txt_len, or accept that their ends are cut off")
    else:
        out.fine(f"lengths for the {title}", said)


def _ids(ids: list[int]) -> str:
    return " ".join(map(str, ids[:_SHOWN_IDS])) + (" ..." if len(ids) > _SHOWN_IDS else "")
