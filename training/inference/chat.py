"""`tinyalign chat`: questions about pictures in a terminal, and answers from a memory that can be taught."""

import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from glob import escape, glob
from pathlib import Path

from ...modeling_tinyalign.connectors import check_retrieval
from ..models import load_to_answer
from .conversation import ERRORS, UNSURE, Conversation

try:
    import readline
except ImportError:  # on Windows
    readline = None

HELP = """\
/image PATH        talk about this picture
/memory off|on|K   answer without remembered examples, with them, or with the K nearest
/sources           the examples that were found for the last question
/teach PATH LINE   remember a picture by a line; quotes or backslashes for blanks in a path
/forget            forget all that was taught
/save DIR          write a new bank: the one in use, and what was taught
/clear             start anew with the same picture
/help              this list
/quit              leave, as Ctrl-D does; Ctrl-C stops an answer
Anything else is a question. Tab completes commands and paths."""
STEERING, HARMLESS = ("Cc", "Cf", "Cs"), set("\n\t\u200c\u200d")  # the last two join letters and emoji
PATH = re.compile(r"""("[^"]+"|'[^']+'|(?:\\ |\S)+)\s*(.*)""", re.DOTALL)


def chat(
    model: str,
    question: str | None = None,
    image: str | None = None,
    sources: bool = False,
    memory_bank: str | None = None,
    memory: str = "on",
    revision: str = "main",
    device: str = "auto",
    max_new_tokens: int = 256,
):
    """Answer one question, or chat until the user leaves; the arguments are those of `tinyalign chat --help`.
    ValueError if the picture cannot be read, or the model has a memory, but no bank is named.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 1 or more.")
    wants_bank = "on" if memory_bank is not None else memory  # which /memory on reads
    conversation = Conversation(
        *load_to_answer(model, revision, memory_bank, wants_bank, device), max_new_tokens=max_new_tokens
    )
    if image is not None:
        conversation.show(image)
    if question is None:
        bank = conversation.model.memory_bank if wants_bank == "on" else None
        TerminalChat(conversation, memory, sources).run(f"{model}, {bank or 'no memory bank'}.")
    elif sources:
        answer, rows = "".join(conversation.ask(question, memory=memory)), map(vars, conversation.sources)
        found = [{name: value for name, value in row.items() if name != "thumbnail"} for row in rows]
        answered = {"answer": answer, "sources": found, "none_right": conversation.none_right}
        print(json.dumps(answered, ensure_ascii=False))
    else:
        print_pieces(conversation.ask(question, memory=memory))


class TerminalChat:
    """A conversation in a terminal: lines are questions or commands."""

    def __init__(self, conversation: Conversation, memory: str = "on", always_sources: bool = False):
        self.conversation, self.always_sources = conversation, always_sources
        self.settings = {"memory": memory, "top_k": None}
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.image,
            "/memory": self.memory,
            "/sources": self.sources,
            "/teach": self.teach,
            "/forget": self.forget,
            "/save": self.save,
            "/clear": lambda rest: conversation.clear(),
            "/help": lambda rest: print(HELP),
            "/quit": lambda rest: sys.exit(),
        }

    def run(self, greeting: str):
        """Read lines until /quit or the end of the input; what is wrong is said, and the chat goes on."""
        prompt = ""
        if sys.stdin.isatty():
            prompt = "> "
            complete_lines(self.commands)
            print(f"{printable(greeting)} /image PATH shows it a picture, /help lists the commands.")
        while True:
            try:
                self.do(input(prompt).strip())
            except (EOFError, SystemExit):
                print()
                return
            except KeyboardInterrupt:
                print()
            except ERRORS as error:
                print(printable(str(error) or repr(error)))

    def do(self, line: str):
        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self.ask(line)
        elif command in self.commands:
            self.commands[command](rest.strip())
        else:
            raise ValueError(f"{command} is no command, expected one of {', '.join(self.commands)}.")

    def ask(self, question: str):
        """Print the answer to a question as it comes."""
        print_pieces(self.conversation.ask(question, **self.settings))
        if self.always_sources:
            self.sources()
        unknown = self.conversation.none_right
        if unknown is not None and unknown >= UNSURE:
            print(f"(I may not know this one: {unknown:.0%} that no example is right. /teach PATH LINE teaches it.)")

    def image(self, rest: str):
        self.conversation.show(split_path(rest, "/image PATH")[0])
        print("A picture of {} x {} pixels.".format(*self.conversation.image.size))

    def memory(self, rest: str):
        """Set whether, and from how many examples, it answers."""
        if rest not in ("on", "off") and not rest.isdecimal():
            raise ValueError(f"/memory is {rest!r}, expected off, on, or the number of examples.")
        if rest != "off":
            self.conversation.lessons.require_bank()
        top_k = int(rest) if rest.isdecimal() else None
        check_retrieval(self.conversation.model.config, None, top_k, None)
        self.settings = {"memory": "off" if rest == "off" else "on", "top_k": top_k}
        self.conversation.clear()  # earlier answers would be given again

    def sources(self, rest: str = ""):
        """Print the examples that were found for the last question."""
        for source in self.conversation.sources:
            print(printable(f"{source.caption}  ({', '.join(source.notes)})"))
        if not self.conversation.sources:
            print("No examples were read for the last answer.")

    def teach(self, rest: str):
        path, line = split_path(rest, "/teach PATH LINE")
        row = self.conversation.teach(path, line)
        print(f"Remembered: {printable(row['caption'])}")

    def forget(self, rest: str):
        count = self.conversation.forget()
        print(f"Forgot {count} {'lesson' if count == 1 else 'lessons'}.")

    def save(self, rest: str):
        folder, lessons = Path(split_path(rest, "/save DIR")[0]).expanduser(), self.conversation.lessons
        lessons.save(folder)
        count = f"{len(lessons)} {'lesson' if len(lessons) == 1 else 'lessons'}"
        print(f"Wrote a bank to {folder}: the one in use, and {count}.")


def split_path(text: str, usage: str) -> tuple[str, str]:
    """Return a path, without its quotes and backslashes, and what follows; ValueError says how a command is used."""
    match, has_line = PATH.fullmatch(text), usage.endswith("LINE")
    if match is None or (has_line and not match[2]):
        raise ValueError(f"Expected {usage}.")
    path, rest = match.groups()
    if path.startswith(("'", '"')):
        return path[1:-1], rest
    if not has_line:
        path, rest = text, ""  # blanks need no quotes where nothing follows
    return path.replace("\\ ", " "), rest


def print_pieces(pieces: Iterable[str]):
    """Print pieces of a text as they come, and end the line."""
    try:
        for piece in pieces:
            print(printable(piece), end="", flush=True)
    finally:
        print()


def printable(text: str) -> str:
    """Return a text without what would steer a terminal: models and banks may be anybody's."""
    steering = (letter for letter in set(text) - HARMLESS if unicodedata.category(letter) in STEERING)
    return text.translate(dict.fromkeys(map(ord, steering), "\ufffd"))


def complete_lines(commands: Iterable[str]):
    """Complete commands and paths with Tab. The history stays in memory."""
    if readline is None:
        return

    def complete(text: str, state: int) -> str | None:
        if readline.get_begidx() == 0:
            found = [f"{command} " for command in commands if command.startswith(text)]
        else:
            paths = sorted(glob(f"{escape(os.path.expanduser(text))}*"))
            found = [(f"{path}/" if os.path.isdir(path) else path).replace(" ", "\\ ") for path in paths]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
