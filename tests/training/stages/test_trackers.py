"""W&B, trackio and TensorBoard themselves, where they are installed: offline, and on this machine."""

import json
import sqlite3

import pytest

from tinyalign_cli.main import main

# what they are told at each step, the part of the trainer and ours
NAMES = {"train/loss", "train/tokens_per_second", "train/grad_norm_connector", "train/neighbour_similarity"}
COLUMNS = ["step", "row", "prompt", "answer", "reference", "neighbours"]


def train(files, monkeypatch, tracker: str) -> list[dict]:
    """Two steps, each with an evaluation of which `tracker` is told -> the sample answers as they were written."""
    monkeypatch.chdir(files)
    fields = ["--dataset", "chats.json", "--answer_column", "", "--eval_dataset", "chats.json", "--eval_steps", "1"]
    main(["train", "stage1.yaml", *fields, "--eval_samples", "2", "--report_to", tracker])
    return [json.loads(line) for line in (files / "out1/samples.jsonl").read_text().splitlines()]


def test_wandb(files, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (pip install wandb)")
    for name, value in (("MODE", "offline"), ("DIR", str(files)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    samples = train(files, monkeypatch, "wandb")
    tables = [json.loads(path.read_text()) for path in files.glob("wandb/offline-run-*/files/media/table/samples*")]
    assert len(tables) == 2 and all(table["columns"] == COLUMNS for table in tables)
    rows = sorted(row for table in tables for row in table["data"])
    assert [row[:5] for row in rows] == [[sample[name] for name in COLUMNS[:5]] for sample in samples]
    assert NAMES | {"eval/loss"} <= set(wandb.run.summary.keys())
    wandb.finish()


def test_trackio(files, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(files / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed (pip install trackio)")
    samples = train(files, monkeypatch, "trackio")
    (path,) = (files / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        logged = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    assert sum(entry.keys() >= NAMES for entry in logged) == 2
    rows = [row for entry in logged if "samples" in entry for row in entry["samples"]["_value"]]
    assert [list(row) for row in rows] == [COLUMNS] * 4
    assert [[row[name] for name in COLUMNS[:5]] for row in rows] == [
        [sample[name] for name in COLUMNS[:5]] for sample in samples
    ]


def test_tensorboard(files, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(files, monkeypatch, "tensorboard")
    (log,) = files.glob("out1/runs/*/events*")
    events = EventAccumulator(str(log)).Reload()
    assert NAMES | {"eval/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
