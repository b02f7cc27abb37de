"""`tinyalign chat`, in a pseudo-terminal as a user has it, and its single answers."""

import builtins
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from isolation import set_hf_home

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.inference import chat as chat_module
from tinyalign_vlm.training.inference.chat import TerminalChat, printable, split_path
from tinyalign_vlm.training.inference.conversation import Conversation

from .conftest import QUESTION, generated

SECONDS = 120  # to wait for a line, on a busy machine


@pytest.fixture(scope="module")
def folder(parts, images, tmp_path_factory) -> Path:
    """`model`, `bank`, and the pictures `0.png`, which the bank has, and `new one.png`."""
    folder = tmp_path_factory.mktemp("chat")
    parts.model.save_pretrained(folder / "model")
    parts.processor.save_pretrained(folder / "model")
    parts.bank.save_pretrained(folder / "bank")
    images[0].save(folder / "0.png")
    images[9].save(folder / "new one.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, command: list[str], folder: Path):
        self._terminal, inside = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "HOME": str(folder / "home"), "HF_HOME": str(folder / "hf")}
        files = {"stdin": inside, "stdout": inside, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **files, start_new_session=True)
        os.close(inside)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """Return what was shown up to this text."""
        deadline = time.monotonic() + SECONDS
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._terminal, 4096).decode().replace("\r\n", "\n")
        before, _, self.shown = self.shown.partition(text)
        return before

    def do(self, line: str) -> str:
        """Type a line; return what is shown before the next prompt."""
        os.write(self._terminal, line.encode() + b"\n")
        self.wait_for("\n")  # the line itself
        return self.wait_for("> ").strip()


def test_a_chat_in_a_terminal(parts, images, folder):
    (folder / "home").mkdir()
    command = [sys.executable, "-m", "tinyalign_cli", "chat", "model", "--memory_bank", "bank", "--device", "cpu"]
    terminal = Terminal([*command, "--max_new_tokens", "6"], folder)
    greeting = terminal.wait_for("> ")
    assert "model, MemoryBank(8 rows" in greeting and "/help lists the commands" in greeting
    assert terminal.do("/image 0.pn\t").strip() == "A picture of 5 x 6 pixels."  # completed
    first = terminal.do(QUESTION)
    assert first == generated(parts, images[0], parts.bank, QUESTION)
    assert terminal.do("and now?") == generated(parts, images[0], parts.bank, QUESTION, first, "and now?")
    assert terminal.do("/sources").startswith("a red square 0  (similarity 1.00)\n")
    assert terminal.do("/memory off") == ""
    assert terminal.do(QUESTION) == generated(parts, images[0], parts.bank, QUESTION, memory="off")
    assert terminal.do("/memory 1") == ""
    assert terminal.do(QUESTION) == generated(parts, images[0], parts.bank, QUESTION, memory_top_k=1)
    assert "memory_top_k is 7, expected 0 to the model's 2" in terminal.do("/memory 7")
    assert "the image cannot be read" in terminal.do("/image broken.png")
    assert "'none.png' is no file" in terminal.do("/teach none.png a cat")
    assert terminal.do('/teach "new one.png" it\'s a zorblax') == "Remembered: it's a zorblax"
    terminal.do("/image new one.png")
    terminal.do(QUESTION)
    assert terminal.do("/sources") == "it's a zorblax  (similarity 1.00, taught by you)"
    assert terminal.do("/save saved") == "Wrote a bank to saved: the one in use, and 1 lesson."
    assert terminal.do("/forget") == "Forgot 1 lesson."
    terminal.do(QUESTION)
    assert "zorblax" not in terminal.do("/sources")
    assert "/teach PATH LINE" in terminal.do("/help")
    os.write(terminal._terminal, b"/quit\n")
    assert terminal.process.wait(SECONDS) == 0
    assert list((folder / "home").iterdir()) == []  # no history
    assert "it's a zorblax" in MemoryBank.from_pretrained(folder / "saved").captions


