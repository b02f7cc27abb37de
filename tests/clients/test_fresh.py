"""
A checkpoint where this package is not installed: model, processor, pipeline, with a memory bank and without.

`make test-fresh` makes two environments, `bare` (transformers, torch, pillow) and `faiss` (the same, faiss-cpu and
pyarrow), and names their folder in TINYALIGN_FRESH.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_hub import FakeHub
from PIL import Image

from .conftest import answer, only_say_letters

pytestmark = pytest.mark.skipif(
    "TINYALIGN_FRESH" not in os.environ,
    reason="needs environments of its own, which `make test-fresh` makes (TINYALIGN_FRESH names their folder)",
)
SCRIPT = Path(__file__).with_name("fresh_process.py")
BARE = {"torch", "transformers", "pillow"}
# What others bring along would hide that we need it.
NOT_NEEDED = {"tinyalign-vlm", "accelerate", "datasets", "trl", "peft", "evaluate", "pandas", "torchvision", "gguf"}

PUSH = """
import sys
from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor

folder, bank_folder = sys.argv[1:]
bank = MemoryBank.from_pretrained(bank_folder)
bank.push_to_hub("org/bank")
model = TinyAlignForConditionalGeneration.from_pretrained(folder)
model.attach_memory_bank(bank)
model.push_to_hub("org/model")
TinyAlignProcessor.from_pretrained(folder).push_to_hub("org/model")
"""


@pytest.fixture(scope="module")
def picture(images, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "red.png"
    images[0].save(path)
    return str(path)


def run(name: str, folder: Path, *arguments: str, **environment: str) -> dict:
    """The report of fresh_process.py in the environment `name`, run in `folder`."""
    python = Path(os.environ["TINYALIGN_FRESH"], name, "bin", "python").absolute()
    base = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [str(python), "-I", str(SCRIPT), *arguments],
        env={**base, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    installed = set(report.pop("installed"))
    assert BARE <= installed and not NOT_NEEDED & installed and not report.pop("package")
    assert ({"faiss-cpu", "pyarrow"} <= installed) == (name == "faiss")
    assert set(report.pop("modules").values()) == {"transformers_modules"}
    return report


def check_answers(report: dict, expected: str, other: str):
    """All ways to ask give the same answer; `other` is that to the second chat of a batch."""
    for way in ("generate", "full text", "without a chat", "streamed"):
        assert report[way] == expected, way
    assert set(report["pipeline"].values()) == {expected}, report["pipeline"]
    assert report["batch 1"] == report["batch 2"] == [expected, other, expected]


def test_with_a_bank(saved, picture, images, tmp_path):
    report = run("faiss", tmp_path, saved.folder, picture, saved.bank_folder)
    check_answers(report, answer(saved, images[0]), answer(saved, Image.new("RGB", (30, 60), "blue")))
    pixels = saved.processor.image_processor(images=images[:1], return_tensors="pt")["pixel_values"]
    assert report["captions"] == saved.model.retrieve(pixels).captions


def test_without_faiss(saved, picture, images, tmp_path):
    """Everything loads, answers without retrieval, and retrieval says what to install."""
    report = run("bare", tmp_path, saved.folder, picture, "-")
    other = answer(saved, Image.new("RGB", (30, 60), "blue"), memory="off")
    check_answers(report, answer(saved, images[0], memory="off"), other)
    no_bank, again, attach = report["errors"]
    assert no_bank == again and no_bank.startswith("ValueError: This model uses 2 neighbours an image, but no memory")
    assert attach.startswith("ImportError") and "pip install faiss-cpu pyarrow" in attach


def test_a_baseline_without_faiss(make_model, make_processor, picture, images, tmp_path):
    """A model that was made without memory needs neither faiss nor `memory="off"`."""
    model = make_model(memory_top_k=0)
    baseline = SimpleNamespace(model=model, processor=make_processor(model))
    only_say_letters(model, baseline.processor)
    for part in (baseline.model, baseline.processor):
        part.save_pretrained(tmp_path / "baseline")
    report = run("bare", tmp_path, str(tmp_path / "baseline"), picture)
    check_answers(report, answer(baseline, images[0]), answer(baseline, Image.new("RGB", (30, 60), "blue")))


def test_from_the_hub(saved, picture, images, tmp_path):
    """The config names the bank, which comes at the first retrieval, and from the cache when offline."""
    with FakeHub() as hub:
        subprocess.run(
            [sys.executable, "-c", PUSH, saved.folder, saved.bank_folder],
            env={**os.environ, **hub.environment(tmp_path / "owner", "hf_owner")},
            check=True,
        )
        online = {**hub.environment(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        report = run("faiss", tmp_path, "org/model", picture, **online)
        bare = run("bare", tmp_path, "org/model", picture, "-", **online)
    check_answers(report, answer(saved, images[0]), answer(saved, Image.new("RGB", (30, 60), "blue")))
    assert report["bank"][0] == "org/bank" and len(report["bank"][1]) == 40
    for error in bare["errors"]:
        assert error.startswith("ImportError") and "pip install faiss-cpu pyarrow" in error
    offline = run(
        "faiss", tmp_path, "org/model", picture, **{**hub.environment(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    )
    assert offline == report
