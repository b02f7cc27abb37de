"""`tinyalign data check`: rows of a run, before it."""

import pytest

from tinyalign_cli.main import main


def test_a_check_reads_streamed_rows_and_counts_tokens_with_a_model_only(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit, match="1"):
        main(["data", "check", "stage1.yaml", "--streaming", "True", "--max_length", "30"])
    assert "12 rows: 0 good, 12 bad (12 over-long)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="max_length is 30, but no model says what a token is"):
        main(["data", "check", "chats.json", "--max_length", "30"])
