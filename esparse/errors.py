"""The error class for requests that cannot be met and that a retry would not help."""


class Mistake(ValueError):
    """Raised if esparse's checks refuse a setting, a file or a model; its text is one sentence for the user.

    The sentence says what came, what was expected and what to do. The exit code is 2 before a run begins, 1 within a
    run; the run's finished blocks are deleted, because a retry would fail the same way. Any other ValueError comes from
    a library or from a bug in esparse: finished blocks are kept, and the message names the traceback's file.
    """
