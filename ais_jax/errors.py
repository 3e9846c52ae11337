"""The error a person is meant to read."""


class UserError(Exception):
    """Something the person can mend: a config, a file, a checkpoint.

    The message is one line that names the thing, its value and the remedy. The command line
    prints it without a traceback and exits with code 2.
    """
