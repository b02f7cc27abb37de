"""`tinyalign app` in a real browser, and as strangers may talk to it.

Set TINYALIGN_SCREENSHOTS to a folder, and a story leaves a picture of each tab there; with TINYALIGN_DEMO, the folder
that `make demo` wrote, so does a story with its model, and those are the pictures of docs/app.md.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import psutil
import pyarrow.parquet as pq
import pytest
from browsers import open_browser
from PIL import Image

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.hub_cards.cards import write_space
from tinyalign_vlm.hub_cards.facts import ModelFacts
from tinyalign_vlm.modeling_tinyalign.bank_format import CalibrationConfig
from tinyalign_vlm.training.inference import visitor as visitor_module
from tinyalign_vlm.training.inference.lessons import Lessons
from tinyalign_vlm.training.inference.visitor import Shared, Visitor, Visitors, load_shared

from .conftest import png

BrowserTimeout = pytest.importorskip("playwright.sync_api", reason="pip install playwright").TimeoutError
gradio_client = pytest.importorskip("gradio_client", reason="pip install tinyalign-vlm[app]")
from tinyalign_vlm.training.inference import app as app_module  # noqa: E402
from tinyalign_vlm.training.inference import app_pages  # noqa: E402

# absolute, because a fixture goes elsewhere
DEMO, SCREENSHOTS = (
    os.path.abspath(os.environ[name]) if name in os.environ else None
    for name in ("TINYALIGN_DEMO", "TINYALIGN_SCREENSHOTS")
)
NAME = "zyxgrumbl"  # no model knows it
TURNS = ".message-row.user-row"  # of both conversations
PATIENCE = 240_000  # milliseconds
SLOWLY = {"timeout": 120}


@pytest.fixture(scope="module")
def shared(parts, images):
    """The tiny model, whose bank is sure of its own pictures and of no others."""
    bank, processor = parts.bank, parts.processor
    found = parts.model.retrieve(images[8:], top_k=1).scores
    middle = (1 + float(found.max())) / 2
    weights = {"right": [-200 * middle, 200.0, 0.0, 0.0], "none": [200 * middle, -200.0, 0.0, 0.0]}
    parts.model.attach_memory_bank(bank.with_calibration(CalibrationConfig(2, len(bank), **weights)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visitor_module, "ANSWER_TOKENS", 4)
        yield Shared(parts.model, processor, "tiny", question="what is it?", examples=images[:8])
    parts.model.attach_memory_bank(bank)


@pytest.fixture(scope="module")
def app(shared, tmp_path_factory):
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))  # banks are saved there
    with app_module.serving(shared) as app:
        yield app
    os.chdir(before)


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


class Page:
    """The app in a browser, and what a person does there."""

    def __init__(self, browser, url: str):
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.requests, self.problems = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#ask")

    def open(self, tab: str):
        self.page.get_by_role("tab", name=tab).click()

    def upload(self, where: str, content: bytes, name: str = "picture.png"):
        remove = self.page.locator(f"{where} button[aria-label='Remove Image']")
        if remove.count():
            remove.click()
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        # a picture to teach is only uploaded; one to look at, or to search with, is then sent to the app
        sent = (lambda one: "/upload?" in one.url) if where == "#new-picture" else (lambda one: is_sent(one, name))
        with self.page.expect_response(sent):
            self.page.set_input_files(f"{where} input[type=file]", file)
        if where == "#picture":  # a new conversation
            self.wait(f"!document.querySelector('{TURNS}')")
        self.settle()

    def ask(self, question: str = ""):
        turns = self.page.locator(TURNS).count()
        for _ in range(4):  # on a busy machine the app may look at a new picture after the question, and starts anew
            self.page.fill("#question textarea", question)
            self.page.click("#ask")
            with contextlib.suppress(BrowserTimeout):
                answered = f"document.querySelectorAll('{TURNS}').length > {turns}"
                self.page.wait_for_function(answered, timeout=PATIENCE / 4)
                break
        self.settle()

    def settle(self):
        """Wait until no function of the app runs any more."""
        self.page.wait_for_timeout(300)
        self.wait("!document.querySelector('[data-testid=status-tracker].translucent:not(.hide)')")
        self.page.wait_for_timeout(300)

    def wait(self, condition: str):
        self.page.wait_for_function(condition)

    def until(self, where: str, text: str, gone: bool = False):
        """Wait until a part of the page has a text, or has it no more."""
        self.wait(f"document.querySelector('{where}').innerText.includes({text!r}) != {str(gone).lower()}")

    def cards(self, where: str = "#gallery") -> list[str]:
        return self.page.locator(f"{where} .cards > *").all_inner_texts()

    def toast(self) -> str:
        """The words of the message that has popped up, which is closed."""
        text = self.page.locator(".toast-body").first.inner_text()
        self.page.locator(".toast-close").first.click()
        self.page.locator(".toast-body").first.wait_for(state="detached")
        return text

    def shoot(self, name: str):
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            picture = Image.open(io.BytesIO(self.page.screenshot(full_page=True)))
            picture.convert("RGB").quantize(256).save(Path(SCREENSHOTS, f"{name}.png"), optimize=True)


def is_sent(response, name: str) -> bool:
    """Tell whether a function of the app was called with an upload of this name."""
    return "/queue/join" in response.url and name in (response.request.post_data or "")


def files_with(folder: Path, content: bytes) -> list[str]:
    """The files below a folder that have these bytes in them."""
    return [str(path) for path in Path(folder).rglob("*") if path.is_file() and content in path.read_bytes()]


def slowed(function):
    def slow(*arguments):
        time.sleep(1)
        return function(*arguments)

    return slow


def test_a_story_of_teaching_in_a_browser(app, shared, hub, browser, images, captions, monkeypatch):
    page, stranger = Page(browser, app.local_url), images[9]
    # a broken and a huge picture: words, and the app goes on
    page.upload("#picture", b"\x89PNG\r\n\x1a\nbroken")
    assert "cannot be read" in page.toast()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # the browser takes its time to show a really huge one
        # this one comes while the app still looks at the one before, or that it was removed
        patch.setattr(Visitor, "look_at", slowed(Visitor.look_at))
        page.upload("#picture", png(Image.new("1", (200, 200))))
        assert "too large" in page.toast()
    page.page.click("#ask")
    assert "There is no picture yet" in page.toast()
    # one that the bank knows, and its gallery
    page.page.locator(".cards.small button").nth(3).click()
    page.settle()
    page.ask("what is in the image?")
    cards = page.cards()
    assert len(cards) == 2 and captions[3] in cards[0] and "similarity 1.00" in cards[0] and "right with" in cards[0]
    assert not page.page.is_visible("#unknown")
    page.shoot("tiny-ask")
    # a click leaves it out
    page.page.locator("#gallery [data-row]").first.click()
    page.until("#gallery", captions[3], gone=True)
    page.settle()
    assert len(page.cards()) == 2 and not any(captions[3] in card for card in page.cards())
    assert page.page.locator(TURNS).count() == 2
    page.page.click("#put-back")
    page.until("#gallery", captions[3])
    assert captions[3] in page.cards()[0]
    # below the threshold nothing is used
    page.page.locator("#threshold input[type=number]").fill("0.99")
    page.page.keyboard.press("Tab")
    page.ask()
    assert ["not used" in card for card in page.cards()] == [False, True]
    page.page.locator("#threshold input[type=number]").fill("0")
    page.page.keyboard.press("Tab")
    # one that it does not know is taught, and known
    page.upload("#picture", png(stranger))
    page.ask()
    assert "I do not know this one" in page.page.inner_text("#unknown") and NAME not in page.page.content()
    page.page.fill("#line textarea, #line input", f"a {NAME}")
    page.page.click("#teach-this")
    page.until("#gallery", "taught by you")
    page.settle()
    assert f"a {NAME}" in page.cards()[0] and "similarity 1.00" in page.cards()[0]
    assert not page.page.is_visible("#unknown") and page.page.locator(TURNS).count() == 4
    # forgotten, and there is no trace of it
    page.open("Teach")
    page.shoot("tiny-teach")
    assert len(page.cards("#lessons")) == 1 and NAME in page.cards("#lessons")[0]
    page.upload("#new-picture", png(stranger))
    page.open("Bank")
    page.page.fill("#text textarea, #text input", NAME)
    page.until("#found", NAME)
    page.upload("#wanted", png(stranger))
    page.until("#found", "taught by you")
    page.open("Teach")
    page.page.locator("#lessons [data-row]").click()
    page.until("#said", "Nothing")
    page.until("#found", NAME, gone=True)
    assert page.page.locator("button[aria-label='Remove Image']").count() == 0  # nor is it shown anywhere
    uploads, home = Path(os.environ["GRADIO_TEMP_DIR"]), Path(os.environ["HF_HOME"])
    assert files_with(uploads, png(stranger)) == [] and files_with(home, NAME.encode()) == []
    page.open("Ask")
    page.upload("#picture", png(stranger))
    page.ask()
    assert "I do not know this one" in page.page.inner_text("#unknown") and NAME not in page.page.content()
    # taught in the other tab, saved, and asked again from what was saved
    page.open("Teach")
    page.upload("#new-picture", png(stranger))
    page.page.fill("#new-line textarea, #new-line input", f"the {NAME}")
    page.page.click("#teach-button")
    page.until("#lessons", NAME)
    page.page.fill("#name textarea, #name input", "../elsewhere")
    page.page.click("#save")
    assert "expected letters" in page.toast()
    page.page.fill("#name textarea, #name input", "my-bank")
    page.page.click("#save")
    page.until("#said", "Saved as")
    saved = MemoryBank.from_pretrained("my-bank")
    assert len(saved) == len(shared.model.memory_bank) + 1 and saved.captions[-1] == f"the {NAME}"
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_owner")
        page.page.fill("#repository textarea, #repository input", "owner/my-bank")
        page.page.click("#push")
        page.until("#said", f"Pushed to {hub.url}/datasets/owner/my-bank")
    assert {"bank_config.json", "README.md"} <= set(hub.files("owner/my-bank", "dataset"))
    # the bank
    page.open("Bank")
    frame = page.page.frame_locator("#view iframe")
    frame.locator("#map circle").first.wait_for()
    assert frame.locator("#map circle").count() == 8
    page.page.fill("#text textarea, #text input", "WHITE")
    page.until("#found", "white")
    assert len(page.cards("#found")) == sum("white" in caption for caption in captions[:8])
    page.upload("#wanted", png(images[5]))
    page.until("#found", "similarity")
    assert captions[5] in page.cards("#found")[0]
    page.shoot("tiny-bank")
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith((app.local_url, "data:", "blob:", "about:"))] == []


def test_what_comes_while_the_app_is_busy_is_not_lost(app, browser, images, captions, monkeypatch):
    page = Page(browser, app.local_url)
    with monkeypatch.context() as patch:
        patch.setattr(Visitor, "look_at", slowed(Visitor.look_at))
        for number in (2, 5):
            page.page.locator(".cards.small button").nth(number).click()
        page.settle()
    page.ask("what is it?")
    assert captions[5] in page.cards()[0] and "similarity 1.00" in page.cards()[0]
    page.page.locator(".cards.small button").nth(2).click()
    page.settle()
    monkeypatch.setattr(Visitor, "ask", slowed(Visitor.ask))
    page.page.fill("#question textarea", "what is it?")
    page.page.click("#ask")
    page.page.fill("#question textarea", "and then?")
    page.wait(f"document.querySelectorAll('{TURNS}').length == 2")
    page.settle()
    assert page.page.input_value("#question textarea") == "and then?"
    page.open("Teach")
    monkeypatch.setattr(Visitor, "teach", slowed(Visitor.teach))
    for number in (8, 9):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("a.png", png(images[number]))
            file.writestr("a.csv", f"image,caption\na.png,lesson {number}\n")
        file = {"name": f"{number}.zip", "mimeType": "application/zip", "buffer": content.getvalue()}
        page.page.set_input_files("input[type=file][accept='.zip']", file)
    page.until("#lessons", "lesson 8")
    page.until("#lessons", "lesson 9")
    page.settle()
    monkeypatch.setattr(Visitor, "forget", slowed(Visitor.forget))
    page.page.locator("#lessons [data-row]").nth(0).click()
    page.page.locator("#lessons [data-row]").nth(1).click()
    page.until("#said", "Nothing was taught")
    assert page.problems == []


COPY = """async bytes => {
    const blob = new Blob([new Uint8Array(bytes)], {type: "image/png"});
    await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
}"""


def test_pictures_of_the_clipboard_and_the_webcam(app, browser, images, captions):
    page = Page(browser, app.local_url)
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write", "camera"])
    page.page.evaluate(COPY, list(png(images[3])))
    page.page.click("#picture button[aria-label='Paste from clipboard']")
    page.page.wait_for_selector("#picture button[aria-label='Remove Image']")
    page.ask("what is it?")
    assert captions[3] in page.cards()[0] and "similarity 1.00" in page.cards()[0]
    page.page.click("#picture button[aria-label='Remove Image']")
    page.wait(f"!document.querySelector('{TURNS}')")
    page.page.click("#picture button[aria-label='Capture from camera']")
    page.page.get_by_text("Click to Access Webcam").click()
    page.wait("document.querySelector('#picture video').videoWidth > 0")
    page.page.click("#picture [aria-label='capture photo']")
    page.page.wait_for_selector("#picture button[aria-label='Remove Image']")
    page.ask("what is it?")
    assert page.page.locator(TURNS).count() == 2 and page.problems == []


EMOJI = Path(__file__).parents[3] / "examples/data/emoji_pairs.parquet"


@pytest.mark.skipif(
    not DEMO, reason="set TINYALIGN_DEMO and TINYALIGN_SCREENSHOTS to make the pictures of docs/app.md"
)
def test_pictures_of_the_docs(browser):
    """A bank without a concept is taught one drawing of it, and the model names another."""
    names = ["shaking face", "jar", "flag: Brazil"]
    table = pq.read_table(EMOJI, columns=["label", "style", "image"], filters=[("label", "in", names)])
    drawings = {(row["label"], row["style"]): row["image"]["bytes"] for row in table.to_pylist()}
    shared = load_shared(f"{DEMO}/checkpoint", "main", f"{DEMO}/bank_without_heldout", "cpu")
    with app_module.serving(shared) as app:
        page = Page(browser, app.local_url)
        page.page.locator("#compare input").uncheck()
        page.upload("#picture", drawings[names[0], "twemoji"])
        page.ask("What is this?")
        assert page.page.is_visible("#unknown") and names[0] not in page.page.inner_text("#with")
        page.open("Teach")
        for name in names:
            page.upload("#new-picture", drawings[name, "noto"])
            page.page.fill("#new-line textarea, #new-line input", name)
            page.page.click("#teach-button")
            page.until("#lessons", name)
            page.settle()
        page.shoot("teach")
        page.open("Ask")
        page.ask("What is this?")
        assert page.page.inner_text("#with").strip().endswith(names[0]) and names[0] in page.cards()[0]
        page.shoot("teaching")
    shared.model.attach_memory_bank(f"{DEMO}/bank_with_heldout", tokenizer=shared.processor.tokenizer)
    with app_module.serving(shared) as app:
        page = Page(browser, app.local_url)
        page.upload("#picture", Path(DEMO, "query.png").read_bytes())
        page.ask("What is this?")
        page.ask("Which words go with it?")
        page.shoot("ask")
        page.open("Bank")
        page.upload("#wanted", drawings["shaking face", "twemoji"])
        page.until("#found", "similarity")
        page.page.frame_locator("#view iframe").locator("#map circle").first.wait_for()
        page.page.mouse.move(700, 500)
        page.page.mouse.wheel(0, 2000)
        page.page.wait_for_timeout(1000)  # a browser paints a frame when it is scrolled to
        page.shoot("bank")


class Client:
    """A visitor without a browser, who knows the names of the app's functions."""

    def __init__(self, app, folder: Path):
        self.client, self.folder = gradio_client.Client(app.local_url, verbose=False, httpx_kwargs=SLOWLY), folder

    def call(self, name: str, *arguments):
        return self.client.predict(*arguments, api_name=f"/{name}")

    def look(self, image: Image.Image):
        image.save(self.folder / "picture.png")
        return self.call("look", gradio_client.handle_file(self.folder / "picture.png"))

    def ask(self, question: str = "what is it?") -> str:
        """Return the HTML of what the answer rests on."""
        return self.call("ask", question, 2, 0, False)[-1]


