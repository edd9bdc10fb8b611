"""The one exception type for bad input; the command line turns it into exit code 2 without a traceback."""


class InputError(ValueError):
    """Input the user can mend: the message names the file or key, what was wrong, and what to do."""
