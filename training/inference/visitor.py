"""A visitor of the app, and the parts that all visitors share."""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ...hub_cards.facts import FACTS_NAME, read_facts
from ..models import load_to_answer
from .answers import LOCK
from .conversation import ERRORS, KEPT_TURNS, Conversation
from .lessons import Lessons, Neighbour
from .pictures import Pictures
from .uploads import read_picture

MAY = ("ask", "teach", "save")
MAX_VISITORS = 64
MAX_TAUGHT = 500  # of a visitor
MAX_QUESTION = 2000  # letters, and of a line that is taught
ANSWER_TOKENS = 64
FOUND = 24  # results of a search in the bank
QUESTION = "What is this?"
EVERYTHING = -1.0  # the threshold that no neighbour is below


@dataclass
class Shared:
    """The parts that visitors share.

    Attributes:
        name: the model's, as it is shown.
        may: one of `MAY`: what visitors may do, and all before it.
        question: asked where a visitor writes none.
        problem: why there is no memory, or None.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str
    may: str = "save"
    question: str = QUESTION
    problem: str | None = None
    examples: list[Image.Image] = field(default_factory=list)

    def __post_init__(self):
        self.pictures = Pictures(self.model)

    @property
    def has_memory(self) -> bool:
        return self.problem is None

    def allows(self, action: str) -> bool:
        return MAY.index(action) <= MAY.index(self.may)


def load_shared(name: str, revision: str, memory_bank: str | None, device: str, **settings) -> Shared:
    """Load a model, and its bank if there is one that fits it; else `problem` says why there is none."""
    model, processor = load_to_answer(name, revision, memory="off", device=device)
    shared = Shared(model, processor, Path(name).name, **settings)
    try:
        if model.config.memory_top_k == 0:
            raise ValueError(f"{name} was trained without memory (its memory_top_k is 0).")
        if memory_bank is not None:
            model.attach_memory_bank(memory_bank, tokenizer=processor.tokenizer)
        if model.memory_bank is None:
            raise ValueError("No memory bank was named: start the app with --memory_bank FOLDER_OR_REPOSITORY.")
    except (ValueError, OSError, ImportError) as error:
        model.detach_memory_bank()
        shared.problem = str(error)
    if Path(name, FACTS_NAME).is_file() and "question" not in settings:
        shared.question = read_facts(name).example.prompt
    shared.examples = list(examples_of(name, model))
    return shared


def examples_of(name: str, model: PreTrainedModel, count: int = 8) -> Iterator[Image.Image]:
    """Yield pictures to begin with: the example of the checkpoint's card, and thumbnails of the bank."""
    picture = Path(name, "example.png")
    if picture.is_file():
        with contextlib.suppress(ValueError):  # a checkpoint is anybody's
            yield read_picture(picture)
            count -= 1
    bank = model.memory_bank
    if bank is not None and bank.config.thumbnail_size is not None:
        for row in np.random.default_rng(0).permutation(len(bank))[:count].tolist():
            yield bank.thumbnail(row)


