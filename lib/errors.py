"""The errors that Shoal raises, and the exit codes of its jobs.

    ShoalError            anything a user can mend: names the value, the choices, the next action     exit 1
      UsageError          the command itself is wrong                                                  exit 2
      ModelError          the model cannot be loaded, or not with these options
      InputError          the corpus is missing, unreadable, or not as the command says
      StorageError        the store refuses, is missing, or is full
      RunError            the output folder, the plan or the cluster does not allow this run

Exit 0: every row is in the output. Exit 3: finished, but some shards are quarantined.
"""

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_QUARANTINED = 3


class ShoalError(Exception):
    """An error that the user can act on; its text is the whole message."""

    exit_code = EXIT_ERROR


class UsageError(ShoalError):
    """The command is wrong: an unknown value, or two options at odds."""

    exit_code = EXIT_USAGE


class ModelError(ShoalError):
    """The model cannot be loaded, or cannot do what the command needs."""


class InputError(ShoalError):
    """The corpus is missing, empty, unreadable, or lacks what the command names."""


class StorageError(ShoalError):
    """The store refused, cannot be reached, or is full."""


class RunError(ShoalError):
    """The output folder, the plan or the cluster does not allow this run."""