def test_one_answer(parts, images, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    set_hf_home(monkeypatch, folder / "hf")
    command = ["chat", "model", "--memory_bank", "bank", "--image", "0.png", "--max_new_tokens", "6"]
    main([*command, QUESTION])
    answer = generated(parts, images[0], parts.bank, QUESTION)
    assert capsys.readouterr().out == f"{answer}\n"
    main(["chat", "model", QUESTION, *command[2:], "--sources"])
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == answer and found["none_right"] is None
    assert found["sources"][0] == {
        "id": 0,
        "similarity": pytest.approx(1, abs=1e-4),
        "caption": "a red square 0",
        "source_id": parts.bank.rows([0])[0]["source_id"],
        "lesson": False,
        "used": True,
        "probability": None,
    }
    main([*command, "--memory", "off", QUESTION])
    assert capsys.readouterr().out == generated(parts, images[0], parts.bank, QUESTION, memory="off") + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png"], "'none.png' is no file"),
        (["--image", "broken.png"], "the image cannot be read"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0, expected 1 or more"),
    ],
)
def test_what_ends_it(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    set_hf_home(monkeypatch, folder / "hf")
    with pytest.raises(SystemExit, match=message):
        main(["chat", "model", "--memory_bank", "bank", QUESTION, *arguments])


def test_without_a_bank_it_says_what_to_do(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="names no memory bank: pass --memory_bank"):
        main(["chat", "model", QUESTION])
    say(monkeypatch, "/memory on", "/memory 1", "/teach 0.png a cat", "/save here", "what?", "/sources")
    main(["chat", "model", "--memory", "off", "--max_new_tokens", "2"])
    lines = capsys.readouterr().out.splitlines()
    message = "There is no memory bank: pass --memory_bank, attach one, or answer with memory off."
    assert lines[:4] == [message] * 4
    assert lines[5] == "No examples were read for the last answer."


def say(monkeypatch, *lines):
    """Type these lines, and the end of the input."""
    typed = iter(lines)

    def next_line(prompt: str) -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", next_line)


def test_it_goes_on(parts, images, folder, monkeypatch, capsys):
    """After errors of every kind, and Ctrl-C at the prompt and in an answer."""
    monkeypatch.chdir(folder)
    conversation = Conversation(parts.model, parts.processor, max_new_tokens=2)
    pieces = conversation.ask

    def broken(question, **settings):
        if question == "stop":
            raise KeyboardInterrupt
        if question == "memory":
            raise MemoryError("out of memory")
        return pieces(question, **settings)

    monkeypatch.setattr(conversation, "ask", broken)
    lines = ["/imag 0.png", "/image", "/teach 0.png", "/memory some", "stop", KeyboardInterrupt(), "memory", ""]
    say(monkeypatch, *lines, "caf\udce9?", "/forget", "/clear", "/save 0.png", QUESTION)
    TerminalChat(conversation).run("")
    shown = capsys.readouterr().out
    for text in (
        "/imag is no command, expected one of /image, ",
        "Expected /image PATH.",
        "Expected /teach PATH LINE.",
    ):
        assert text in shown
    for text in ("/memory is 'some', expected off, on, or", "out of memory", "Forgot 0 lessons.", "0.png"):
        assert text in shown
    assert "The question has half a character" in shown
    assert conversation.turns[0][0] == QUESTION


def test_it_says_that_it_may_not_know(parts, monkeypatch, capsys):
    conversation = Conversation(parts.model, parts.processor)

    def ask(question, **settings):
        conversation.none_right = float(question)
        return iter(["a c", "at"])

    monkeypatch.setattr(conversation, "ask", ask)
    say(monkeypatch, "0.3", "0.83")
    TerminalChat(conversation).run("")
    answers = [
        "a cat",
        "a cat",
        "(I may not know this one: 83% that no example is right. /teach PATH LINE teaches it.)",
    ]
    assert capsys.readouterr().out.strip().splitlines() == answers


def test_nothing_steers_the_terminal(capsys):
    assert printable("a\x1b[2J\x07cat\n\u009b1m") == "a\ufffd[2J\ufffdcat\n\ufffd1m"
    for text in ("چای\u200cخانه", "日本\u3000語", "4\u202f%", "\U0001f468\u200d\U0001f469\u200d\U0001f467"):
        assert printable(text) == text
    chat_module.print_pieces(iter(["\x1b]0;title", "ok"]))
    assert capsys.readouterr().out == "\ufffd]0;titleok\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png a cat", ("a.png", "a cat")),
        ('"my cat.png" a cat', ("my cat.png", "a cat")),
        ("'my cat.png' it's a cat", ("my cat.png", "it's a cat")),
        (r"my\ cat.png a cat", ("my cat.png", "a cat")),
        ("it's.png a cat", ("it's.png", "a cat")),
    ],
)
def test_paths_with_blanks(text, expected):
    assert split_path(text, "/teach PATH LINE") == expected
    path = text.removesuffix(expected[1]).strip()
    assert split_path(path, "/image PATH") == (expected[0], "")


def test_a_path_alone_needs_no_quotes():
    assert split_path("my cat.png", "/image PATH") == ("my cat.png", "")
