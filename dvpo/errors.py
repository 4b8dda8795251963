"""The two ways a command ends badly."""


class InputError(ValueError):
    """The user's input or usage is wrong (exit code 2). The message is one sentence: what, where, and the way out."""


class StageError(RuntimeError):
    """The work itself failed (exit code 1). The message says what failed and where."""
