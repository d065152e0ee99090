"""The one kind of error that says: what was asked for cannot be had, and asking again will not help."""


class Mistake(ValueError):
    """A setting, a file or a model that esparse's own checks refuse; its text is one sentence for the user.

    A sentence says what came, what was expected and what to do. Exit code 2 follows before a run begins, 1 within one,
    and the run's finished blocks are deleted, since another attempt would end the same way. Every other ValueError
    comes from a library or from a fault in esparse: it keeps the blocks and names the traceback.
    """
