"""Settings of transformers' and TRL's trainers that would do harm: the line that refuses them."""

from dataclasses import fields

import pytest

from tinyalign_vlm.training import AlignmentConfig, InstructionConfig

CONFIGS = {1: AlignmentConfig, 2: InstructionConfig}
REFUSED = [
    ("packing", "True", "leave it out"),
    ("padding_free", "True", "leave it out"),
    ("chat_template_path", "chat.jinja", "the model's own processor"),
    ("eos_token", "</s>", "the model's own processor"),
    ("loss_type", "dft", "leave it out"),
    ("completion_only_loss", "False", "only what the assistant says is learnt"),
    ("dataset_num_proc", "16", "set num_proc"),
    ("dataset_text_field", "words", "chats are in messages_column"),
    ("eval_packing", "True", "leave it out"),
    ("pad_to_multiple_of", "16", "leave it out"),
    ("label_smoothing_factor", "0.1", "leave it out"),
    ("label_names", "answers", "leave it out"),
    ("train_sampling_strategy", "group_by_length", "set random or sequential"),
    ("remove_unused_columns", "True", "leave it out"),
    ("auto_find_batch_size", "True", "set per_device_train_batch_size lower"),
    ("push_to_hub", "True", "tinyalign push"),
    ("optim_target_modules", "linear_1", "leave it out"),
    ("optim", "schedule_free_adamw", "another optimizer"),
    ("bf16_full_eval", "True", "set bf16"),
    ("fp16_full_eval", "True", "set fp16"),
    ("use_liger_kernel", "True", "leave it out"),
    ("activation_offloading", "True", "runs on the CPU"),
]
# Stage 1 has none of TRL's own settings.
OF_STAGES = [
    (stage, *setting)
    for stage, config in CONFIGS.items()
    for setting in REFUSED
    if setting[0] in {field.name for field in fields(config)}
]


@pytest.mark.parametrize(("stage", "name", "value", "advice"), OF_STAGES)
def test_a_harmful_setting_is_refused(stage, name, value, advice, tmp_path):
    kinds = {"True": True, "False": False, "0.1": 0.1, "16": 16}
    with pytest.raises(ValueError, match=f"{name} is .*{value}.*{advice}"):
        CONFIGS[stage](output_dir=str(tmp_path), use_cpu=True, **{name: kinds.get(value, value)})


def test_settings_that_change_no_result_are_taken(tmp_path):
    settings = {"assistant_only_loss": True, "completion_only_loss": True, "packing": False, "shuffle_dataset": True}
    InstructionConfig(output_dir=str(tmp_path), neftune_noise_alpha=5, **settings)


@pytest.mark.parametrize("config", [AlignmentConfig, InstructionConfig])
def test_a_process_has_one_gpu(config, tmp_path, monkeypatch):
    """Trainer would divide a batch's rows and its images among GPUs as if they were as many."""
    monkeypatch.setattr(config, "n_gpu", property(lambda self: 8))
    with pytest.raises(ValueError, match="sees 8 GPUs, expected one: .*ddp.yaml.*CUDA_VISIBLE_DEVICES=0"):
        config(output_dir=str(tmp_path))


def test_noise_on_embeddings_that_are_frozen(tmp_path):
    with pytest.raises(ValueError, match="neftune_noise_alpha is 5, but the language model is frozen"):
        AlignmentConfig(output_dir=str(tmp_path), neftune_noise_alpha=5)
