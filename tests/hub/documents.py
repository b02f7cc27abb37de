"""Runs the code blocks of a Markdown file, one after the other, and knows the output that it shows for them.

A ```python block continues the Python session of the blocks before it, a ```bash block is run by bash, or in the same
session if it is nothing but plain `tinyalign` commands, which saves the imports; a ```text block behind one is what it
prints. `PYTHONPATH=tests python tests/hub/documents.py FILE FOLDER` runs a file in a folder
against a fake Hub and puts the output that came into the file.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
SESSION = """
import contextlib, io, json, sys, traceback

space = {"__name__": "__main__"}
for line in sys.stdin:
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(json.loads(line), space)
        answer = [output.getvalue(), None]
    except BaseException:
        answer = [output.getvalue(), traceback.format_exc()]
    print(json.dumps(answer), flush=True)
"""


@dataclass
class Block:
    """A block of code, where it stands, what it printed and what the file says that it prints."""

    language: str
    code: str
    span: tuple[int, int]
    shown: str | None
    output: str = ""


COMMANDS = """
from tinyalign_cli.main import main
for arguments in {}:
    try:
        main(arguments)
    except SystemExit as done:
        if done.code:
            raise RuntimeError(done.code)
"""


def plain_commands(code: str) -> list[list[str]] | None:
    """The arguments of the `tinyalign` commands that a block consists of; None if it takes a shell."""
    lines = code.replace("\\\n", " ").splitlines()
    if any(re.search(r"[*?$`;|&<>]", line) or not line.startswith("tinyalign ") for line in lines):
        return None
    return [shlex.split(line)[1:] for line in lines]


def run_blocks(text: str, folder: Path, environment: dict[str, str]) -> list[Block]:
    """Runs all blocks in `folder`. RuntimeError with the block and its error when one fails."""
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **environment, "PATH": paths}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder, "env": environment}
    blocks = []
    with subprocess.Popen([sys.executable, "-c", SESSION], **pipes) as session:
        for match in BLOCK.finditer(text):
            block = Block(match[1], match[2], match.span(), match[3])
            commands = plain_commands(block.code)
            if block.language == "python" or commands is not None:
                code = block.code if commands is None else COMMANDS.format(commands)
                print(json.dumps(code), file=session.stdin, flush=True)
                block.output, error = json.loads(session.stdout.readline())
            else:
                command = ["bash", "-e", "-c", block.code]
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
                block.output, error = done.stdout, done.stderr if done.returncode else None
            if error is not None:
                raise RuntimeError(f"This block failed:\n{block.code}\n{error}")
            blocks.append(block)
    return blocks


def with_outputs(text: str, blocks: list[Block]) -> str:
    """The file with the output that came."""
    for block in reversed(blocks):
        shown = f"\n```text\n{block.output.rstrip()}\n```\n" if block.output.strip() else ""
        start, stop = block.span
        text = text[:start] + f"```{block.language}\n{block.code}```\n{shown}" + text[stop:]
    return text


if __name__ == "__main__":
    import tempfile

    from fake_hub import FakeHub

    document = Path(sys.argv[1])
    with FakeHub() as hub, tempfile.TemporaryDirectory() as home:
        found = run_blocks(document.read_text(), Path(sys.argv[2]), hub.environment(home, "hf_owner"))
    document.write_text(with_outputs(document.read_text(), found).replace(hub.url, "https://huggingface.co"))
