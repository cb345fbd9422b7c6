"""What the other ranks say when one of them dies.

Its connections break, and each of the others meets that in whatever collective comes next: as an error that paddle raises, or,
inside backward(), as a C++ exception that nothing catches and that ends the process.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from blip2x.errors import UserError

EXIT_CODE = 2  # as of other errors that are one sentence

# The words of gloo, of NCCL (its other errors are of a wrong setup), and of the store at which ranks find each other
_LOST = re.compile(r"gloo/transport|NCCL error\(6\)|ncclRemoteError|tcp_utils|tcp_store|TCPStore", re.IGNORECASE)
_Handler = ctypes.CFUNCTYPE(None)


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Inside, a connection that breaks because another rank is gone is one sentence, which names the way on.

    Raises:
        UserError: another rank is gone.
    """
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) == 1:
        yield
        return
    try:
        with _instead_of_terminating(lambda: _end(lost_rank_message())):
            yield
    except (RuntimeError, OSError) as error:
        if not is_lost_rank(error):
            raise
        raise UserError(f"{lost_rank_message()} ({_last_line(error)})") from error


def is_lost_rank(error: BaseException) -> bool:
    """Whether paddle raised `error` because it could no longer reach another rank."""
    return isinstance(error, (RuntimeError, OSError)) and bool(_LOST.search(str(error)))


def lost_rank_message() -> str:
    """The sentence of a rank that lost another one."""
    rank, size = (os.environ.get(name, "?") for name in ("PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"))
    return (
        f"rank {rank} of {size} can no longer reach another rank, which failed, was killed, ran out of memory or lost its "
        "machine (its own output may say why); the same command with resume=auto goes on from the last checkpoint"
    )


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _end(sentence: str) -> None:
    with suppress(Exception):
        sys.stdout.flush()
    os.write(2, f"error: {sentence}\n".encode())
    os._exit(EXIT_CODE)


@contextmanager
def _instead_of_terminating(action: Callable[[], None]) -> Iterator[None]:
    """Inside, run `action` where a C++ exception of gloo's is about to end the process; others end it as before."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, current_type = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (OSError, AttributeError):  # another C++ library: the process ends with gloo's words instead of ours
        yield
        return
    set_terminate.restype, current_type.restype = _Handler, ctypes.POINTER(ctypes.c_char_p)

    @_Handler
    def handler() -> None:
        type_info = current_type()
        if type_info and b"gloo" in (type_info[1] or b""):  # std::type_info: a pointer to its methods, then the type's name
            action()
        before()

    before = set_terminate(handler)
    try:
        yield
    finally:
        set_terminate(before)  # while the interpreter shuts down, nothing of python's can run
