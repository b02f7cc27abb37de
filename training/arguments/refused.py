"""Settings of transformers' and TRL's trainers that would break a run, or make its result worse without a word."""

from transformers import TrainingArguments

BATCHES = "a row of a batch is one chat, which has its own images: leave it out"
LOGITS = "logits are computed where there is a label and nowhere else: leave it out"
CHAT = "chats are written with the template and the tokens of the model's own processor: leave it out"
# By name: the values that are allowed, and what to do instead of setting another one.
ALLOWED = {
    "packing": ((False,), BATCHES),
    "padding_free": ((False,), BATCHES),
    "chat_template_path": ((None,), CHAT),
    "eos_token": ((None,), CHAT),
    "pad_token": ((None,), CHAT),
    "loss_type": (("nll",), LOGITS),
    "completion_only_loss": ((None, True), "only what the assistant says is learnt: leave it out"),
    "dataset_num_proc": ((None,), "set num_proc"),
    "dataset_text_field": (("text",), "chats are in messages_column: leave it out"),
    "eval_packing": ((None, False), BATCHES),
    "pad_to_multiple_of": ((None, "auto"), BATCHES),
    "label_smoothing_factor": ((0,), LOGITS),
    "label_names": ((None, ["labels"]), "the labels of a batch are `labels`: leave it out"),
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
    "bf16_full_eval": ((False,), "the weights would be rounded for good: set bf16"),
    "fp16_full_eval": ((False,), "the weights would be rounded for good: set fp16"),
    "use_liger_kernel": ((False,), "Liger does not know this model: leave it out"),
    "push_to_hub": ((False,), "push the trained model, its card and its bank with `tinyalign push FOLDER REPOSITORY`"),
}


def refuse_harmful_settings(config: TrainingArguments):
    """Raise `ValueError`, saying what to do, for a setting of `ALLOWED` with another value."""
    settings = vars(config)
    for name, (values, advice) in ALLOWED.items():
        if settings.get(name, values[0]) not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"{name} is {settings[name]!r}, expected {expected}: {advice}.")
    if "schedule_free" in str(config.optim).lower():
        raise ValueError(
            f"optim is {config.optim}, expected another optimizer: what would be saved are not its averaged weights."
        )
    if config.neftune_noise_alpha is not None and settings.get("tune_language_model") == "frozen":
        raise ValueError(
            f"neftune_noise_alpha is {config.neftune_noise_alpha:g}, but the language model is frozen, and with it "
            "the embeddings that get noise: leave it out, or set tune_language_model."
        )
    if config.use_cpu and settings.get("activation_offloading"):
        raise ValueError(
            "activation_offloading is True, but this runs on the CPU: there is no GPU whose memory it saves. Leave it "
            "out."
        )
