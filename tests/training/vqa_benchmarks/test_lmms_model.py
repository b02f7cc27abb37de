"""The entry point of lmms-eval. It runs in processes of their own: importing lmms-eval changes a process."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from vqa_rows import pope_rows, write

from tinyalign_vlm.training.inference import serve
from tinyalign_vlm.training.models import load_to_answer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="pip install -e .[eval]; pip install --no-deps lmms-eval"
)
TASK = """
include: {tasks}/pope/pope.yaml
task: little_pope
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}/pope.parquet}}}}
generation_kwargs: {{max_new_tokens: 20}}
"""
COMMANDS = """
import importlib.util
import json
import sys
from unittest.mock import MagicMock

for name in ("dotenv", "pytablewriter"):  # for .env files and printed tables
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = MagicMock(**{"MarkdownTableWriter.return_value.dumps.return_value": ""})
from lmms_eval.__main__ import cli_evaluate

for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    cli_evaluate()
"""
ROUNDS = """
import sys
from types import SimpleNamespace

from lmms_eval.models import get_model
from PIL import Image

class_of_model = get_model("tinyalign")
model = class_of_model(*sys.argv[1:2], memory="off")
model.task_dict = {"rounds": {"test": [{"image": Image.new("RGB", (24, 24), "red")}]}}
seen = []

def to_messages(row, round_idx=None, previous_output=None, previous_round_info=None):
    seen.append((round_idx, previous_output, previous_round_info))
    chat = [{"role": "user", "content": [{"type": "image", "url": row["image"]}, {"type": "text", "text": "what?"}]}]
    return chat if round_idx is None else (chat, round_idx == 2, None, "info")

request = SimpleNamespace(args=("what?", to_messages, {"max_new_tokens": 4}, 0, "rounds", "test"))
(texts,) = model.generate_until_multi_round([request])
assert len(texts) == 2 and texts[0] == texts[1], texts
assert seen == [(None, None, None), (1, texts[:1], None), (2, texts, "info")], seen
assert model.generate_until([request, request]) == texts
"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def samples_of(folder: Path) -> list[str]:
    (path,) = folder.rglob("*samples_little_pope.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@pytest.fixture
def asked_model(saved):
    """Model and processor, with their bank."""
    return load_to_answer(saved["model"], memory_bank=saved["bank"], device="cpu")


@pytest.fixture
def server(asked_model):
    """The address of `tinyalign serve`."""
    config = uvicorn.Config(serve.build_app("tiny", *asked_model), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_answers_are_those_of_generate_and_of_serve(saved, asked_model, server, tmp_path):
    """The command, in batches of 8, gives each row what `generate` says of it alone, and what the server says."""
    write(tmp_path / "data", "pope")
    tasks = Path(importlib.util.find_spec("lmms_eval").origin).with_name("tasks")
    (tmp_path / "little_pope.yaml").write_text(TASK.format(tasks=tasks, data=tmp_path / "data"))
    asked = {
        "tinyalign": f"pretrained={saved['model']},memory_bank={saved['bank']}",
        "openai": f"model=tiny,base_url={server}/v1,api_key=none,num_concurrent=2,timeout=200",
    }
    commands = []
    for model, arguments in asked.items():
        command = ["--model", model, "--model_args", arguments, "--tasks", "little_pope", "--batch_size", "8"]
        command += ["--include_path", str(tmp_path), "--limit", "12", "--log_samples"]
        commands.append([*command, "--output_path", str(tmp_path / model)])
    run(sys.executable, "-c", COMMANDS, json.dumps(commands))

    model, processor = asked_model
    texts = []
    for row in pope_rows()[:12]:
        prompt = row["question"] + "\nAnswer the question using a single word or phrase."
        content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": prompt}]
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        texts.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    found = samples_of(tmp_path / "tinyalign")
    assert found == [text.partition("\n\n")[0] for text in texts]
    assert len(set(found)) > 1
    assert samples_of(tmp_path / "openai") == texts  # lmms-eval does not cut them at `until`


def test_rounds_and_likelihoods(saved):
    run(sys.executable, "-c", ROUNDS, saved["model"])
