"""The two ways in which a command of this project ends early, each in one line."""


class BadInput(ValueError):
    """The user asked for something that cannot be done; the message says what, and what to do. Exit code 2."""


class RunFailed(RuntimeError):
    """The run cannot go on; the message says at which step, why, and what to try. Exit code 1."""
