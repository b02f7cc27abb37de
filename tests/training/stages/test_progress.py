"""What people see of a run."""

import re

import pytest
from transformers import ProgressCallback

from tinyalign_vlm.training.stages import progress
from tinyalign_vlm.training.stages.progress import StepBar, duration

from .short_runs import entries, make_trainer


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_line_for_each_logged_step(
    stage, disable_tqdm, make_model, processor, dataset, bank, features, tmp_path, capsys
):
    settings = {"max_steps": 4, "logging_steps": 2, "disable_tqdm": disable_tqdm, "eval_samples": 0}
    rows = dataset.select(range(4))
    trainer = make_trainer(
        stage, make_model(), processor, dataset, bank, tmp_path, eval_dataset=rows, eval_strategy="epoch", **settings
    )
    capsys.readouterr()  # of loading the model
    trainer.train()
    output = capsys.readouterr().out
    assert "Training: 4 steps, 4 rows each, 1.33 x the 12 rows of the data, the first 1 warm-up. --max_steps" in output
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    number = r"\d[\d.e+-]*"
    assert re.fullmatch(rf"step 2/4  loss {number}  lr {number}  {number} samples/s  \d+ s left", lines[0])
    assert re.fullmatch(rf"step 3/4  eval_loss {number}  \d+ s left", lines[1])
    assert re.fullmatch(rf"step 4/4  loss {number}  lr {number}  {number} samples/s", lines[2])
    assert len(lines) == 4 and "{" not in output
    assert len(entries(trainer)) == 2 and "memory_gb" in entries(trainer)[0]  # the log has all


def test_a_bar_on_a_terminal(make_model, processor, dataset, bank, tmp_path, monkeypatch):
    def bars(**settings) -> list:
        trainer = make_trainer(1, make_model(), processor, dataset, bank, tmp_path, **settings)
        return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback)]

    assert bars(disable_tqdm=False) == []
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    (bar,) = bars(disable_tqdm=False)
    assert isinstance(bar, StepBar) and bars(disable_tqdm=True) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7000, "117 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
