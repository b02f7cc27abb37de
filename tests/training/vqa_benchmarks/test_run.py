"""`tinyalign evaluate`, each time in a process of its own."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, ModelCard
from vqa_rows import COMMANDS, gqa_rows, save, write

from tinyalign_vlm.hub_cards.facts import ModelFacts, write_facts

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, "pope", "mmmu")
    return str(folder)


def evaluate(*arguments: str, start: tuple[str, ...] = ("-m", "tinyalign_cli"), **environment: str) -> str:
    command = [sys.executable, *start, "evaluate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=280)
    return f"{done.returncode} {done.stdout}{done.stderr}"


def test_variants_are_answered_once_and_compared(saved, data, tmp_path):
    output = tmp_path / "out"
    command = [saved["model"], "--bank", saved["bank"], "--memory", "off", "--data", data, "--tasks", "mmmu"]
    command += ["--output", str(output)]
    assert evaluate(*command) == f"0 {output / 'report.md'} has the results.\n"
    results = json.loads((output / "results.json").read_text())["benchmarks"]["mmmu"]["variants"]
    assert list(results) == ["model, bank", "model, memory off"]
    assert results["model, memory off"]["answers_that_differ"] > 0
    files = {path: path.stat().st_mtime_ns for path in output.glob("samples/*/*.parquet")}
    assert len(files) == 2
    evaluate(*command, "--exclude")
    assert files == {path: path.stat().st_mtime_ns for path in output.glob("samples/*/*.parquet")}
    printed = evaluate("--compare", str(output), str(output), "--output", str(tmp_path / "both"))
    assert printed.startswith("0 ")
    compared = json.loads((tmp_path / "both/results.json").read_text())["benchmarks"]["mmmu"]["variants"]
    assert list(compared) == [f"out ({n}): {name}" for n in (1, 2) for name in results]
    assert compared["out (2): model, bank"]["difference"] == [0, 0, 0]

    two = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tinyalign_cli"]
    done = evaluate(*command[:-1], str(tmp_path / "two"), start=tuple(two))
    assert done.startswith("0 "), done
    assert json.loads((tmp_path / "two/results.json").read_text())["benchmarks"]["mmmu"]["variants"] == results


def test_what_fails_exits_1(saved, data, tmp_path):
    arguments = ["--data", data, "--output", str(tmp_path), "--tasks", "gqa", "--bank", saved["bank"]]
    printed = evaluate(saved["model"], *arguments)
    assert printed.startswith("1 tinyalign: ") and "has neither gqa.parquet nor a folder gqa of Parq" in printed
    assert "Traceback" not in printed


GQA_CARD = """---
configs:
- config_name: testdev_balanced_instructions
  data_files: [{split: testdev, path: gqa.parquet}]
- config_name: testdev_balanced_images
  data_files: [{split: testdev, path: gqa_images.parquet}]
---
"""


def test_data_of_the_hub_are_pinned(hub, saved, tmp_path, monkeypatch):
    """To the commits in revisions.json; a first run writes the last ones into it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    api, name, rows = HfApi(hub.url, token="hf_owner"), "lmms-lab-encoder/GQA", tmp_path / "rows"
    write(rows, "gqa")
    (rows / "README.md").write_text(GQA_CARD)
    api.create_repo(name, repo_type="dataset")
    first = api.upload_folder(folder_path=rows, repo_id=name, repo_type="dataset").oid
    save(gqa_rows(2), rows / "gqa.parquet")
    last = api.upload_folder(folder_path=rows, repo_id=name, repo_type="dataset").oid
    for folder, commit in (("pinned", first), ("missing", "0" * 40)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "revisions.json").write_text(json.dumps({name: commit}))
    model = shutil.copytree(saved["model"], tmp_path / "model")  # which gets a card
    write_facts(model, ModelFacts(repo_id="model"))
    asked = ["evaluate", str(model), "--bank", saved["bank"], "--tasks", "gqa", "--output"]
    commands = [[*asked, str(tmp_path / folder)] for folder in ("pinned", "new", "missing")]
    commands[1].append("--card")
    environment = os.environ | hub.environment(tmp_path / "hf")
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert f"{name} at {'0' * 40} cannot be read from the Hub" in done.stdout, done.stderr[-3000:]
    for folder, commit, questions in (("pinned", first, 12), ("new", last, 6)):
        result = json.loads((tmp_path / folder / "results.json").read_text())["benchmarks"]["gqa"]
        assert (result["data_version"], result["questions"]) == (commit, questions)
        assert json.loads((tmp_path / folder / "revisions.json").read_text()) == {name: commit}
    (result,) = ModelCard.load(model / "README.md").data.eval_results
    assert (result.dataset_type, result.dataset_split, result.dataset_revision) == (name, "testdev", last)