class Visitor:
    """The picture, the conversation and the lessons of one visitor.

    Attributes:
        turns: `[question, answer with memory, answer without]`, as shown: the conversations forget theirs when
            something is taught.
        left_out: source_ids of neighbours that the visitor does not want to be read.
        files: pictures that were uploaded, which the page may still show.
    """

    def __init__(self, shared: Shared):
        self.shared = shared
        self.lessons = Lessons(shared.model, shared.processor, pictures=shared.pictures)
        self.with_memory, self.without = (
            Conversation(shared.model, shared.processor, self.lessons, max_new_tokens=ANSWER_TOKENS) for _ in range(2)
        )
        self.turns: list[list[str]] = []
        self.left_out: list[str] = []
        self.files: set[Path] = set()

    def look_at(self, picture: Image.Image | None):
        """Talk about another picture, or none, from now on."""
        self.turns, self.left_out = [], []
        for conversation in (self.with_memory, self.without):
            conversation.clear()
            conversation.image = picture

    def ask(self, question: str, top_k: int | None, threshold: float, compare: bool) -> Iterator[None]:
        """Answer a question in `turns`, yielding after each piece: with memory, then without."""
        question = question.strip()[:MAX_QUESTION] or self.shared.question
        if self.with_memory.image is None:
            raise ValueError("There is no picture yet: upload one, or click one of the examples.")
        turn = [question, "", ""]
        self.turns = [*self.turns, turn][-KEPT_TURNS:]
        try:
            if self.shared.has_memory:
                threshold = threshold if threshold > 0 else EVERYTHING  # not None, which is the model's own
                settings = {"top_k": top_k, "retrieval_threshold": threshold, "exclude": self.left_out}
                for piece in self.with_memory.ask(question, **settings):
                    turn[1] += piece
                    yield
            if compare or not self.shared.has_memory:
                for piece in self.without.ask(question, memory="off"):
                    turn[2] += piece
                    yield
        except ERRORS:
            self.turns = [shown for shown in self.turns if shown is not turn]
            raise

    def last_question(self) -> str:
        """Return the question that was asked last, blank if there is none."""
        return self.turns[-1][0] if self.turns else ""

    def take_back(self) -> str:
        """Return the last question, and forget it with its answers: it will be asked anew."""
        question, *answers = self.turns.pop() if self.turns else [""]
        for conversation, answer in zip((self.with_memory, self.without), answers, strict=False):
            if conversation.turns[-1:] == [(question, answer)]:
                conversation.turns.pop()
        return question

    def teach(self, picture: Image.Image | None, line: str):
        """Remember a picture by a line; `ValueError` says why not."""
        self.check_allowed("teach")
        if picture is None:
            raise ValueError("There is no picture to remember: upload one first.")
        if len(self.lessons) >= MAX_TAUGHT:
            raise ValueError(
                f"You have taught {MAX_TAUGHT} pictures, expected no more: forget some, or save the bank."
            )
        if len(line) > MAX_QUESTION:
            raise ValueError(f"The line has {len(line)} letters, expected at most {MAX_QUESTION}: make it shorter.")
        row = self.with_memory.teach(picture, line.strip())
        self.left_out = [source_id for source_id in self.left_out if source_id != row["source_id"]]

    def forget(self, source_id: str | None = None):
        """Forget one lesson or all, the conversation, which may have spoken of it, and uploads, which may show it."""
        self.lessons.forget(source_id)
        self.look_at(None)
        for path in list(self.files):  # another thread may add one
            path.unlink(missing_ok=True)
        self.files.clear()

    def save(self, name: str) -> Path:
        """Write a new bank with the lessons into a folder below the current one, and return it."""
        self.check_allowed("save")
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise ValueError(f"The name is {name[:100]!r}, expected letters, digits, dots and dashes: my-bank, say.")
        self.lessons.save(name)
        return Path(name).resolve()

    def push(self, repo_id: str) -> str:
        """Upload such a bank to the Hub, and return its address."""
        self.check_allowed("save")
        try:
            return self.lessons.push(repo_id.strip()).repo_url.url
        except Exception as error:  # the Hub's client has errors of its own, and of httpx
            raise ValueError(
                f"The bank was not pushed to {repo_id!r:.100} ({error!r}), expected a repository that you may write "
                "to: check the name, your token and the network."
            ) from error

    def find_caption(self, text: str) -> list[dict]:
        """Return rows of lessons and bank whose caption has this text, `{"caption", "thumbnail", "source_id"}`."""
        text, bank = text.strip().lower(), self.shared.model.memory_bank
        found = [row for row in self.lessons.rows if text in row["caption"].lower()]
        ids = [number for number, caption in enumerate(bank.captions) if text in caption.lower()][:FOUND]
        rows = [{**row, "thumbnail": bank.thumbnail(row["id"])} for row in bank.rows(ids)]
        return (found + rows)[:FOUND]

    def find_picture(self, picture: Image.Image) -> list[Neighbour]:
        """Return the rows of bank and lessons whose keys are most like that of a picture."""
        if self.shared.model.config.key_space != "vision":
            raise ValueError("This bank is searched by picture and question together: ask about the picture.")
        with LOCK:
            return self.lessons.neighbours(self.lessons.look_at(picture), FOUND, {})[0]

    def check_allowed(self, action: str):
        """Raise `ValueError` for what visitors may not do here."""
        if not self.shared.allows(action):
            raise ValueError(
                f"Visitors may not {action} here: whoever runs the app can allow it, --visitors_may {action}."
            )
        if not self.shared.has_memory:
            raise ValueError(f"There is no memory to teach. {self.shared.problem}")


class Visitors:
    """The visitors by their session, the last `MAX_VISITORS` of them."""

    def __init__(self, shared: Shared):
        self.shared = shared
        self._visitors: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def __getitem__(self, session: Any) -> Visitor:
        with self._lock:
            visitor = self._visitors.pop(session, None) or Visitor(self.shared)
            self._visitors[session] = visitor  # as the last
            too_many = list(self._visitors)[:-MAX_VISITORS]
        for oldest in too_many:
            self.leave(oldest)
        return visitor

    def leave(self, session: Any):
        """Forget a visitor, and all that was taught, asked and uploaded."""
        with self._lock:
            visitor = self._visitors.pop(session, None)
        if visitor is not None:
            visitor.forget()