def test_two_visitors_at_once_do_not_see_each_others_lessons(app, images, tmp_path):
    pages, names = [], ["borgle", "quimp"]
    for name in names:
        (tmp_path / name).mkdir()
        pages.append(Client(app, tmp_path / name))
    answers = [None, None]

    def visit(number: int):
        pages[number].look(images[10])
        pages[number].call("teach_this", names[number])
        answers[number] = [pages[number].ask() for _ in range(3)]

    threads = [threading.Thread(target=visit, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, other, found in zip(names, reversed(names), answers, strict=True):
        assert all(own in text and other not in text for text in found)
    assert not any(name in Client(app, tmp_path).look(images[10])[-1] for name in names)


def test_many_requests_take_no_more_memory(app, images, tmp_path):
    client, process = Client(app, tmp_path), psutil.Process()
    used = []
    for number in range(200):
        if number % 20 == 0:
            client.look(images[number // 20 % 8])
            used.append(process.memory_info().rss)
        assert client.ask(f"what is in the image? {number}")
    assert used[-1] - used[4] < 30 * 2**20, used


def test_visitors_are_bounded_and_freed(shared, images, tmp_path, monkeypatch):
    monkeypatch.setattr(visitor_module, "MAX_VISITORS", 4)
    visitors = Visitors(shared)
    forgotten = tmp_path / "of the first.png"
    forgotten.write_bytes(b"")
    visitors[0].files.add(forgotten)
    for number in range(7):
        visitor = visitors[number]
        visitor.look_at(images[0])
        list(visitor.ask("", 2, 0, compare=False))
    assert len(visitors._visitors) == 4 and not forgotten.exists()
    visitor.files.add(tmp_path / "upload.png")
    (tmp_path / "upload.png").write_bytes(b"")
    visitors.leave(number)
    assert len(visitors._visitors) == 3 and not (tmp_path / "upload.png").exists()
    assert visitors[number] is not visitor


def test_a_visitor_who_leaves_or_is_evicted_leaves_no_trace(shared, images, monkeypatch):
    monkeypatch.setattr(visitor_module, "MAX_VISITORS", 1)
    visitors, captions = Visitors(shared), shared.model.caption_tokenizer.captions
    for session, end in [("first", lambda: visitors["second"]), ("second", lambda: visitors.leave("second"))]:
        visitor = visitors[session]
        visitor.teach(images[9], f"a {NAME}")
        visitor.look_at(images[9])
        list(visitor.ask("", 2, 0, compare=False))
        assert f"a {NAME}" in captions
        end()
        assert f"a {NAME}" not in captions and len(visitor.lessons) == 0 and visitor.turns == []


def status(url: str, data: dict | None = None, **headers: str) -> int:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_url_is_fetched_and_no_path_opened(app, shared, images, tmp_path):
    """Gradio itself would fetch a URL, of a public host, for whoever names one."""
    secret = tmp_path / "secret.png"
    images[0].save(secret)
    url, outside = f"{app.local_url}gradio_api", "http://example.com/x.png"
    assert status(f"{url}/file={outside}") == 403 and status(f"{url}/proxy={outside}") == 403
    assert status(f"{url}/file=http%3A%2F%2Fexample.com/x.png") == 403
    refused = {"data": [{"path": outside, "meta": {"_type": "gradio.FileData"}}], "fn_index": 0}
    assert status(f"{url}/run/upload", refused) == 403  # which is not /upload
    assert status(f"{url}/run/ask", {"data": ["", 2, 0, True]}) in (403, 404)  # goes round the queue
    assert status(f"{url}/process_recording", {}) == 403
    assert status(f"{url}/info", Host="rebound.example:7860") == 400
    assert status(f"{url}/file={secret}") == 403 and status(f"{url}/file=/etc/passwd") == 403
    meta = {"_type": "gradio.FileData"}
    for function in ("look", "ask", "find_caption", "save"):
        assert status(f"{url}/call/{function}", {"data": [{"path": outside, "meta": meta}]}) == 403
    assert status(f"{url}/queue/join", {"data": [[{"x": {"path": outside, "meta": meta}}]], "fn_index": 0}) == 403
    assert status(f"{url}/call/look", {"data": ["x" * 2**21]}) == 413
    for place in ({"path": str(secret), "meta": meta}, {"path": str(secret)}, {"path": "/etc/passwd", "meta": meta}):
        session = {"data": [place], "session_hash": "thief"}
        event = json.load(post(f"{url}/call/look", session))["event_id"]
        with urllib.request.urlopen(f"{url}/call/look/{event}", timeout=60) as answer:
            answer.read()
        stolen = json.load(post(f"{url}/call/ask", {"data": ["", 2, 0, True], "session_hash": "thief"}))["event_id"]
        with urllib.request.urlopen(f"{url}/call/ask/{stolen}", timeout=60) as answer:
            assert b"There is no picture yet" in answer.read()


def post(url: str, data: dict):
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(data).encode(), JSON), timeout=60)


JSON = {"Content-Type": "application/json"}


def test_teaching_is_off_for_strangers(shared, images, monkeypatch):
    monkeypatch.setattr(shared, "may", "ask")
    visitor = Visitors(shared)["somebody"]
    with pytest.raises(ValueError, match="Visitors may not teach here.*--visitors_may teach"):
        visitor.teach(images[0], "a line")
    monkeypatch.setattr(shared, "may", "teach")
    visitor.teach(images[0], "a line")
    with pytest.raises(ValueError, match="Visitors may not save here"):
        visitor.save("bank")
    with pytest.raises(ValueError, match="Visitors may not save here"):
        visitor.push("me/bank")


def test_what_a_visitor_may_not_say_or_cannot_push(shared, images, monkeypatch):
    def push(*arguments):
        raise httpx.ConnectError("no network")

    visitor = Visitors(shared)["somebody"]
    with pytest.raises(ValueError, match="The line has 2001 letters, expected at most 2000"):
        visitor.teach(images[9], "x" * 2001)
    visitor.look_at(images[9])
    with pytest.raises(ValueError, match="half a character"):
        list(visitor.ask("\ud800", 2, 0, compare=True))
    assert visitor.turns == []  # they are shown, and could not be
    monkeypatch.setattr(Lessons, "push", push)
    with pytest.raises(
        ValueError, match=r"not pushed to 'me/bank' \(ConnectError.*no network.*\), expected .* the network"
    ):
        visitor.push("me/bank")


def test_uploads_of_lessons_are_deleted_whatever_comes(shared, tmp_path, monkeypatch):
    def upload(content: bytes) -> str:
        path = tmp_path / "lessons.zip"
        path.write_bytes(content)
        (said, _), left = pages.teach_many(str(path), SimpleNamespace(session_hash="a")), path.exists()
        assert not left
        return said

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    pages = app_pages.Pages(shared)
    assert "0 new" in upload(b"nothing") and "Found 0 CSV files" in upload(b"nothing")
    for error, words in [(MemoryError(), "MemoryError"), (RuntimeError("out of memory"), "out of memory")]:
        monkeypatch.setattr(app_pages, "read_lessons", lambda paths, error=error: raise_(error))
        assert words in upload(b"nothing")
    monkeypatch.setattr(shared, "may", "ask")
    monkeypatch.setattr(app_pages, "read_lessons", lambda paths: raise_(AssertionError("it is read")))
    assert "Visitors may not teach here" in upload(b"nothing")
    with pytest.raises(app_pages.gr.Error, match="no session_hash, expected one for each visitor"):
        pages.visitor(SimpleNamespace(session_hash=None))


def raise_(error: Exception):
    raise error


@pytest.mark.parametrize(("host", "may"), [("127.0.0.1", "save"), ("0.0.0.0", "ask"), (None, "ask")])
def test_who_may_what_by_default(monkeypatch, host, may):
    asked = {}

    def load(*arguments, **settings):
        asked.update(settings)
        raise InterruptedError

    monkeypatch.setattr(app_module, "load_shared", load)
    with pytest.raises(InterruptedError):
        app_module.start_app("org/model", host=host)
    assert asked["may"] == may


@pytest.fixture(scope="module")
def folders(parts, make_model, make_processor, tmp_path_factory):
    """The model and its bank in folders, and a bank of another tower."""
    folder = tmp_path_factory.mktemp("folders")
    parts.model.save_pretrained(folder / "model")
    parts.processor.save_pretrained(folder / "model")
    parts.bank.save_pretrained(folder / "bank")
    return folder


def test_an_app_without_memory_says_why_and_answers(folders, images, make_model, make_processor, tmp_path):
    shared = load_shared(str(folders / "model"), "main", None, "cpu")
    assert "No memory bank was named: start the app with --memory_bank" in shared.problem
    visitor = Visitors(shared)["a"]
    visitor.look_at(images[0])
    list(visitor.ask("", 2, 0.5, compare=False))
    assert visitor.turns[0][1] == "" and visitor.turns[0][2] and visitor.with_memory.sources == []
    with pytest.raises(ValueError, match="There is no memory to teach. No memory bank was named"):
        visitor.teach(images[0], "a line")
    app_module.build_app(shared)
    other = make_model("clip", memory_input="both", memory_scores=True, memory_tokens=3)
    other.save_pretrained(tmp_path / "other")
    make_processor(other, "clip").save_pretrained(tmp_path / "other")
    shared = load_shared(str(tmp_path / "other"), "main", str(folders / "bank"), "cpu")
    assert "tower" in shared.problem and shared.model.memory_bank is None
    baseline = make_model(memory_top_k=0)
    baseline.save_pretrained(tmp_path / "baseline")
    make_processor(baseline).save_pretrained(tmp_path / "baseline")
    shared = load_shared(str(tmp_path / "baseline"), "main", str(folders / "bank"), "cpu")
    assert "was trained without memory" in shared.problem
    for threshold in (None, -0.5):  # Gradio refuses a question where a slider is out of its range
        shared.model.config.retrieval_threshold = threshold
        blocks = app_module.build_app(shared).blocks.values()
        sliders = [block for block in blocks if block.get_block_name() == "slider"]
        assert sliders and all(slider.minimum <= slider.value <= slider.maximum for slider in sliders)


def test_a_proxy_is_not_asked_for_the_apps_own_page(shared, monkeypatch):
    """Gradio looks for it as it starts, and its client refuses lists of hosts that it cannot read."""
    monkeypatch.delenv("NO_PROXY")  # "*" in tests, at which nothing else is read
    monkeypatch.setenv("no_proxy", "intranet.example")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with app_module.serving(shared):
        assert all(map(urllib.request.proxy_bypass_environment, ("127.0.0.1", "localhost", "intranet.example")))
    assert os.environ["no_proxy"] == "intranet.example" and not urllib.request.proxy_bypass_environment("127.0.0.1")


def test_a_space_starts_from_its_folder(folders, tmp_path):
    """As the Hub starts it, with the package that travels with it, and offline."""
    model = tmp_path / "model"
    model.mkdir()
    for path in (folders / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "memory_bank": str(folders / "bank")}))
    space = tmp_path / "space"
    space.mkdir()
    write_space(space, "org/space", ModelFacts(repo_id="org/model", license="mit"), "main")
    card = (space / "README.md").read_text()
    (space / "README.md").write_text(card.replace("models:\n- org/model", f"models:\n- {model}"))
    with (space / "tinyalign_vlm/__init__.py").open("a") as file:
        file.write('print("the package of the Space")\n')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {"HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": port, "SPACE_ID": "org/space", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "app.py"]
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=space, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        while "Open http" not in output.read_text():
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
        url = output.read_text().split("Open ")[1].split()[0]
        config = json.load(urllib.request.urlopen(f"{url}config"))
    finally:
        process.terminate()
        process.wait()
    assert "the package of the Space" in output.read_text()
    labels = {component["props"].get("label") for component in config["components"]}
    assert {"Ask", "Teach", "Bank", "With memory"} <= labels
    texts = " ".join(str(component["props"].get("value")) for component in config["components"])
    assert "Teaching is off here" in texts and "Without memory." not in texts
