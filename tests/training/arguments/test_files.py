"""Settings from YAML files and the command line."""

import re

import pytest
import yaml

from tinyalign_cli.main import main
from tinyalign_vlm.training.arguments.files import read_config, read_settings


def test_an_unknown_field_is_refused(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit, match="learning_rat is no setting of AlignmentConfig, did you mean learning_rate"):
        main(["train", "stage1.yaml", "--learning_rat", "1"])
    with pytest.raises(SystemExit, match="top_k is no setting of AlignmentConfig, but a field of the model's config"):
        main(["train", "stage1.yaml", "--top_k", "0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 2.5}, "argument --max_steps.*: invalid int value: '2.5'"),
        ({"per_device_train_batch_size": True}, "invalid int value: 'True'"),
        ({"strict": 5}, "Truthy value expected: got 5"),
        ({"image_aspect_ratio": "anyres"}, "invalid choice: 'anyres' .choose from .?square"),
        ({"baseline": "rag"}, "argument --baseline: invalid choice: 'rag' .*wider_connector.*static_rag.*text_rag"),
    ],
)
def test_values_of_a_file_are_checked_as_on_the_command_line(change, message, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    (files / "changed.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(SystemExit, match="2"):
        main(["train", "stage1.yaml", "changed.yaml"])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: tinyalign train stage1.yaml changed.yaml [--FIELD VALUE ...]"
    assert re.search(message, error)


def test_nothing_in_a_file_is_a_value_where_there_may_be_none(files):
    changed = "save_total_limit: null\nmemory_bank: null\nlearning_rate: 1e-2\nsave_strategy: no\n"
    (files / "changed.yaml").write_text(changed)
    config = read_config([files / "stage1.yaml", files / "changed.yaml"], [])
    assert config.save_total_limit is None and config.save_strategy == "no"
    assert config.memory_bank is None and config.learning_rate == 1e-2
    (files / "changed.yaml").write_text("learning_rate: null\n")
    with pytest.raises(ValueError, match="learning_rate is null, expected float"):
        read_config([files / "stage1.yaml", files / "changed.yaml"], [])


def test_several_files_are_joined(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "other.yaml").write_text("learning_rate: 1e-2\nmodel_kwargs: {memory_tokens: 7}\nseed: 8\n")
    names = ["baseline.yaml", "other.yaml"]
    config = read_config(names, ["--seed", "9", "--model_kwargs", '{"latent_dim": 4}'])
    assert config.learning_rate == 1e-2 and config.seed == 9 and config.max_steps == 2
    assert config.model_kwargs == {"memory_top_k": 0, "memory_tokens": 7, "latent_dim": 4}
    with pytest.raises(ValueError, match="other.yaml has stage: None, expected `stage: 1`"):
        read_config(["other.yaml"], [])
    with pytest.raises(ValueError, match="no file nowhere.yaml, expected .* one of .*qwen2-0.5b-siglip.yaml"):
        read_config(["nowhere.yaml"], [])


@pytest.mark.parametrize("content", [b"learning_rate: [1", "stage: 1".encode("utf-16")])
def test_a_broken_file_is_named(content, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="mine.yaml is no YAML in UTF-8"):
        read_settings(["stage1.yaml", tmp_path / "mine.yaml"])
