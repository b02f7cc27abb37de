"""`tinyalign evaluate`, each time in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import HfApi
from vqa_rows import write

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
    command += ["--output", str(output), "--card"]
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
    card = open(f"{saved['model']}/README.md").read()
    assert "model-index:" in card and "MMMU val" in card

    two = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tinyalign_cli"]
    done = evaluate(*command[:-2], str(tmp_path / "two"), start=tuple(two))
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


def test_data_of_the_hub_stay_at_the_commit_of_the_first_run(hub, saved, tmp_path):
    api, name = HfApi(hub.url, token="hf_owner"), "lmms-lab-encoder/GQA"
    write(tmp_path / "rows", "gqa")
    (tmp_path / "rows/README.md").write_text(GQA_CARD)
    api.create_repo(name, repo_type="dataset")
    first = api.upload_folder(folder_path=tmp_path / "rows", repo_id=name, repo_type="dataset").oid
    arguments = [saved["model"], "--bank", saved["bank"], "--tasks", "gqa", "--limit", "1", "--output", str(tmp_path)]
    environment = hub.environment(tmp_path / "hf")
    assert evaluate(*arguments, **environment).startswith("0 ")
    assert json.loads((tmp_path / "revisions.json").read_text()) == {name: first}
    api.upload_file(path_or_fileobj=b"", path_in_repo="gqa.parquet", repo_id=name, repo_type="dataset")
    assert evaluate(*arguments, "--memory", "off", **environment).startswith("0 ")
    results = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["gqa"]
    assert results["data_version"] == first and len(results["variants"]) == 2
    (tmp_path / "revisions.json").write_text(json.dumps({name: "0" * 40}))
    printed = evaluate(*arguments, **environment)
    assert printed.startswith("1 tinyalign: ") and f"{name} at {'0' * 40} cannot be read from the Hub" in printed
