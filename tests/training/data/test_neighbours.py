"""Neighbours of features, and the table of a data set's: who finds it again, and what a kill leaves."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.data import neighbours as module
from tinyalign_vlm.training.data import shared_array
from tinyalign_vlm.training.data.neighbours import NeighbourSearch, find_neighbours, source_ids_of


def neighbour_table(*arguments, folder: Path, **settings) -> Path:
    return NeighbourSearch(*arguments, **settings).table(folder)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(shared_array, "PART_IMAGES", 5)


def columns(path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def test_neighbours_leave_the_own_image_out(model, images, bank, features):
    scores, with_own = find_neighbours(bank, model, features, 2, batch_size=5)
    assert with_own.dtype == np.int64 and with_own[:, 0].tolist() == list(range(12))
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-3)
    _, without = find_neighbours(bank, model, features, 2, source_ids_of(images), batch_size=5)
    assert (without != np.arange(12)[:, None]).all()
    assert without[:, 0].tolist() == with_own[:, 1].tolist()
    with pytest.raises(ValueError, match="3 source_ids for 12"):
        find_neighbours(bank, model, features, 2, source_ids_of(images[:3]))


def test_source_ids_are_those_of_the_bank(images, dataset, bank):
    ids = source_ids_of(dataset["image"])
    assert ids == [row["source_id"] for row in bank.rows(list(range(12)))] == source_ids_of(images)


def test_it_is_the_search_without_own_rows(bank, model, processor, images, features, small_parts, tmp_path):
    path = neighbour_table(bank, model, processor, images, 3, folder=tmp_path, batch_size=2)
    table = columns(path)
    own = source_ids_of(images)
    assert table["source_id"].tolist() == own and (table["own_rows"] == 1).all()
    full = torch.from_numpy(features).float()
    scores, ids = bank.search(bank.encode_queries(full), 3, exclude=own)
    assert (table["memory_ids"] == ids.numpy()).all()
    np.testing.assert_allclose(table["memory_scores"], scores.numpy(), atol=1e-2)
    rows = datasets.Dataset.from_parquet(str(path))
    assert rows[0]["memory_ids"] == ids[0].tolist() and len(rows) == len(images)
    # cached features and workers give the same neighbours
    again = neighbour_table(
        bank, model, processor, images, 3, folder=tmp_path / "2", vision_features=features, num_workers=2
    )
    assert (columns(again)["memory_ids"] == table["memory_ids"]).all()


def test_the_other_images_of_a_row_are_left_out_too(bank, model, processor, images, features, small_parts, tmp_path):
    """Also where batches and parts divide a row: a neighbour would have the answer about the image beside it."""
    rows = [0, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4]
    own = source_ids_of(images)
    together = [[name for name, other in zip(own, rows, strict=True) if other == row] for row in rows]
    _, ids = bank.search(bank.encode_queries(torch.from_numpy(features).float()), 3, exclude=together)
    for more in ({}, {"vision_features": features, "num_workers": 2}):
        settings = {"rows": rows, "batch_size": 2, "folder": tmp_path / str(len(more)), **more}
        path = neighbour_table(bank, model, processor, images, 3, **settings)
        table = columns(path)
        assert (table["memory_ids"] == ids.numpy()).all() and table["source_id"].tolist() == own
        assert (table["own_rows"] == 1).all()
    alone = neighbour_table(bank, model, processor, images, 3, rows=range(12), folder=tmp_path)
    assert (columns(alone)["memory_ids"] != table["memory_ids"]).any() and alone.name != path.name
    assert neighbour_table(bank, model, processor, images, 3, folder=tmp_path) == alone


def test_it_is_found_again_and_only_by_its_own_data_and_bank(
    bank, model, processor, images, small_parts, monkeypatch, tmp_path
):
    first = neighbour_table(bank, model, processor, images, 3, folder=tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    with monkeypatch.context() as patch:
        patch.setattr(NeighbourSearch, "write_table", None)  # nothing is computed
        assert neighbour_table(bank, model, processor, list(images), 3, folder=tmp_path) == first
        assert neighbour_table(bank, model, processor, images, 2, folder=tmp_path) == first  # deep enough
    others = [
        neighbour_table(bank, model, processor, images, 4, folder=tmp_path),
        neighbour_table(bank.shuffled(), model, processor, images, 3, folder=tmp_path),
        neighbour_table(bank, model, processor, images[:-1], 3, folder=tmp_path),
        neighbour_table(bank, model, processor, [*images[:-1], images[0]], 3, folder=tmp_path),
    ]
    assert len({first, *others}) == 5
    whole = neighbour_table(bank, model, processor, images, 99, folder=tmp_path)
    table = columns(whole)
    assert table["memory_ids"].shape == (12, 12)  # a bank of 12 rows, one of them the image's own
    assert (table["memory_ids"][:, -1] == -1).all() and (table["memory_scores"][:, -1] == -np.inf).all()


def test_questions_count_in_language_space(make_model, make_processor, images, captions, value_encoder, tmp_path):
    model = make_model(key_space="language")
    processor = make_processor(model)
    rows = [{"image": image, "caption": caption} for image, caption in zip(images, captions, strict=True)]
    bank = MemoryBank.build(rows, model, processor, value_encoder)
    paths = [
        neighbour_table(bank, model, processor, images, 3, queries=[text] * 12, folder=tmp_path)
        for text in ("a red square", "what is in the image? a blue circle.")
    ]
    scores = [columns(path)["memory_scores"] for path in paths]
    assert paths[0] != paths[1] and not np.allclose(*scores)
    with pytest.raises(ValueError, match="Found 2 queries for 12 images"):
        neighbour_table(bank, model, processor, images, 3, queries=["a", "b"], folder=tmp_path)


def test_bad_images_are_named(bank, model, processor, images, small_parts, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="^Image 7: the image cannot be read"):
        neighbour_table(bank, model, processor, [*images[:7], str(broken)], 3, folder=tmp_path)
    with pytest.raises(ValueError, match="There are no images"):
        neighbour_table(bank, model, processor, [], 3, folder=tmp_path)


SCRIPT = """
import os, pickle, random, signal, sys, time
from pathlib import Path
from accelerate import PartialState
from tinyalign_vlm import TinyAlignForConditionalGeneration
from tinyalign_vlm.training.data import neighbours as module
from tinyalign_vlm.training.data import shared_array

