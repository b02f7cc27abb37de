"""docs/bank.md does what it says, with a tiny model in the place of the demo's."""

import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from hub.documents import run_blocks
from PIL import Image

DOCUMENT = Path(__file__).parents[3] / "docs" / "bank.md"


def test_the_walk(make_model, make_processor, tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    demo = tmp_path / "demo"
    model = make_model(memory_input="captions")
    model.save_pretrained(demo / "checkpoint")
    make_processor(model).save_pretrained(demo / "checkpoint")
    pixels = np.random.default_rng(3).integers(0, 256, (400, 5, 5, 3), dtype=np.uint8)
    rows = {
        "image": [Image.fromarray(image) for image in pixels],
        "label": [f"{'flag' if row % 3 else 'sign'} {row}" for row in range(400)],
        "license": ["Apache-2.0" if row % 2 else "CC-BY-4.0" for row in range(400)],
        "group": [f"group {row % 9}" for row in range(400)],
    }
    features = {"image": datasets.Image(), **dict.fromkeys(("label", "license", "group"), datasets.Value("string"))}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "pairs.parquet")
    Image.fromarray(pixels[0]).save(demo / "query.png")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    blocks = run_blocks(DOCUMENT.read_text(), tmp_path, environment)
    assert len(blocks) > 8
    for block in blocks:  # the numbers are the demo's, the form is the same
        found, shown = ((text or "").splitlines() for text in (block.output, block.shown))
        assert len(found) == len(shown), f"{block.code}printed\n{block.output}\nthe page shows\n{block.shown}"
    printed = "".join(block.output for block in blocks)
    assert re.search(r"bank: 200 rows; 0 left out\.", printed) and "fewer: OK" in printed
    assert "\nlarger: 300 rows, 100 of them new; " in printed
    assert "exit status 1" in blocks[-1].output and "key_encoder.safetensors: its sha256 is" in blocks[-1].output
