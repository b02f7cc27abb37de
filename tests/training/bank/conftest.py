"""The commands of banks, and a data set of pictures some of which cannot be in one."""

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from tinyalign_cli.main import main
from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.bank import encode

ROWS = 40


@pytest.fixture(scope="session")
def tinyalign() -> Callable[..., None]:
    """`tinyalign("remove", folder, ...)`"""
    return lambda *arguments: main(["bank", *map(str, arguments)])


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (7, 6, 3), dtype=np.uint8)) for _ in range(ROWS)]


@pytest.fixture(scope="session")
def rows(pictures) -> list[dict]:
    """Good ones, and 3 broken, 5 without a caption, 9 and 20 the picture of 2 again (20 in another format)."""

    def stored(picture: Image.Image, kind: str = "PNG") -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        return buffer.getvalue()

    rows = []
    for number, picture in enumerate(pictures):
        image = {"bytes": stored(picture), "path": None}
        rows.append({"image": image, "caption": f"picture {number}", "license": f"cc-{number % 2}"})
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:60]
    rows[5]["caption"] = " "
    rows[9]["image"] = rows[2]["image"]
    rows[20]["image"] = {"bytes": stored(pictures[2], "BMP"), "path": None}
    return rows


@pytest.fixture(scope="package")
def place(rows, tmp_path_factory, make_model, make_processor, bank) -> Path:
    """model, data.parquet, and bank, which has the value encoder."""
    root = tmp_path_factory.mktemp("place")
    model = make_model()
    model.save_pretrained(root / "model")
    make_processor(model).save_pretrained(root / "model")
    bank.save_pretrained(root / "bank")
    features = {"image": datasets.Image(decode=False)}
    features |= dict.fromkeys(("caption", "license"), datasets.Value("string"))
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(root / "data.parquet")
    return root


@pytest.fixture
def build(place, tmp_path, monkeypatch, tinyalign) -> Callable[..., MemoryBank]:
    """`build("--option", ..., out=name)` -> the bank, made in parts of 8 rows."""
    monkeypatch.setattr(encode, "PART_ROWS", 8)

    def run(*options: str, out: str = "out", dataset: Path | str = place / "data.parquet") -> MemoryBank:
        command = ["--model", place / "model", "--value_encoder", place / "bank", "--dataset", dataset]
        tinyalign("build", *command, "--out", tmp_path / out, *options)
        return MemoryBank.from_pretrained(tmp_path / out)

    return run


@pytest.fixture(scope="package")
def kept(images, captions, model, processor, value_encoder) -> MemoryBank:
    """A bank of 12 rows with licences, of which some are empty or missing, and two sources."""
    licences = ["cc0", "cc-by", "", None]
    rows = [
        {"image": image, "caption": caption, "license": licences[number % 4], "source": "a" if number < 6 else "b"}
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]
    return MemoryBank.build(rows, model, processor, value_encoder, keep_columns=["license", "source"])


@pytest.fixture
def folder(kept, tmp_path, monkeypatch) -> Path:
    """That bank, saved; nothing was loaded before."""
    kept.save_pretrained(tmp_path / "bank")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "bank"


@pytest.fixture
def problems(tinyalign, capsys) -> Callable[..., list[str]]:
    """`problems(folder, "--option", ...)` -> the lines that `verify` prints of what is wrong."""

    def verify(folder: Path, *options) -> list[str]:
        capsys.readouterr()
        status = 0
        try:
            tinyalign("verify", folder, *options)
        except SystemExit as done:
            status = done.code
        lines = capsys.readouterr().out.splitlines()
        assert status == int(lines != [f"{folder}: OK"])
        return lines if status else []

    return verify
