"""The one exception that means "the input is at fault, not the program"."""


class InputError(Exception):
    """Bad input: the doors print it as one line and exit with status 2.

    The message names the file, line, key or tensor, what was found, what was expected, and the fix.
    """