def make():
    state = PartialState(cpu=True)
    batches, module.NeighbourSearch.batches = module.NeighbourSearch.batches, lambda self, spans: (
        Path(f"{folder} {state.process_index} {len(spans)}").touch() or batches(self, spans)
    )
    module.NeighbourSearch(bank, model, processor, images, 3, batch_size=2).table(Path(folder))

def written():
    return sum(path.read_bytes()[-PARTS:].count(1) for path in Path(folder).glob("*.partial"))

def make_until_killed(parts):
    pid = os.fork()
    if pid == 0:
        module.write_parquet = lambda *_: time.sleep(3600)  # it never ends before it is killed
        make()
    while written() < parts:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    time.sleep(random.Random(parts).uniform(0.0, 0.05))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL

shared_array.PART_IMAGES, PARTS = 5, 30
bank, processor, images = pickle.loads(Path("inputs.pkl").read_bytes())
model = TinyAlignForConditionalGeneration.from_pretrained("model")
folder, *kills = sys.argv[1:]
for parts in map(int, kills):
    make_until_killed(parts)
if not kills:
    make()
"""


@pytest.fixture
def script(bank, model, processor, tmp_path, small_parts):
    """`script(arguments, launcher)`: runs a process that makes the table of 150 images, or is killed meanwhile."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)) for _ in range(150)]
    (tmp_path / "inputs.pkl").write_bytes(pickle.dumps((bank, processor, images)))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}

    def run(*arguments: str, launcher: tuple[str, ...] = ()) -> None:
        command = [sys.executable, *launcher, "script.py", *arguments]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=1200)

    run.images = images
    return run


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_killed_at_random_moments_it_ends_with_the_same_bytes(script, bank, model, processor, tmp_path):
    """Each goes on where the one before was killed."""
    whole = neighbour_table(bank, model, processor, script.images, 3, folder=tmp_path / "whole", batch_size=2)
    script("killed", "3", "8", "13")  # of 30 parts
    started = sorted(int(path.name.split()[-1]) for path in tmp_path.glob("killed *"))
    assert len(started) == 3 and started[2] == 30 and started[1] <= 27 and started[0] <= 22
    path = neighbour_table(bank, model, processor, script.images, 3, folder=tmp_path / "killed", batch_size=2)
    assert path.name == whole.name and path.read_bytes() == whole.read_bytes()
    assert {entry.suffix for entry in path.parent.iterdir()} == {".parquet", ".lock"}


def test_launched_processes_make_the_same_table(script, bank, model, processor, tmp_path):
    whole = neighbour_table(bank, model, processor, script.images, 3, folder=tmp_path / "whole", batch_size=2)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    script("launched", launcher=launcher)
    assert sorted(path.name for path in tmp_path.glob("launched *")) == ["launched 0 15", "launched 1 15"]
    (path,) = (tmp_path / "launched").glob("*.parquet")
    assert path.name == whole.name and path.read_bytes() == whole.read_bytes()


def test_a_table_without_a_neighbour_says_so():
    """All rows of the bank are the images' own: a mean of none is no number."""
    scores = np.full((3, 2), -np.inf).tolist()
    table = datasets.Dataset.from_dict({"own_rows": [2, 2, 2], "memory_scores": scores})
    assert module.summary(table, 2).endswith("none has a neighbour, all rows of the bank are its own")
