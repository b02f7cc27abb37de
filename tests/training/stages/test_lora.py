"""Adapters on the language model: trained, kept in checkpoints, merged."""

import pytest
import torch
from safetensors import safe_open

from tinyalign_vlm import TinyAlignForConditionalGeneration
from tinyalign_vlm.training.arguments.instruction import InstructionConfig
from tinyalign_vlm.training.arguments.tuning import TuningArguments
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.stages.lora import adapters
from tinyalign_vlm.training.stages.trainable_parts import set_trainable

from .short_runs import losses, make_trainer, run, weights


@pytest.mark.parametrize("text", ["llama", "phi"])
def test_adapters_are_merged(text, make_model, make_processor, dataset, bank, tmp_path):
    """The model afterwards says what it said with its adapters, and its weights have the names they had."""
    model = make_model(text=text)
    processor = make_processor(model, text=text)
    batch = TrainingCollator(processor, None, bank)(list(dataset.select(range(4))))
    before = weights(model)
    config = InstructionConfig(output_dir=str(tmp_path), tune_language_model="lora", lora_r=3)
    set_trainable(config, model)
    with adapters(config, model):
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert sum("lora_" in name for name in trained) > 4 and all(
            "lora_" in name or "connector" in name for name in trained
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            expected = model.eval()(**batch).logits
    after = weights(model)
    assert before.keys() == after.keys()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("layers" in name and name.endswith("weight") for name in changed)


@pytest.mark.parametrize("policy", ["lora", "qlora"])
def test_nothing_is_left_of_a_run_that_is_interrupted(policy, make_model, tmp_path, monkeypatch):
    """Nor of one whose adapters do not fit: the model trains again, and from what it had learnt."""
    if policy == "qlora":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    monkeypatch.setattr(TuningArguments, "_check_lora", lambda self: None)
    model = make_model()
    before, classes = weights(model), [type(module) for module in model.modules()]
    attributes = set(vars(model.base_model.language_model))
    config = InstructionConfig(output_dir=str(tmp_path), tune_language_model=policy)
    set_trainable(config, model)
    with pytest.raises(KeyboardInterrupt), adapters(config, model):
        for name, parameter in model.named_parameters():
            if "layers.0.mlp.up_proj.lora_B" in name:
                torch.nn.init.ones_(parameter)
        raise KeyboardInterrupt
    after = weights(model)
    assert before.keys() == after.keys() and [type(module) for module in model.modules()] == classes
    assert set(vars(model.base_model.language_model)) == attributes
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.language_model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="in its weights, expected it as it was before: load it again"):
        adapters(config, model).__enter__()
    unfit = InstructionConfig(
        output_dir=str(tmp_path / "other"), tune_language_model=policy, lora_target_modules=["query"]
    )
    with pytest.raises(ValueError, match="not found"), adapters(unfit, model):
        raise AssertionError("There are no such adapters.")
    assert [type(module) for module in model.modules()] == classes
    assert set(vars(model.base_model.language_model)) == attributes


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_with_adapters_loads_in_one_call(stage, make_model, processor, dataset, bank, features, tmp_path):
    model = make_model()
    settings = {"tune_language_model": "lora", "lora_target_modules": ["q_proj", "v_proj"], "save_steps": 2}
    trainer = run(stage, model, processor, dataset, bank, tmp_path, features, max_steps=8, **settings)
    assert losses(trainer)[-1] < losses(trainer)[0]
    with safe_open(tmp_path / "checkpoint-8" / "trained.safetensors", "pt") as file:
        others = [name for name in file.keys() if "connector" not in name]
        assert others and all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in others)
    assert not (tmp_path / "checkpoint-8" / "model.safetensors").exists()
    model.save_pretrained(tmp_path / "saved")
    loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in weights(model).items())


def test_target_modules_that_are_not_there(make_model, processor, dataset, bank, features, tmp_path):
    settings = {"tune_language_model": "lora", "lora_target_modules": ["query"]}
    with pytest.raises(ValueError, match="Target modules .*query.* not found"):
        run(2, make_model(), processor, dataset, bank, tmp_path, features, **settings)


def test_adapters_on_four_bits(make_model, processor, dataset, bank, features, tmp_path, monkeypatch, capsys):
    """On the CPU, which bitsandbytes can do and nobody should: the frozen weights come back as they were."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    monkeypatch.setattr(TuningArguments, "_check_lora", lambda self: None)
    settings = {"tune_language_model": "qlora", "max_steps": 12, "learning_rate": 1e-2, "connector_lr": 0.0}
    model = make_model()
    before = weights(model)
    trainer = run(2, model, processor, dataset, bank, tmp_path, features, memory_connector_lr=0.0, **settings)
    assert "4 bits" in capsys.readouterr().out
    assert losses(trainer)[-1] < losses(trainer)[0]
    after = weights(model)
    assert before.keys() == after.keys() and all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    projection = "model.language_model.layers.0.self_attn.q_proj.weight"
    difference = after[projection] - before[projection]
    assert 0 < torch.linalg.matrix_rank(difference, rtol=1e-3) <= 16 and difference.abs().max() < 0.5


def test_adapters_are_merged_once(make_model, processor, dataset, bank, features, tmp_path):
    """A cell that is run again must not merge the adapters of its checkpoint a second time."""
    settings = {"tune_language_model": "lora", "max_steps": 2}
    model = make_model()
    trainer = run(2, model, processor, dataset, bank, tmp_path, features, **settings)
    after = weights(model)
    for again in (trainer, make_trainer(2, model, processor, dataset, bank, tmp_path, features, **settings)):
        with pytest.raises(ValueError, match="load it again, and make a new trainer"):
            again.train()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(model).items())
    run(2, model, processor, dataset, bank, tmp_path / "next", features, **settings)
