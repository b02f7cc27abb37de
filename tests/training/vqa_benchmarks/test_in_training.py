"""A benchmark at the evaluations of a training run, which imports lmms-eval: in a process of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest
from vqa_rows import write

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


def tinyalign(folder, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tinyalign_cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def test_the_metric_logged_is_that_of_the_evaluation_of_the_model(files):
    write(files / "benchmarks", "pope")
    fields = ["--eval_dataset", "benchmarks", "--eval_benchmark", "pope", "--eval_benchmark_images", "1"]
    fields += ["--eval_steps", "2", "--eval_samples", "1", "--bf16", "False"]
    done = tinyalign(files, "train", "stage1.yaml", *fields)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((files / "out1/checkpoint-2/trainer_state.json").read_text())["log_history"]
    (logged,) = [entry for entry in history if "eval_pope_F1" in entry]
    assert logged["step"] == 2 and {"eval_pope_accuracy", "eval_pope_yes_answers"} < logged.keys()
    assert any("eval_loss" in entry for entry in history)  # of the same questions, with the right answers
    sample = json.loads((files / "out1/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("user: <image>Is there a ") and sample["reference"] in ("yes", "no")

    asked = ["--data", "benchmarks", "--tasks", "pope", "--limit", "1", "--output", "results"]
    done = tinyalign(files, "evaluate", "out1", "--bank", "bank", *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((files / "results/results.json").read_text())["benchmarks"]["pope"]["variants"]
    assert results["out1, bank"]["values"]["F1"] == logged["eval_pope_F1"]


def test_a_benchmark_that_has_no_score_is_refused(files):
    done = tinyalign(files, "train", "stage1.yaml", "--eval_dataset", "benchmarks", "--eval_benchmark", "mmvet")
    assert done.returncode == 1
    assert "eval_benchmark is 'mmvet' and eval_dataset 'benchmarks', expected one of gqa, pope" in done.stderr
