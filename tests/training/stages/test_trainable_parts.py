"""Which parts train: policies, learning rates, the table, and what a frozen part does without."""

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.arguments.instruction import InstructionConfig
from tinyalign_vlm.training.arguments.tuning import PARTS, part_of
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.stages.trainable_parts import set_trainable

from .short_runs import changed_parts, losses, run, weights

FROZEN_CONNECTORS = {"tune_connector": "frozen", "tune_memory_connector": "frozen"}


@pytest.mark.parametrize(
    ("stage", "settings", "expected"),
    [
        (1, {"tune_memory_connector": "frozen"}, {"connector"}),
        (2, {"tune_connector": "frozen"}, {"memory_connector", "language_model", "weight"}),
        (2, {"tune_language_model": "frozen"}, {"connector", "memory_connector"}),
        (1, {"tune_language_model": "full", **FROZEN_CONNECTORS}, {"language_model", "weight"}),
        (1, {"tune_vision_tower": "full"}, {"vision_tower", "connector", "memory_connector"}),
        (1, {"tune_vision_tower": "from layer 0", **FROZEN_CONNECTORS}, {"vision_tower"}),
        (2, {"tune_language_model": "lora", **FROZEN_CONNECTORS}, {"language_model"}),
        (1, {"tune_language_model": "lora"}, {"connector", "memory_connector", "language_model"}),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_what_trains_and_what_is_kept_of_the_rest(
    stage, settings, expected, bf16, make_model, processor, dataset, bank, tmp_path
):
    """A frozen parameter has no gradient and no state of the optimizer, and is the same bit for bit."""
    model = make_model()
    before = weights(model)
    trainer = run(stage, model, processor, dataset, bank, tmp_path, bf16=bf16, **settings)
    after = weights(model)
    assert changed_parts(before, after) == expected
    assert before.keys() == after.keys() and all(before[name].dtype == after[name].dtype for name in before)
    assert all(np.isfinite(losses(trainer)))
    in_optimizer = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if f"{part_of(name)}" not in expected or "lora" in settings.values():
            assert parameter.grad is None or "connector" in name
            assert parameter not in in_optimizer or "connector" in name
    assert trainer.optimizer.state.keys() <= in_optimizer
    assert sum(parameter.numel() for parameter in in_optimizer) == sum(part.trained for part in trainer.parts) > 0


def test_the_vision_tower_from_a_layer_on(make_model, make_processor, dataset, bank, tmp_path):
    """Nothing before the layer changes, and what the features do not depend on has no state."""
    model = make_model(vision_feature_layer=-1)
    before = weights(model)
    trainer = run(1, model, make_processor(model), dataset, bank, tmp_path, tune_vision_tower="from layer 1")
    after = weights(model)
    changed = {name for name in before if "vision_tower" in name and not torch.equal(before[name], after[name])}
    assert changed and all("layers.1." in name for name in changed)
    names = {parameter: name for name, parameter in model.named_parameters()}
    in_tower = [names[p] for group in trainer.optimizer.param_groups for p in group["params"] if "tower" in names[p]]
    assert in_tower and all("layers.1." in name for name in in_tower)


def test_all_of_a_convolutional_tower(make_model, make_processor, dataset, bank, tmp_path):
    model = make_model("efficientnet")
    before = weights(model)
    run(1, model, make_processor(model, "efficientnet"), dataset, bank, tmp_path, tune_vision_tower="full")
    after = weights(model)
    assert "vision_tower" in changed_parts(before, after)
    statistics = [name for name in before if "running_" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("from layer 2", "'from layer 2', but the vision tower .siglip_vision_model. has 2 layers, .* an earlier"),
        ("from layer 1", "has 2 layers, .* none from there on is read .vision_feature_layer -2"),
    ],
)
def test_layers_that_cannot_train(policy, message, make_model, processor, dataset, bank, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(1, make_model(), processor, dataset, bank, tmp_path, tune_vision_tower=policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tune_vision_tower": "partially"},
            "tune_vision_tower is 'partially', expected frozen, full, or",
        ),
        ({"tune_vision_tower": "lora"}, "tune_vision_tower is 'lora', expected frozen, full"),
        ({"tune_vision_tower": "from layer -1"}, "tune_vision_tower is 'from layer -1'"),
        ({"tune_connector": "lora"}, "tune_connector is 'lora', expected one of frozen, full"),
        ({"tune_language_model": "half"}, "tune_language_model is 'half', expected one of frozen, full, lora, qlora"),
        (FROZEN_CONNECTORS, "Nothing trains: .* are all frozen"),
        ({"lora_r": 8}, "Found lora_r, but tune_language_model is frozen"),
        ({"tune_language_model": "lora", "lora_r": 0}, "lora_r is 0"),
        ({"tune_language_model": "lora", "lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"language_model_lr": 1e-4}, "language_model_lr is 0.0001, but tune_language_model is frozen"),
        ({"vision_tower_lr": 1e-4}, "vision_tower_lr is 0.0001, but tune_vision_tower is frozen"),
        ({"connector_lr": -1.0}, "connector_lr is -1.0, expected a number, 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"save_only": "adapters"}, "save_only is 'adapters', expected one of None, connectors"),
        ({"save_only": "connectors", "tune_language_model": "full"}, "what the others learn would be lost"),
        ({"tune_language_model": "qlora"}, "qlora, which needs a CUDA GPU, and found none .torch .* lora"),
        ({"tune_vision_tower": "full", "streaming": True, "max_steps": 1, "memory_bank": "b"}, "and streaming true"),
    ],
)
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(output_dir=str(tmp_path), **settings)


def test_nothing_is_left_to_train_without_memory(make_model, make_processor, dataset, tmp_path):
    model = make_model(memory_top_k=0)
    with pytest.raises(ValueError, match="the model has no memory"):
        run(1, model, make_processor(model), dataset, None, tmp_path, tune_connector="frozen")


def test_cached_features_are_of_a_frozen_tower(make_model, processor, dataset, bank, features, tmp_path):
    with pytest.raises(ValueError, match="tune_vision_tower is 'full' and cache_features true"):
        AlignmentConfig(output_dir=str(tmp_path), tune_vision_tower="full", cache_features=True)
    with pytest.raises(ValueError, match="vision_features were given, which it made before"):
        run(1, make_model(), processor, dataset, bank, tmp_path, features, tune_vision_tower="full")


@pytest.mark.parametrize(("stage", "language_model"), [(1, "frozen"), (2, "full"), (2, "lora")])
def test_a_learning_rate_for_each_part(stage, language_model, make_model, processor, dataset, bank, tmp_path):
    """Scheduled alike; only weights decay, as in transformers."""
    rates = {"vision_tower_lr": 1e-3, "connector_lr": 2e-3, "memory_connector_lr": 3e-3}
    expected = {"vision_tower": 1e-3, "connector": 2e-3, "memory_connector": 3e-3}
    if language_model != "frozen":
        rates["language_model_lr"] = expected["language_model"] = 4e-3
    model = make_model()
    trainer = run(
        stage,
        model,
        processor,
        dataset,
        bank,
        tmp_path,
        tune_vision_tower="full",
        tune_language_model=language_model,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_steps=2,
        save_strategy="no",
        **rates,
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        parts = {part_of(names.get(parameter, "language_model.lora_A")) for parameter in group["params"]}
        (part,) = parts
        assert group["initial_lr"] == expected.pop(part, None) or group["initial_lr"] == rates[f"{part}_lr"]
        assert group["lr"] == 0.0  # after the last step of a linear schedule
        assert group["weight_decay"] in (0.0, 0.1)
        if group["weight_decay"] == 0.1:
            assert not any(names.get(parameter, "").endswith("bias") for parameter in group["params"])
    assert not expected


@pytest.mark.parametrize("stage", [1, 2])
def test_the_table_is_printed(stage, make_model, processor, dataset, bank, tmp_path, capsys):
    model = make_model()
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    run(stage, model, processor, dataset, bank, tmp_path, max_steps=1, memory_connector_lr=5e-3)
    printed = capsys.readouterr().out.splitlines()
    start = next(index for index, line in enumerate(printed) if line.startswith("part"))
    rows = {line[:16].strip(): line.split() for line in printed[start + 1 : start + 6]}
    assert list(rows) == ["vision tower", "connector", "memory connector", "language model", "all"]
    assert rows["vision tower"][2:] == ["frozen", f"{sizes['vision_tower']:,}", "0", "float32", "-"]
    memory = f"{sizes['memory_connector']:,}"
    assert rows["memory connector"][2:] == ["full", memory, memory, "float32", "0.005"]
    assert rows["language model"][2] == ("frozen" if stage == 1 else "full")
    assert rows["all"][1] == f"{sum(sizes.values()):,}"


def activations(model, module: torch.nn.Module, batch: dict) -> int:
    """Bytes that one forward pass of the model keeps for the backward pass inside `module`, weights not counted."""
    kept, inside = [], []
    weights_of_model = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if inside and tensor.untyped_storage().data_ptr() not in weights_of_model:
            kept.append(tensor.nbytes)
        return tensor

    before = module.register_forward_pre_hook(lambda *_: inside.append(True))
    after = module.register_forward_hook(lambda *_: inside.clear())
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch, supervised_logits_only=True)
    before.remove()
    after.remove()
    return sum(kept)


def test_activations_that_are_kept(make_model, make_processor, dataset, bank, tmp_path):
    """None of a frozen tower, those behind the first layer that trains of a part of it; less of a frozen LM."""
    model = make_model(vision_feature_layer=-1)
    processor = make_processor(model)
    batch = TrainingCollator(processor, None, bank)(list(dataset.select(range(4))))

    def kept(config, module):
        set_trainable(config, model)
        return activations(model.train(), module, batch)

    tower, language_model = model.model.vision_tower, model.model.language_model
    folder = str(tmp_path)
    frozen, part, full = (
        kept(AlignmentConfig(output_dir=folder, tune_vision_tower=policy), tower)
        for policy in ("frozen", "from layer 1", "full")
    )
    assert frozen == 0 < part < full
    frozen, full = (kept(config(output_dir=folder), language_model) for config in (AlignmentConfig, InstructionConfig))
    assert 0 < frozen < 0.8 * full
