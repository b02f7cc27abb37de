"""What `tinyalign evaluate` refuses before it loads anything."""

from pathlib import Path

import pytest

from tinyalign_cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "evaluate needs a checkpoint, or --compare with folders of answers: one of them."),
        (["model", "--compare", "a"], "evaluate needs a checkpoint, or --compare with folders of answers"),
        (["model", "--tasks", "mmvet"], "mmvet is scored by a judge: pass --judge MODEL"),
        (["model", "--tasks", "mmvet", "--judge", "gpt"], "and set OPENAI_API_KEY and OPENAI_BASE_URL"),
        (["model", "--tasks", "vqav2_val"], "the usual training data have, too: pass --images FILE"),
        (["model", "--limit", "0"], "limit is 0, expected 1 image or more."),
        (["model", "--batch_size", "-1"], "batch_size is -1, expected 1 question or more."),
        (["model", "--limit", "8", "--card"], "card is for whole benchmarks of the Hub: leave it out, or --limit."),
        (["model", "--images", "y"], "--images are those of vqav2_val: leave it out, or add vqav2_val to --tasks"),
        (
            ["model", "--tasks", "vqav2_val", "--exclude", "--data", "x", "--images", "y", "--card"],
            "out, or --exclude, --data, --images.",
        ),
        (["model", "--card"], "card is made of card_facts.json, which model lacks: leave out --card."),
        (
            ["--compare", "a", "--shuffled", "--tasks", "pope", "--card"],
            "--compare reads what is on disk: leave out --shuffled, --tasks, --card.",
        ),
        (["model", "--card", "--tasks", "vqav2_testdev"], "only EvalAI has those of vqav2_testdev"),
        (["--compare", "nowhere"], "nowhere has no samples/VARIANT/BENCHMARK.parquet, expected a folder of results."),
        (["nowhere"], "model is 'nowhere': there is no "),
        (["model", "--against", "nowhere"], "against is 'nowhere': there is no "),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "model").mkdir()
    if "vqav2_testdev" in arguments:
        (tmp_path / "model" / "card_facts.json").touch()
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *arguments])
    assert message in str(end.value) and "\n" not in str(end.value)


def test_a_comparison_leaves_the_folder_of_answers_alone(monkeypatch):
    seen, place = [], "tinyalign_vlm.training.vqa_benchmarks.report.compare_folders"
    monkeypatch.setattr(place, lambda *arguments: seen.append(arguments))
    main(["evaluate", "--compare", "evaluation"])
    assert seen == [([Path("evaluation")], Path("comparison"), False)]
