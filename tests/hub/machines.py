"""Processes that use a Hub as a user's would."""

import inspect
import json
import os
import subprocess
import sys
import textwrap

WORKER = """
import json, os, sys, traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print goes to stderr
for line in sys.stdin:
    source, name, arguments = json.loads(line)
    space = {}
    try:
        exec(source, space)
        answer = [space[name](*arguments), None]
    except BaseException as error:
        traceback.print_exc()
        answer = [None, f"{type(error).__name__}: {error}"]
    print(json.dumps(answer), file=answers, flush=True)
"""


class Machine:
    """A Python process of its own that runs functions, one after the other; they import what they use."""

    def __init__(self, environment: dict[str, str], cwd):
        environment = {**os.environ, **environment, "PYTHONPATH": ""}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", WORKER], env=environment, cwd=cwd, **pipes)

    def run(self, function, *arguments):
        """What `function(*arguments)` returns there, as JSON; `RemoteError` is what it raises."""
        source = textwrap.dedent(inspect.getsource(function))
        print(json.dumps([source, function.__name__, arguments]), file=self._process.stdin, flush=True)
        result, error = json.loads(self._process.stdout.readline())
        if error is not None:
            raise RemoteError(error)
        return result

    def close(self):
        self._process.kill()
        self._process.wait()


class RemoteError(Exception):
    """An exception of a `Machine`: "TypeOfError: its message"."""


def without_the_package():
    """For a `Machine` that has only what is on the Hub."""
    import sys

    sys.modules["tinyalign_vlm"] = None  # importing it fails
