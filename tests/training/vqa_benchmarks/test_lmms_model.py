"""The entry point of lmms-eval. It runs in processes of their own: importing lmms-eval changes a process."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vqa_rows import pope_rows, write

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
COMMAND = """
import importlib.util
import sys
from unittest.mock import MagicMock

for name in ("dotenv", "pytablewriter"):  # for .env files and printed tables
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = MagicMock()
import tinyalign_vlm.training.vqa_benchmarks.lmms_model  # mends lmms-eval for other models, too
from lmms_eval.__main__ import cli_evaluate

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
def answers(tmp_path):
    """`answers(model, arguments)`: what the command of lmms-eval has of a model to twelve questions."""
    write(tmp_path / "data", "pope")
    tasks = Path(importlib.util.find_spec("lmms_eval").origin).with_name("tasks")
    (tmp_path / "little_pope.yaml").write_text(TASK.format(tasks=tasks, data=tmp_path / "data"))

    def answers(model: str, arguments: str, *start: str) -> list[str]:
        command = ["--model", model, "--model_args", arguments, "--tasks", "little_pope", "--batch_size", "8"]
        command += ["--include_path", str(tmp_path), "--limit", "12", "--log_samples"]
        output = tmp_path / f"{model}{len(start)}"
        (tmp_path / "command.py").write_text(COMMAND)
        run(sys.executable, *start, str(tmp_path / "command.py"), *command, "--output_path", str(output))
        return samples_of(output)

    return answers


@pytest.fixture
def server(saved, tmp_path):
    """The address of `tinyalign serve`."""
    command = ["-m", "tinyalign_cli", "serve", saved["model"], "--memory_bank", saved["bank"], "--device", "cpu"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, *command, "--port", "0"], stdout=log, stderr=log)
    while not (url := re.search(r"running on (http://\S+:\d+)", (tmp_path / "log").read_text())):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    yield url[1]
    process.terminate()
    process.wait()


def test_answers_are_those_of_generate_and_of_serve(saved, answers, server):
    """The command, in batches of 8, gives each row what `generate` says of it alone, and what the server says."""
    found = answers("tinyalign", f"pretrained={saved['model']},memory_bank={saved['bank']}")
    model, processor = load_to_answer(saved["model"], memory_bank=saved["bank"], device="cpu")
    texts = []
    for row in pope_rows()[:12]:
        prompt = row["question"] + "\nAnswer the question using a single word or phrase."
        content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": prompt}]
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        texts.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert found == [text.partition("\n\n")[0] for text in texts]
    assert len(set(found)) > 1
    asked = f"model={saved['model']},base_url={server}/v1,api_key=none,num_concurrent=2,timeout=200"
    assert answers("openai", asked) == texts  # which does not cut at `until`


def test_rounds_and_likelihoods(saved):
    run(sys.executable, "-c", ROUNDS, saved["model"])
