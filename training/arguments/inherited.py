"""Settings of transformers' and TRL's trainers that would do nothing here, or harm: refused, each with what to do."""

from transformers import TrainingArguments

BATCHES = "batches of chats about images are made by TrainingCollator, which does without it: leave it out"
LOGITS = "logits are computed where there is a label and nowhere else: leave it out"
CHAT = "chats are written with the template and the tokens of the model's own processor: leave it out"
# By name: what may be there, and what to do instead of anything else.
ALLOWED = {
    "packing": ((False,), BATCHES),
    "eval_packing": ((None, False), BATCHES),
    "padding_free": ((False,), BATCHES),
    "pad_to_multiple_of": ((None, "auto"), BATCHES),
    "dataset_text_field": (("text",), "chats are in messages_column, and answers in answer_column"),
    "dataset_num_proc": ((None,), "set num_proc"),
    "shuffle_dataset": ((False,), "rows are shuffled in each epoch anyway: leave it out"),
    "truncation_mode": (("keep_start",), "images stand at the start of a row: set truncation and max_length"),
    "model_init_kwargs": ((None,), "set model_kwargs"),
    "chat_template_path": ((None,), CHAT),
    "eos_token": ((None,), CHAT),
    "pad_token": ((None,), CHAT),
    "completion_only_loss": ((None, True), "what the assistant says is learnt, and nothing else: leave it out"),
    "loss_type": (("nll",), LOGITS),
    "label_smoothing_factor": ((0,), LOGITS),
    "label_names": ((None, ["labels"]), "the labels of a batch are `labels`: leave it out"),
    "use_liger_kernel": ((False,), "Liger has no kernels for this model: leave it out"),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "lengths are not known before images are read: set random or sequential",
    ),
    "remove_unused_columns": ((False,), "the collator needs all columns: leave it out"),
    "optim_target_modules": ((None,), "optimizers that project gradients have groups of their own: leave it out"),
    "auto_find_batch_size": (
        (False,),
        "another batch size is another run: set per_device_train_batch_size lower, and global_batch_size to keep the "
        "rows of a step",
    ),
    "push_to_hub": ((False,), "push the trained model, its card and its bank with `tinyalign push FOLDER REPOSITORY`"),
}
ON_CPU = {
    "fp16": "float16 trains on a GPU: set bf16, or leave it out",
    "activation_offloading": "there is no GPU whose memory it saves: leave it out",
}


def refuse_what_has_no_effect(config: TrainingArguments):
    """Raises `ValueError`, saying what to do, for a setting of `ALLOWED` with another value."""
    settings = vars(config)
    for name, (values, advice) in ALLOWED.items():
        if settings.get(name, values[0]) not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"{name} is {settings[name]!r}, expected {expected}: {advice}.")
    for name, advice in ON_CPU.items():
        if config.use_cpu and settings.get(name):
            raise ValueError(f"{name} is {settings[name]!r}, but this runs on the CPU: {advice}.")
    if config.neftune_noise_alpha and config.tune_language_model == "frozen":
        raise ValueError(
            f"neftune_noise_alpha is {config.neftune_noise_alpha:g}, but tune_language_model is frozen: noise is for "
            "a language model that trains. Leave it out, or set tune_language_model."
        )
