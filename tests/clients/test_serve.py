"""`tinyalign serve`, asked by the `openai` client."""

import json
import sys
import threading
import time
import urllib.request

import openai
import pytest
import uvicorn
from PIL import Image

from tinyalign_cli.main import main
from tinyalign_vlm.training import serve

from .conftest import answer, data_url, openai_chat

NAME = "a/model"


class Server:
    """An app of `serve` on a port of its own, and a client of it."""

    def __init__(self, app):
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    def chat(self, *urls, **settings):
        settings = {"model": NAME, "max_tokens": 6, "temperature": 0, **settings}
        settings.setdefault("messages", openai_chat(*urls))
        return self.client.chat.completions.create(**settings)

    def stop(self):
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def server(saved):
    model, processor = serve.load(saved.folder, "main", saved.bank_folder, "on", "cpu")
    server = Server(serve.build_app(NAME, model, processor, max_tokens=8))
    yield server
    server.stop()


def test_an_image_streamed(server, saved, images):
    for image, format in ((images[0], "PNG"), (images[2], "JPEG"), (images[1], "WEBP")):
        chunks = list(server.chat(data_url(image, format), stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 3
        assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 6
        if format == "PNG":
            assert text == answer(saved, image) != answer(saved, image, memory="off")
        assert len(text) >= 6


def test_whole_answers(server, saved, images):
    for chosen in ((images[0],), (images[1], images[2]), ()):
        completion = server.chat(*map(data_url, chosen))
        assert completion.choices[0].message.content == answer(saved, *chosen)
        assert completion.usage.completion_tokens == 6 and completion.choices[0].finish_reason == "length"
    # a conversation, the content as a string, a system prompt, the newer name of the limit
    messages = [{"role": "developer", "content": "a"}, *openai_chat(data_url(images[0]))]
    messages += [{"role": "assistant", "content": "red"}, {"role": "user", "content": "and now?"}]
    assert (
        server.chat(messages=messages, max_completion_tokens=3, max_tokens=openai.NOT_GIVEN).usage.completion_tokens
        == 3
    )
    assert server.chat(data_url(images[0]), max_tokens=10**9).usage.completion_tokens == 8  # the server's limit


def test_settings(server, saved, images):
    url = data_url(images[0])
    sampled = {server.chat(url, temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3)}
    assert 2 <= len(sampled) <= 3  # the same seed, the same answer
    text = server.chat(url).choices[0].message.content
    stopped = server.chat(url, stop=[text[2]]).choices[0]
    assert stopped.message.content == text[: text.index(text[2]) + 1] and stopped.finish_reason == "stop"


def test_the_models_it_has(server):
    assert [model.id for model in server.client.models.list()] == [NAME]
    assert json.load(urllib.request.urlopen(f"{server.url}/health")) == {"status": "ok"}
    with pytest.raises(openai.BadRequestError, match="pinned to 'a/model'"):
        server.chat(model="another/model")


def test_several_clients(server, saved, images):
    """The bank is searched in another thread than the one that loaded it, one request after the other."""
    answers = {}

    def ask(index):
        answers[index] = server.chat(data_url(images[index])).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {index: answer(saved, images[index]) for index in range(4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "expected a list with at least one message"),
        ({"messages": [{"role": "wizard", "content": "?"}]}, r"messages\[0\]: found the role 'wizard'"),
        ({"messages": [{"role": "user", "content": None}]}, "expected text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "part of type 'video_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "type 'image_url'"),
        ({"messages": openai_chat("https://127.0.0.1/secret.png")}, "the host '127.0.0.1' .* is not allowed"),
        ({"messages": openai_chat("/etc/logo.png")}, "found '/etc/logo.png', expected a data:image"),
        ({"messages": openai_chat("file:///etc/logo.png")}, "expected a data:image"),
        ({"messages": openai_chat("data:image/png;base64,AAAA")}, "the image cannot be read"),
        ({"messages": openai_chat(text="look: <image>")}, "1 in all, but 0 images"),
        ({"messages": openai_chat(*["data:image/png;base64,"] * 17)}, "cannot be read|more than 16 images"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config is not supported"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, "chat_template_kwargs is not"),
        ({"extra_body": {"memory": "off"}}, "memory"),
        ({"temperature": -1}, "temperature is -1, expected 0 to 2"),
        ({"top_p": 1.5, "stream": True}, "top_p is 1.5, expected 0 to 1"),
        ({"max_tokens": -3}, "max_new_tokens"),
        ({"max_tokens": "many"}, "many"),
        ({"temperature": [1]}, "not supported between"),
    ],
)
def test_bad_requests(change, message, server):
    with pytest.raises(openai.APIStatusError, match=message) as error:
        server.chat(**{"messages": openai_chat(), **change})
    assert error.value.status_code in (400, 422)


def test_a_bomb(server, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(openai.BadRequestError, match="the image is too large .*expected at most 1000 pixels"):
        server.chat(data_url(Image.new("RGB", (40, 40))))
    with pytest.raises(openai.BadRequestError, match="the images have 1200 pixels, expected 1000 in all"):
        server.chat(*[data_url(Image.new("RGB", (20, 20)))] * 3)


def test_what_is_no_request(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_BODY_BYTES", 2000)

    def status(data: bytes, content_type: str = "application/json") -> int:
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions", data, {"content-type": content_type}, method="POST"
        )
        try:
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            assert json.load(error)["error"]["message"]
            return error.code

    assert status(b"{") == status(b"[" * 1500) == status(b"[]") == status(b"\xff") == 400
    assert status(b"{}", "text/plain") == 415
    assert status(b" " * 3000) == 413
    paths = ("/load_model", "/v1/responses", "/v1/completions", "/docs", "/openapi.json")
    for path in paths:  # what else `transformers serve` answers
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(server.url + path, b"{}"))


def test_without_a_bank(saved, images):
    """What is missing is said before the server starts; `--memory off` does without, with the same checkpoint."""
    with pytest.raises(ValueError, match="retrieves 2 neighbours an image, but its config names no memory bank: pass"):
        serve.load(saved.folder, "main", None, "on", "cpu")
    server = Server(serve.build_app(NAME, *serve.load(saved.folder, "main", None, "off", "cpu")))
    assert server.chat(data_url(images[0])).choices[0].message.content == answer(saved, images[0], memory="off")
    server.stop()


def test_the_command_line(saved, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="tinyalign: .*its config names no memory bank"):
        main(["serve", saved.folder, "--device", "cpu"])
    with pytest.raises(SystemExit, match="tinyalign: .*no file named model.safetensors"):
        main(["serve", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main(["serve", saved.folder, "--prot", "80"])
    assert "unknown arguments: --prot 80" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    assert "20 seconds, 32 MiB" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "tinyalign_vlm.training.serve")
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(SystemExit, match=r"tinyalign: .*pip install tinyalign-vlm\[serve\]"):
        main(["serve", saved.folder])
