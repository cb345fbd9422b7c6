"""SPICE, by the Java program in pycocoevalcap and a parser of CoreNLP 3.6.0 that has to be fetched by hand."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycocoevalcap import spice

from blip2x.errors import UserError
from blip2x.metrics.java import JavaError, run_java

_FOLDER = Path(spice.__file__).parent
_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_ARCHIVE = "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
_OPENED = (  # its cache looks into these, which Java 16 and later forbid otherwise
    "java.base/java.lang",
    "java.base/java.math",
    "java.base/java.util",
    "java.base/java.util.concurrent",
    "java.base/java.net",
    "java.base/java.text",
    "java.base/java.nio",
    "java.base/sun.nio.ch",
    "java.sql/java.sql",
)


def spice_scores(references: Mapping[int, Sequence[str]], predictions: Mapping[int, str]) -> tuple[float, list[float]]:
    """SPICE of the corpus, the mean over its images, and of each image; takes up to 4 GB and, for 5,000 images, many minutes.

    Args:
        references: image id -> tokenized captions.
        predictions: image id -> tokenized caption, the same ids.

    Raises:
        UserError: CoreNLP's jars are not there.
        JavaError: SPICE failed.
    """
    jars = [_FOLDER / "spice-1.0.jar", *_corenlp()]
    pairs = [{"image_id": i, "test": predictions[i], "refs": list(captions)} for i, captions in references.items()]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "captions.json", Path(folder) / "scores.json"
        asked.write_text(json.dumps(pairs))
        command = [argument for package in _OPENED for argument in ("--add-opens", f"{package}=ALL-UNNAMED")]
        command += ["-Xmx4G", "-cp", os.pathsep.join(map(str, jars)), "edu.anu.spice.SpiceScorer", str(asked)]
        command += ["-cache", str(_cache(folder)), "-out", str(answered), "-subset", "-silent"]
        run_java("SPICE", command, folder=_FOLDER)
        try:
            scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in json.loads(answered.read_text())}
            values = [scores[image_id] for image_id in references]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise JavaError(f"SPICE left no score of every image: {type(error).__name__}: {error}") from error
    return sum(values) / len(values), values


def _corenlp() -> list[Path]:
    folder = Path(os.environ.get("BLIP2X_CORENLP") or _FOLDER / "lib").absolute()
    missing = [jar for jar in _JARS if not (folder / jar).is_file()]
    if missing:
        raise UserError(
            f"SPICE needs {' and '.join(missing)}, not found in {folder}; unpack {_ARCHIVE} and set the environment variable "
            "BLIP2X_CORENLP to the folder that holds the two jars"
        )
    return [folder / jar for jar in _JARS]


def _cache(otherwise: str) -> Path:
    """Where parsed captions are kept for the next evaluation: the user's cache folder if it can be written to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blip2x" / "spice"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(otherwise)
    return folder if os.access(folder, os.W_OK) else Path(otherwise)
