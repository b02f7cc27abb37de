"""What is logged beside the loss, against what a reader would count."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from tinyalign_vlm.training.arguments.tuning import TuningArguments
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.stages import metrics as module
from tinyalign_vlm.training.stages.metrics import flops_per_token, gradient_norms, peak_flops
from tinyalign_vlm.training.stages.trainable_parts import parts_of, set_trainable

from .short_runs import entries, run


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on by one second at every look."""
    seconds = iter(range(1000000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(seconds)))


@pytest.fixture
def scored(dataset, bank):
    """The rows with similarities and with the names of their images; every second image is not in the bank."""
    known = [row["source_id"] for row in bank.rows(range(12))]
    names = [[name if index % 2 else "0" * len(name)] for index, name in enumerate(known)]
    scores = [[0.5 + 0.01 * row, 0.25] for row in range(12)]
    return dataset.add_column("memory_scores", scores).add_column("source_ids", names)


@pytest.mark.parametrize("stage", [1, 2])
def test_logged_with_every_loss(stage, make_model, processor, scored, bank, features, tmp_path):
    trainer = run(stage, make_model(), processor, scored, bank, tmp_path, features, logging_steps=2)
    parts = {"connector", "memory_connector"} | ({"language_model"} if stage == 2 else set())
    for entry in entries(trainer):
        assert {name for name in entry if name.startswith("grad_norm_")} == {f"grad_norm_{part}" for part in parts}
        assert 0.05 < entry["memory_gb"] < 30 and "mfu" not in entry
        total = sum(entry[f"grad_norm_{part}"] ** 2 for part in parts) ** 0.5
        assert total == pytest.approx(entry["grad_norm"], rel=1e-3) and total > 1  # before it is clipped to 1
        assert entry["memory_slots_off"] == 0
        tokens_a_row = entry["tokens_per_second"] / entry["samples_per_second"]
        assert 18 + 3 < tokens_a_row < 60
    assert len(entries(trainer)) == 2
    assert not trainer.model.base_model.memory_connector._forward_pre_hooks


def test_counts_of_accumulated_batches(make_model, processor, scored, bank, features, tmp_path, clock, monkeypatch):
    """6 rows a step in batches of 2, two steps an epoch: all rows are in two steps, whatever their order."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "logging_steps": 2}
    seconds = []
    read = module.Meter.read

    def timed(self, logs):
        started = self.started
        found = read(self, logs)
        seconds.append(self.started - 1 - started)
        return found

    monkeypatch.setattr(module.Meter, "read", timed)
    trainer = run(1, make_model(), processor, scored, bank, tmp_path, features, max_steps=2, **settings)
    (entry,) = entries(trainer)
    batch = TrainingCollator(processor, None, bank)(list(scored))
    assert entry["samples_per_second"] == pytest.approx(12 / seconds[0], rel=1e-4)
    assert entry["tokens_per_second"] == pytest.approx(batch["attention_mask"].sum().item() / seconds[0], rel=1e-4)
    assert entry["neighbour_similarity"] == pytest.approx(np.mean(scored["memory_scores"]), rel=1e-4)
    assert entry["own_samples_excluded"] == 0.5


def test_slots_that_are_off_do_not_count_as_similar(make_model, processor, scored, bank, features, tmp_path):
    """Below the threshold of 0.4 are all second neighbours."""
    model = make_model(retrieval_threshold=0.4)
    settings = {"per_device_train_batch_size": 12, "max_steps": 1}
    (entry,) = entries(run(1, model, processor, scored, bank, tmp_path / "a", features, **settings))
    assert entry["memory_slots_off"] == 0.5
    assert entry["neighbour_similarity"] == pytest.approx(np.mean(scored["memory_scores"], axis=0)[0], rel=1e-4)
    trainer = run(1, make_model(), processor, scored, bank, tmp_path / "b", features, memory_dropout=1.0, **settings)
    assert 0.3 < entries(trainer)[0]["memory_slots_off"] < 1


def test_without_memory_nothing_is_said_of_it(make_model, make_processor, dataset, tmp_path):
    model = make_model(memory_top_k=0)
    rows = dataset.remove_columns("memory_ids")
    for entry in entries(run(1, model, make_processor(model), rows, None, tmp_path)):
        assert not {"neighbour_similarity", "own_samples_excluded", "memory_slots_off"} & entry.keys()
        assert entry["grad_norm_connector"] == pytest.approx(entry["grad_norm"], rel=1e-3)


def test_norms_cost_nothing_between_logs(make_model, processor, dataset, bank, features, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "gradient_norms", lambda model: calls.append(1) or gradient_norms(model))
    run(1, make_model(), processor, dataset, bank, tmp_path, features, max_steps=6, logging_steps=3)
    assert len(calls) == 2


def test_norms_of_the_parts_are_those_of_torch(make_model, processor, dataset, bank):
    model = make_model().requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    model(**TrainingCollator(processor, None, bank)(list(dataset))).loss.backward()
    found = gradient_norms(model)
    assert found.keys() == {"connector", "memory_connector", "language_model"}
    for part in ("connector", "memory_connector"):
        gradients = [parameter.grad.flatten() for parameter in getattr(model.model, part).parameters()]
        torch.testing.assert_close(found[part], torch.cat(gradients).norm())


def test_evaluating_and_saving_take_no_time_from_training(clock, make_model):
    arguments = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(model=make_model(), args=arguments)
    meter = module.Meter(trainer, None)  # 0
    meter.on_step_end(None, None, None)  # 1
    meter.on_evaluate(None, None, None)  # 2: a second was not of training
    meter.on_save(None, None, None)  # 3
    assert module.time.monotonic() - meter.started == 2


def test_flops_are_those_of_the_literature(make_model):
    """6 per parameter of the language model that trains, 4 per frozen one."""
    model = make_model()
    parameters = sum(parameter.numel() for parameter in model.model.language_model.parameters())  # the head is tied
    for policy, flops in (("frozen", 4), ("full", 6)):
        config = TuningArguments(tune_language_model=policy)
        config.learning_rate = 1e-3
        set_trainable(config, model)
        assert flops_per_token(parts_of(config, model)) == flops * parameters


def test_mfu_where_the_gpu_is_known(make_model, processor, dataset, bank, tmp_path, monkeypatch, clock):
    monkeypatch.setattr(module, "peak_flops", lambda: 1e9)
    settings = {"per_device_train_batch_size": 12, "max_steps": 1}
    trainer = run(1, make_model(), processor, dataset, bank, tmp_path, **settings)
    (entry,) = entries(trainer)
    assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops_per_token(trainer.parts) / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", None),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A10G", None),
    ],
)
def test_peaks_of_known_gpus(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops() == peak


def test_trackers_get_them(make_model, processor, dataset, bank, features, tmp_path, monkeypatch):
    """Whatever `report_to` names is a callback with `on_log`."""
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(copy.copy(logs))

    import transformers.trainer as trainer_module

    monkeypatch.setattr(trainer_module, "get_reporting_integration_callbacks", lambda report_to: [Tracker])
    run(1, make_model(), processor, dataset, bank, tmp_path, features, max_steps=1)
    assert {"tokens_per_second", "memory_gb", "grad_norm_connector", "memory_slots_off"} <= logged[0].keys()
