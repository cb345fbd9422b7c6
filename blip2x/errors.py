"""The one exception for bad input: its message is a whole sentence that a user can act on."""


class UserError(ValueError):
    """Something the user gave is wrong: a key, a file, an image, a folder.

    The message names the offending value and what to do. ``runners/run.py`` prints it without a traceback and exits with
    code 2; everything else that is raised is a bug of ours and keeps its traceback.
    """


class Interrupted(BaseException):  # no error, and not to be caught as one: the run does what it was told
    """The run was asked to stop, and has saved what it takes to go on.

    ``runners/run.py`` prints the message and exits with `EXIT_CODE`, on which schedulers can be told to start it again.

    Args:
        message: why, and how far the run had come.
        together: all ranks raise it, at the same place.
    """

    EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h

    def __init__(self, message: str, *, together: bool = False):
        super().__init__(message)
        self.together = together
