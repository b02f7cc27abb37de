"""`tinyalign`: registers the commands, and runs the one that is asked for. Nothing heavy is imported before that.

A command is a module with `SUMMARY` and `HELP`, `add_arguments(parser)`, which adds its options, and
`run(arguments)`, which does the work. Those that take files get the rest of the line as `arguments.files`, `.fields`.
"""

import argparse
import importlib.metadata
import os
import sys
from itertools import takewhile
from pathlib import Path
from types import ModuleType

from . import (
    app,
    bank_add,
    bank_build,
    bank_calibrate,
    bank_info,
    bank_lance,
    bank_merge,
    bank_remove,
    bank_verify,
    bank_view,
    chat,
    data_check,
    demo,
    evaluate,
    neighbours,
    push,
    serve,
    train,
)
from .errors import reported_errors

RAW = argparse.RawDescriptionHelpFormatter
DESCRIPTION = "A small vision-language model that retrieves similar examples for every image."
COMMANDS = {
    "demo": demo,
    "train": train,
    "data check": data_check,
    "neighbours": neighbours,
    "bank build": bank_build,
    "bank add": bank_add,
    "bank remove": bank_remove,
    "bank merge": bank_merge,
    "bank verify": bank_verify,
    "bank info": bank_info,
    "bank view": bank_view,
    "bank lance": bank_lance,
    "bank calibrate": bank_calibrate,
    "push": push,
    "chat": chat,
    "serve": serve,
    "app": app,
    "evaluate": evaluate,
}
# The first word of a command of two words: its line in the list of commands, and its own description.
GROUPS = {
    "data": ("check the rows of a data set", "Data sets: `tinyalign data check --help` says which rows are read."),
    "bank": (
        "build, change and look at memory banks; calibrate retrieval from them",
        "Memory banks: `tinyalign bank COMMAND --help` has examples of each command, docs/bank.md a walk.",
    ),
}
# These take YAML files first, and then any field of the settings of the files.
FILE_COMMANDS = (train, neighbours, data_check, bank_calibrate)
# Options that name a folder or a repository, and the kind of repository.
REPOSITORIES = dict.fromkeys(("model", "vision_model", "language_model", "against"), "model")
REPOSITORIES |= dict.fromkeys(("bank", "banks", "like", "value_encoder", "memory_bank"), "dataset")
# Started again, these go on from where they were stopped.
RESUMABLE_COMMANDS = (train, neighbours, demo, bank_build, bank_add, evaluate)


def main(argv: list[str] | None = None):
    """Run a command line, `sys.argv` by default. Ends with `SystemExit` when something is wrong."""
    argv = [expand_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    arguments, rest = build_parser().parse_known_args(argv)
    command, parser = arguments.command_module, arguments.command_parser
    del arguments.command_module, arguments.command_parser
    if command is chat and arguments.question is None and rest and not rest[0].startswith("-"):
        arguments.question = rest.pop(0)  # argparse takes it only right behind the model
    if command in FILE_COMMANDS:
        arguments.files = list(takewhile(lambda argument: not argument.startswith("-"), rest))
        arguments.fields = rest[len(arguments.files) :]
        exit_with_help_if_asked(command, parser, arguments)
    elif rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if not sys.stderr.isatty():  # a progress bar in a file is one long line
        os.environ.setdefault("TQDM_DISABLE", "1")
    with reported_errors(resumable=command in RESUMABLE_COMMANDS):
        check_names(vars(arguments))
        command.run(arguments)


def expand_home(argument: str) -> str:
    """Return an argument with the home folder for `~`, also in `--out=~/bank`, which no shell expands."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return name + equals + (os.path.expanduser(value) if value.startswith("~/") else value)


def check_names(options: dict):
    """Tell of a model or bank that is nowhere, before anything is loaded."""
    for option, repo_type in REPOSITORIES.items():
        values = options.get(option)
        for name in values if option in ("banks", "against") and values else [values]:
            if isinstance(name, str) and not Path(name).expanduser().exists():
                from tinyalign_vlm.training.arguments.names import check_name

                check_name(option, name, repo_type)


def exit_with_help_if_asked(command: ModuleType, parser: argparse.ArgumentParser, arguments: argparse.Namespace):
    """Print the help of a command that reads files. `tinyalign train FILE.yaml --help` is left to the command."""
    asked = not {"-h", "--help"}.isdisjoint(arguments.fields)
    if asked and command is train and "all" in arguments.fields:
        arguments.files = arguments.files or ["stage2.yaml"]  # which has the settings of both trainers
    if not arguments.files or (asked and command is not train):
        parser.print_help()
        parser.exit(0 if asked else 2)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what it parses has the command's module and parser beside its options."""
    parser = argparse.ArgumentParser(prog="tinyalign", description=DESCRIPTION, allow_abbrev=False)
    version = f"tinyalign-vlm {importlib.metadata.version('tinyalign-vlm')}"
    parser.add_argument("--version", action="version", version=version, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    groups = {"": commands}
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            summary, description = GROUPS[group]
            first_word = commands.add_parser(group, help=summary, description=description, allow_abbrev=False)
            groups[group] = first_word.add_subparsers(required=True, metavar="COMMAND")
        texts = {"help": command.SUMMARY, "description": command.HELP}
        command_parser = groups[group].add_parser(
            word, **texts, formatter_class=RAW, allow_abbrev=False, add_help=command not in FILE_COMMANDS
        )
        command.add_arguments(command_parser)
        command_parser.set_defaults(command_module=command, command_parser=command_parser)
    return parser
