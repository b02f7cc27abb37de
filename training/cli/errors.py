"""Errors and Ctrl-C in commands: a line that says what happened instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # the exit status of a program that SIGINT has ended


@contextmanager
def reported_errors(resumable: bool = False) -> Iterator[None]:
    """End the program with a message when files, settings, data or the installation are wrong, the disk is full, or
    Ctrl-C is pressed. An error of the package itself keeps its traceback.

    Args:
        resumable: Started again, the same command goes on from where it was stopped.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        message = "stopped; the same command goes on from there" if resumable else "stopped"
        # a run that knows where it was says so: "stopped at step 12; ..."
        print(f"tinyalign: {str(interrupt) or message}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        sys.exit(f"tinyalign: {message}")


def message_of(error: Exception) -> str | None:
    """Return the message for what a user can mend; None for an error of the package itself."""
    if not isinstance(error, (ValueError, OSError, ImportError, OverflowError)):
        import yaml
        from huggingface_hub.errors import StrictDataclassError

        from tinyalign_vlm.training.disk import full_disk_error

        if not isinstance(error, (StrictDataclassError, yaml.YAMLError)):
            error = full_disk_error(error)
    # A worker process puts the traceback into the text, before the error's own name and message.
    return None if error is None else str(error).rpartition(f"\n{type(error).__name__}: ")[2]
