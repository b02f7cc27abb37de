"""What `tinyalign evaluate` refuses before it loads anything."""

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
        (["model", "--limit", "8", "--card"], "card is for whole benchmarks and a checkpoint's folder"),
        (["--compare", "nowhere"], "nowhere has no samples/VARIANT/BENCHMARK.parquet, expected a folder of results."),
        (["nowhere"], "model is 'nowhere': there is no "),
        (["model", "--against", "nowhere"], "against is 'nowhere': there is no "),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *arguments])
    assert message in str(end.value) and "\n" not in str(end.value)
