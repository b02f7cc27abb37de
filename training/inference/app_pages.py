"""The three tabs of the app: what is on them, and what their buttons do."""

import contextlib
import html
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from .app_html import CARD_CLICK, Card, render_cards, render_view
from .conversation import ERRORS, UNSURE
from .lessons import Neighbour
from .uploads import read_lessons, read_picture
from .visitor import Shared, Visitor, Visitors

UPLOAD = {"sources": ["upload", "clipboard", "webcam"], "type": "filepath"}
LEAVE_OUT, ASK_IT, FORGET = "Ask again without {}", "Ask about this one", "Forget {}"
RESTS_ON = "What the answer rests on. Click one, and the question is asked again without it."


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Show what went wrong to the visitor, who goes on."""
    try:
        yield
    except ERRORS as error:
        raise gr.Error(words(error), print_exception=False) from error


def words(error: Exception) -> str:
    """Return as HTML what an error says, or its kind."""
    return html.escape(str(error) or repr(error))


def uploaded_path(path: str) -> Path:
    """Return the path of an upload; ValueError if it is another file's, which Gradio lets pass in a payload of a
    picture, or the file is gone.
    """
    path = Path(path or "").resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise ValueError("The file was not uploaded: upload it.")
    if not path.is_file():  # Gradio names files by content: of a visitor with the same picture, who has left
        raise ValueError("The file is here no longer: upload it again.")
    return path


class Pages:
    """Components of the page, and functions that Gradio calls with their values and a visitor's session.

    One function at a time uses the model, and so has the visitor's lessons to itself.
    """

    def __init__(self, shared: Shared):
        self.shared, self.visitors = shared, Visitors(shared)
        self.alone = {"concurrency_limit": 1, "concurrency_id": "model"}
        self.each = {"trigger_mode": "multiple", **self.alone}  # else what comes meanwhile is passed over

    def visitor(self, request: gr.Request) -> Visitor:
        if request.session_hash is None:  # else all who have none would be one visitor
            raise gr.Error("The request has no session_hash, expected one for each visitor.", print_exception=False)
        return self.visitors[request.session_hash]

    def leave(self, request: gr.Request):
        """Free what a visitor who closes the page has asked, taught and uploaded."""
        self.visitors.leave(request.session_hash)

    def uploaded(self, picture: dict | None, visitor: Visitor) -> Image.Image | None:
        """Return an uploaded picture, whose file is deleted when its visitor forgets or leaves."""
        if not picture:
            return None
        path = uploaded_path(picture["path"])
        visitor.files.add(path)
        return read_picture(path)

    # ------------------------------------------------------------------ Ask

    def ask_tab(self):
        with gr.Row():
            with gr.Column(scale=2, min_width=240):
                self.picture = gr.Image(label="Picture", height=260, elem_id="picture", **UPLOAD)
                examples = [Card(str(number), "", image) for number, image in enumerate(self.shared.examples)]
                self.examples = gr.HTML(render_cards(examples, ASK_IT, small=True), js_on_load=CARD_CLICK)
            with gr.Column(scale=5):
                with gr.Row():
                    # text as it is: Markdown of a model or bank could show pictures of other hosts
                    looks = {"height": 300, "render_markdown": False, "buttons": []}
                    memory = self.shared.has_memory
                    self.with_memory = gr.Chatbot(label="With memory", visible=memory, elem_id="with", **looks)
                    self.without = gr.Chatbot(label="Without memory", elem_id="without", **looks)
                self._question()
        self._settings()

    def _question(self):
        with gr.Row(equal_height=True):
            looks = {"show_label": False, "container": False, "max_length": 2000}
            placeholder = f"Ask: {self.shared.question}"
            self.question = gr.Textbox(label="Question", placeholder=placeholder, scale=5, elem_id="question", **looks)
            self.ask_button = gr.Button("Ask", variant="primary", elem_id="ask")
        with gr.Row(visible=False, equal_height=True, elem_id="unknown") as self.unknown:
            teaches = self.shared.allows("teach")
            self.unknown_text = gr.Markdown()
            self.line = gr.Textbox(
                label="What is it?", placeholder="What is it?", visible=teaches, elem_id="line", **looks
            )
            self.teach_this_button = gr.Button("Teach it", visible=teaches, elem_id="teach-this", scale=0)
        self.gallery = gr.HTML(js_on_load=CARD_CLICK, elem_id="gallery", visible=self.shared.has_memory)

    def _settings(self):
        most, threshold = self.shared.model.config.memory_top_k, self.shared.model.config.retrieval_threshold or 0
        read = max(1, most)  # Gradio refuses what is out of a slider's range, a hidden one's, too
        with gr.Row(visible=self.shared.has_memory):
            self.top_k = gr.Slider(
                1, max(2, most), read, step=1, label="Neighbours that are read", visible=most > 1, elem_id="top-k"
            )
            label = "Similarity below which none is read"
            self.threshold = gr.Slider(min(0, threshold), 1, threshold, step=0.01, label=label, elem_id="threshold")
            self.compare = gr.Checkbox(True, label="Answer without memory, too", elem_id="compare")
            self.put_back = gr.Button("Put back what was left out", visible=False, elem_id="put-back")

    def look(self, picture: dict | None, request: gr.Request) -> list:
        """Talk about an uploaded picture, or none."""
        visitor = self.visitor(request)
        visitor.look_at(None)
        try:
            visitor.look_at(self.uploaded(picture, visitor))
        except ERRORS as error:  # the page shows no longer what was said of another picture
            gr.Warning(words(error), title="Error")
        return self.everything(visitor)

    def start_over(self, request: gr.Request) -> list:
        """Forget what was said about the picture."""
        visitor = self.visitor(request)
        visitor.look_at(visitor.with_memory.image)
        return self.everything(visitor)

    def look_at_example(self, event: gr.EventData, request: gr.Request) -> list:
        """Talk about one of the examples."""
        visitor, number = self.visitor(request), int(event.row)
        image = self.shared.examples[number % len(self.shared.examples)]
        visitor.look_at(image)
        return [image, *self.everything(visitor)]

    def ask(self, question: str, top_k: float, threshold: float, compare: bool, request: gr.Request) -> Iterator[list]:
        """Answer, with memory and without; the parts of the page change as the answer grows."""
        visitor = self.visitor(request)
        with in_words():
            for _ in visitor.ask(question, int(top_k), threshold, compare):
                yield [*self.chats(visitor), *[gr.skip()] * 4]
        yield self.everything(visitor)

    def without_asked(self, text: str, request: gr.Request) -> str:
        """Return what the question's box has, but for the question that was answered: another may be there by now."""
        return "" if text.strip() == self.visitor(request).last_question() else text

    def ask_again(self, top_k: float, threshold: float, compare: bool, request: gr.Request) -> Iterator[list]:
        """Ask the last question anew, as another turn."""
        yield from self.ask(self.visitor(request).last_question(), top_k, threshold, compare, request)

    def leave_out(
        self, top_k: float, threshold: float, compare: bool, event: gr.EventData, request: gr.Request
    ) -> Iterator[list]:
        """Ask the last question anew without an example that was clicked, in place of the last turn."""
        visitor = self.visitor(request)
        visitor.left_out.append(str(event.row)[:32])
        yield from self.ask(visitor.take_back(), top_k, threshold, compare, request)

    def use_all(self, top_k: float, threshold: float, compare: bool, request: gr.Request) -> Iterator[list]:
        """Ask the last question anew with all examples."""
        visitor = self.visitor(request)
        visitor.left_out = []
        yield from self.ask(visitor.take_back(), top_k, threshold, compare, request)

    def everything(self, visitor: Visitor) -> list:
        """Return what the Ask tab shows: conversations, the doubt, the examples, and whether some were left out."""
        none_right = visitor.with_memory.none_right
        doubt, text = none_right is not None and none_right >= UNSURE, ""
        if doubt:
            text = f"**I do not know this one.** No example is likely right (none is with {none_right:.0%})."
        cards = render_cards(list(map(source_card, visitor.with_memory.sources)), LEAVE_OUT, RESTS_ON)
        left_out = gr.update(visible=bool(visitor.left_out))
        return [*self.chats(visitor), gr.update(visible=doubt), text, cards, left_out]

    def chats(self, visitor: Visitor) -> list[list[dict]]:
        return [conversation(visitor.turns, answer) for answer in (1, 2)]

    # ------------------------------------------------------------------ Teach

    def teach_tab(self):
        teaches = self.shared.allows("teach")
        if not teaches:
            gr.Markdown("Teaching is off here. Whoever runs the app can switch it on: `--visitors_may teach`.")
        with gr.Row(visible=teaches):
            with gr.Column(min_width=240):
                self.new_picture = gr.Image(label="Picture", height=260, elem_id="new-picture", **UPLOAD)
                self.new_line = gr.Textbox(label="What is it?", max_length=2000, elem_id="new-line")
                self.teach_button = gr.Button("Remember it", variant="primary", elem_id="teach-button")
                gr.Markdown("Or many at once: pictures with a CSV whose columns are `image` and `caption`.")
                with gr.Row():
                    self.zip = gr.UploadButton("A zip file", file_types=[".zip"], elem_id="zip")
                    self.folder = gr.UploadButton("A folder", file_count="directory", elem_id="folder")
            with gr.Column(scale=2):
                self.said = gr.Markdown("Nothing was taught yet.", elem_id="said")
                self.lessons = gr.HTML(js_on_load=CARD_CLICK, elem_id="lessons")
                self.forget_button = gr.Button("Forget all", elem_id="forget-all")
                with gr.Row(visible=self.shared.allows("save"), equal_height=True):
                    self.name = gr.Textbox(label="Save with the bank's rows as", placeholder="my-bank", elem_id="name")
                    self.save_button = gr.Button("Save", elem_id="save")
                    self.repository = gr.Textbox(label="Or push to", placeholder="me/my-bank", elem_id="repository")
                    self.push_button = gr.Button("Push", elem_id="push")

    def teach(self, picture: dict | None, line: str, request: gr.Request) -> list:
        visitor = self.visitor(request)
        with in_words():
            visitor.teach(self.uploaded(picture, visitor), str(line))
        return [None, "", *self.taught(visitor)]

    def teach_this(self, line: str, request: gr.Request) -> list:
        """Remember the picture that the conversation is about."""
        visitor = self.visitor(request)
        with in_words():
            visitor.teach(visitor.with_memory.image, line)
        return ["", *self.taught(visitor)]

    def teach_many(self, files: str | list[str], request: gr.Request) -> list:
        """Remember the pictures of a zip file or a folder, up to the first that is bad; the files are deleted."""
        visitor, before = self.visitor(request), len(self.visitor(request).lessons)
        with in_words():
            paths = [uploaded_path(path) for path in (files if isinstance(files, list) else [files])]
        problem = ""
        try:
            visitor.check_allowed("teach")
            for picture, line in read_lessons(paths):
                visitor.teach(picture, line)
        except ERRORS as error:
            problem = f" Then: {words(error)}"
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        said, cards = self.taught(visitor)
        return [f"{len(visitor.lessons) - before} new. {said}{problem}", cards]

    def forget(self, event: gr.EventData, request: gr.Request) -> list:
        return self._forget(str(event.row), request)

    def forget_all(self, request: gr.Request) -> list:
        return self._forget(None, request)

    def _forget(self, source_id: str | None, request: gr.Request) -> list:
        visitor = self.visitor(request)
        visitor.forget(source_id)
        return [*self.taught(visitor), None, None, None, "", "", *self.everything(visitor)]

    def taught(self, visitor: Visitor) -> list[str]:
        """Return how much was taught, and the cards of it."""
        rows = visitor.lessons.rows
        cards = [Card(row["source_id"], row["caption"], row["thumbnail"], ("click to forget",)) for row in rows]
        said = f"{len(rows)} remembered, for you alone and until you leave." if rows else "Nothing was taught yet."
        return [said, render_cards(cards, FORGET)]

    def save(self, name: str, request: gr.Request) -> str:
        with in_words():
            return f"Saved as {html.escape(str(self.visitor(request).save(name)))}."

    def push(self, repository: str, request: gr.Request) -> str:
        with in_words():
            return f"Pushed to {html.escape(self.visitor(request).push(repository))}."

    # ------------------------------------------------------------------ Bank

    def bank_tab(self, tab: gr.Tab):
        """Lay out the search, and the view of the bank, which is made when the tab is opened first."""
        with gr.Row():
            with gr.Column(min_width=240):
                self.text = gr.Textbox(label="Search captions", max_length=200, elem_id="text")
                self.wanted = gr.Image(label="Search by picture", height=200, elem_id="wanted", **UPLOAD)
            with gr.Column(scale=3):
                self.found = gr.HTML(elem_id="found")
        self.view = gr.HTML(elem_id="view")
        tab.select(self.view_bank, None, self.view, **self.alone)

    def view_bank(self) -> str:
        """Return the map of the keys and the similarities, as `tinyalign bank view` has them."""
        return render_view(self.shared.model.memory_bank)

    def find_caption(self, text: str, request: gr.Request) -> str:
        with in_words():
            rows = self.visitor(request).find_caption(text) if text.strip() else []
        return render_cards([Card("", row["caption"], row["thumbnail"]) for row in rows])

    def find_picture(self, picture: dict | None, request: gr.Request) -> str:
        """Return the rows that are most like an uploaded picture."""
        visitor, found = self.visitor(request), []
        with in_words():
            wanted = self.uploaded(picture, visitor)
            if wanted is not None:
                found = visitor.find_picture(wanted)
        return render_cards(list(map(source_card, found)))

    # ------------------------------------------------------------------ what calls what

    def connect(self):
        page = [self.with_memory, self.without, self.unknown, self.unknown_text, self.gallery, self.put_back]
        settings = [self.top_k, self.threshold, self.compare]
        # unread: Gradio would open the file itself, with whatever program PIL has for it
        unread = {"preprocess": False, **self.alone}
        last = {**unread, "trigger_mode": "always_last"}
        self.picture.input(self.look, self.picture, page, **last)
        self.examples.click(self.look_at_example, None, [self.picture, *page], api_name=False, **self.each)
        cleared = [self.with_memory.clear, self.without.clear]
        gr.on(cleared, self.start_over, None, page, **self.alone)
        questions = [self.ask_button.click, self.question.submit]
        asked = gr.on(questions, self.ask, [self.question, *settings], page, **self.alone)
        asked.success(self.without_asked, self.question, self.question, api_name=False)
        self.compare.change(lambda shown: gr.update(visible=shown), self.compare, self.without, api_name=False)
        self.gallery.click(self.leave_out, settings, page, api_name=False, **self.each)
        self.put_back.click(self.use_all, settings, page, **self.alone)
        if self.shared.has_memory:
            self._connect_lessons(page, settings, unread)
            self.text.change(self.find_caption, self.text, self.found, **self.alone)
            self.wanted.input(self.find_picture, self.wanted, self.found, **last)

    def _connect_lessons(self, page: list, settings: list, unread: dict):
        taught = [self.said, self.lessons]
        forgotten = [*taught, self.picture, self.new_picture, self.wanted, self.text, self.found, *page]
        named = [self.teach_this_button.click, self.line.submit]
        known = gr.on(named, self.teach_this, self.line, [self.line, *taught], **self.alone)
        known.success(self.ask_again, settings, page, api_name=False, **self.alone)
        inputs, given = [self.new_picture, self.new_line], [self.teach_button.click, self.new_line.submit]
        gr.on(given, self.teach, inputs, [*inputs, *taught], **unread)
        for button in (self.zip, self.folder):
            button.upload(self.teach_many, button, taught, **self.each)
        self.lessons.click(self.forget, None, forgotten, api_name=False, **self.each)
        self.forget_button.click(self.forget_all, None, forgotten, **self.alone)
        self.save_button.click(self.save, self.name, self.said, **self.alone)
        self.push_button.click(self.push, self.repository, self.said, **self.alone)


def source_card(source: Neighbour) -> Card:
    """Return a neighbour as a card: how similar, how likely right, and whether it was read."""
    kind = "yours" if source.lesson else ""
    return Card(source.source_id, source.caption, source.thumbnail, source.notes, kind if source.used else "unused")


def conversation(turns: list[list[str]], answer: int) -> list[dict]:
    """Return turns as messages of a chat, with the first or the second of their answers, if there is one."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn[0]})
        if turn[answer]:
            messages.append({"role": "assistant", "content": turn[answer]})
    return messages
