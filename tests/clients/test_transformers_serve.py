"""The two commands that serve a checkpoint, each in a process of its own and asked by the `openai` client."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import openai
import pytest

from .conftest import answer, data_url, only_say_letters, openai_chat

TINYALIGN = "from tinyalign_cli.main import main; main()"
# as with remote code alone: the package cannot be imported
TRANSFORMERS = (
    'import sys; sys.modules["tinyalign_vlm"] = None; from transformers.cli.transformers import main; main()'
)


@pytest.fixture
def start(tmp_path):
    """`start(code, *arguments)`: a client of the server that this Python code starts with these arguments."""
    processes = []

    def start(code: str, *arguments: str) -> openai.OpenAI:
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, "serve", *arguments, "--port", "0"]
        with open(tmp_path / "log", "w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        while not (url := re.search(r"running on (http://\S+:\d+)", (tmp_path / "log").read_text())):
            assert processes[-1].poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert json.load(urllib.request.urlopen(f"{url[1]}/health")) == {"status": "ok"}
        return openai.OpenAI(base_url=f"{url[1]}/v1", api_key="none", max_retries=0, timeout=600)

    yield start
    for process in processes:
        process.terminate()
        process.wait()


def streamed(client: openai.OpenAI, model: str, url: str) -> str:
    chunks = client.chat.completions.create(
        model=model, messages=openai_chat(url), max_tokens=6, temperature=0, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_tinyalign_serve(start, saved, images):
    client = start(TINYALIGN, saved.folder, "--memory_bank", saved.bank_folder, "--device", "cpu")
    assert streamed(client, saved.folder, data_url(images[0])) == answer(saved, images[0])
    with pytest.raises(openai.BadRequestError, match="the host 'images.example' is not allowed"):
        streamed(client, saved.folder, "https://images.example/red.png")


def test_transformers_serve(start, make_model, make_processor, images, tmp_path):
    """A baseline, for `transformers serve` cannot be told of a bank in a folder."""
    model = make_model(memory_top_k=0)
    baseline = SimpleNamespace(model=model, processor=make_processor(model))
    only_say_letters(model, baseline.processor)
    name = str(tmp_path / "baseline")
    model.save_pretrained(name)
    baseline.processor.save_pretrained(name)
    client = start(TRANSFORMERS, name, "--trust-remote-code", "--device", "cpu")
    assert streamed(client, name, data_url(images[0])) == answer(baseline, images[0])
