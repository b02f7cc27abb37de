"""Arguments of transformers' and TRL's trainers that these do not take."""

import pytest
import torch
from transformers import TrainingArguments

from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.arguments.instruction import InstructionConfig
from tinyalign_vlm.training.stages.arguments import check_arguments


@pytest.mark.parametrize(
    "name", ["data_collator", "model_init", "peft_config", "formatting_func", "optimizer_cls_and_kwargs"]
)
def test_an_argument_is_refused_with_what_to_do_instead(name, model, tmp_path):
    with pytest.raises(ValueError, match=f"{name} was given, expected none: ..."):
        check_arguments(model, AlignmentConfig(output_dir=str(tmp_path)), {name: object(), "callbacks": []})
    check_arguments(model, AlignmentConfig(output_dir=str(tmp_path)), {name: None})


def test_another_model_or_other_settings(model, tmp_path):
    with pytest.raises(TypeError, match="Found a str, expected a PreTrainedModel: load or compose it first"):
        check_arguments("out/stage1", AlignmentConfig(output_dir=str(tmp_path)), {})
    with pytest.raises(TypeError, match="Found a TrainingArguments, expected a StageArguments: make an Alignment"):
        check_arguments(model, TrainingArguments(output_dir=str(tmp_path)), {})


def test_an_optimizer_made_before_the_adapters(model, tmp_path):
    config = InstructionConfig(output_dir=str(tmp_path), tune_language_model="lora")
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with pytest.raises(ValueError, match="optimizers were given, but tune_language_model is lora: its adapters"):
        check_arguments(model, config, {"optimizers": (optimizer, None)})
    check_arguments(model, config, {"optimizers": (None, None)})
