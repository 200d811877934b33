"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, where, and what would be right.

    The commands print it without a traceback and exit with code 2.
    """
