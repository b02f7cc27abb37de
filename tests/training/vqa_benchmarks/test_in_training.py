"""A benchmark at the evaluations of a training run, which imports lmms-eval: in a process of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest
from vqa_rows import COMMANDS, write

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


def test_the_metric_logged_is_that_of_the_evaluation_of_the_model(files):
    write(files / "benchmarks", "pope")
    train = ["train", "stage1.yaml", "--eval_dataset", "benchmarks", "--eval_benchmark_images", "1"]
    train += ["--eval_steps", "2", "--eval_samples", "1", "--bf16", "False", "--eval_benchmark"]
    evaluate = ["evaluate", "out1", "--bank", "bank", "--data", "benchmarks", "--tasks", "pope", "--limit", "1"]
    neighbours = ["neighbours", *train[1:], "pope"]
    commands = json.dumps([[*train, "mmvet"], neighbours, [*train, "pope"], [*evaluate, "--output", "results"]])
    command = [sys.executable, "-c", COMMANDS, commands]
    done = subprocess.run(command, cwd=files, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_benchmark is 'mmvet' and eval_dataset 'benchmarks', expected one of gqa, pope" in done.stdout
    history = json.loads((files / "out1/checkpoint-2/trainer_state.json").read_text())["log_history"]
    (logged,) = [entry for entry in history if "eval_pope_F1" in entry]
    assert logged["step"] == 2 and {"eval_pope_accuracy", "eval_pope_yes_answers"} < logged.keys()
    assert any("eval_loss" in entry for entry in history)  # of the same questions, with the right answers
    sample = json.loads((files / "out1/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("user: <image>Is there a ") and sample["reference"] in ("yes", "no")
    results = json.loads((files / "results/results.json").read_text())["benchmarks"]["pope"]["variants"]
    assert results["out1, bank"]["values"]["F1"] == logged["eval_pope_F1"]
