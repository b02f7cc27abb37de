"""`tinyalign train FILE.yaml --help`: this package's settings, grouped; with `all` also what is inherited."""

import dataclasses
import re

import pytest

from tinyalign_cli.main import main
from tinyalign_cli.settings_help import FIXED, settings_help
from tinyalign_vlm.training.arguments.files import STAGE_CONFIGS
from tinyalign_vlm.training.arguments.refused import ALLOWED


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_our_settings_fit_on_a_few_screens(stage):
    text = settings_help(STAGE_CONFIGS[stage], ["stage.yaml"], everything=False)
    assert len(text.splitlines()) <= 120 and max(map(len, text.splitlines())) < 120
    names = re.findall(r"^  --(\w+)", text, re.M)
    assert {"dataset", "memory_bank", "tune_language_model", "learning_rate", "output_dir"} <= set(names)
    assert "fsdp" not in names and "stage.yaml --help all" in text


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_every_setting_is_there_once_when_all_are_asked_for(stage):
    text = settings_help(STAGE_CONFIGS[stage], ["stage.yaml"], everything=True)
    names = re.findall(r"^  --(\w+)", text, re.M)
    refused = {name for name, (values, _) in ALLOWED.items() if len(values) == 1}
    fields = {field.name for field in dataclasses.fields(STAGE_CONFIGS[stage])}
    assert sorted(names) == sorted(fields - refused - {*FIXED})


def test_train_prints_them(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    main(["train", "stage1.yaml", "--help"])
    ours = capsys.readouterr().out
    main(["train", "stage1.yaml", "--help", "all"])
    everything = capsys.readouterr().out
    assert (
        "--fsdp" in everything and "--fsdp" not in ours and everything.index("--dataset ") < everything.index("--fsdp")
    )
    main(["train", "--help", "all"])
    assert "--fsdp" in capsys.readouterr().out
    (files / "none.yaml").write_text("output_dir: out")
    with pytest.raises(SystemExit, match="none.yaml has stage: None, expected `stage: 1`"):
        main(["train", "none.yaml", "--help"])
