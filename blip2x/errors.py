"""The one exception for bad input: its message is a whole sentence that a user can act on."""


class UserError(ValueError):
    """Something the user gave is wrong: a key, a file, an image, a folder.

    The message names the offending value and what to do. ``runners/run.py`` prints it without a traceback and exits with
    code 2; everything else that is raised is a bug of ours and keeps its traceback.
    """
