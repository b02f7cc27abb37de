"""Both trainers: what trains, the loss, accumulation, evaluation, resuming, saving."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, pipeline
from transformers.modeling_layers import GradientCheckpointingLayer

from tinyalign_vlm import TinyAlignForConditionalGeneration
from tinyalign_vlm.training.data.chats import encode_chat
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.features import cache_vision_features
from tinyalign_vlm.training.data.neighbours import find_neighbours, source_ids_of
from tinyalign_vlm.training.evaluation.choices import score_answers
from tinyalign_vlm.training.hub.run_facts import stage_record
from tinyalign_vlm.training.stages.checkpoints import load_trained, save_trained
from tinyalign_vlm.training.stages.trainers import AlignmentTrainer

from .short_runs import STAGES, changed_parts, losses, make_trainer, run, weights


@pytest.mark.parametrize(
    ("stage", "bf16", "expected"),
    [
        (1, False, {"connector", "memory_connector"}),
        (1, True, {"connector", "memory_connector"}),
        (2, False, {"connector", "memory_connector", "language_model", "weight"}),
        (2, True, {"connector", "memory_connector", "language_model", "weight"}),
    ],
)
def test_only_what_a_stage_trains_changes(
    stage, bf16, expected, make_model, processor, dataset, bank, features, tmp_path
):
    model = make_model()
    before = weights(model)
    trainer = run(stage, model, processor, dataset, bank, tmp_path, features, bf16=bf16)
    after = weights(model)
    assert changed_parts(before, after) == expected
    assert all(before[name].dtype == after[name].dtype for name in before)
    parts = ("connector.",) if stage == 1 else ("connector.", "language_model.", "lm_head.")
    for name, parameter in model.named_parameters():
        trains = any(part in name for part in parts)
        assert parameter.requires_grad == trains and (parameter.grad is None or trains)
    assert all(np.isfinite(losses(trainer))) and losses(trainer)[-1] < losses(trainer)[0]
    assert not model.training and "forward" not in vars(model)


ADAPTERS = {"tune_language_model": "lora", "memory_dropout": 0.5}


@pytest.mark.parametrize(
    ("stage", "settings"),
    [(1, {}), (2, {}), (1, ADAPTERS), (2, ADAPTERS), (1, {"tune_vision_tower": "full", "memory_dropout": 1.0})],
)
def test_resuming_gives_the_uninterrupted_trajectory(
    stage, settings, make_model, processor, dataset, bank, features, tmp_path
):
    settings = {"max_steps": 6, "save_steps": 3, "save_total_limit": 2, **settings}
    features = None if "tune_vision_tower" in settings else features
    whole, resumed = make_model(), make_model()
    trainer = run(stage, whole, processor, dataset, bank, tmp_path / "whole", features, **settings)

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Killed

    with pytest.raises(Killed):
        run(stage, resumed, processor, dataset, bank, tmp_path / "resumed", features, callbacks=[Kill()], **settings)
    for step in ("4", "5"):  # killed while saving; out of space
        (tmp_path / "resumed" / f"checkpoint-{step}").mkdir()
    (tmp_path / "resumed" / "checkpoint-5" / "trainer_state.json").write_text('{"epoch":')
    resumed = make_model()
    again = run(stage, resumed, processor, dataset, bank, tmp_path / "resumed", features, **settings)
    assert losses(again) == losses(trainer) and len(losses(again)) == 6
    assert not changed_parts(weights(whole), weights(resumed))

    # from an earlier checkpoint, if one asks for it
    chosen = make_model()
    earlier = {**settings, "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-3")}
    again = run(stage, chosen, processor, dataset, bank, tmp_path / "whole", features, **earlier)
    assert losses(again) == losses(trainer) and not changed_parts(weights(whole), weights(chosen))

    # not even with the best of its checkpoints, in a folder that was moved
    (tmp_path / "whole").rename(tmp_path / "moved")
    state = tmp_path / "moved" / "checkpoint-6" / "trainer_state.json"
    best = {"best_model_checkpoint": str(tmp_path / "whole" / "checkpoint-6")}
    state.write_text(json.dumps(json.loads(state.read_text()) | best))
    moved, evaluates = make_model(), {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    rows = dataset.add_column("feature_index", list(range(len(dataset)))) if features is not None else dataset
    run(stage, moved, processor, dataset, bank, tmp_path / "moved", features, rows, **settings, **evaluates)
    assert not changed_parts(weights(whole), weights(moved))

    # a complete run is not trained again, and another run is not taken for it
    once_more = make_model()
    run(stage, once_more, processor, dataset, bank, tmp_path / "resumed", features, **settings)
    assert not changed_parts(weights(whole), weights(once_more))
    with pytest.raises(ValueError, match="learning_rate: 0.01 then, 0.02 now"):
        run(stage, whole, processor, dataset, bank, tmp_path / "resumed", features, learning_rate=2e-2, **settings)


@pytest.mark.parametrize("settings", [{}, {"tune_language_model": "full"}])
def test_a_checkpoint_in_the_middle_of_a_run_loads(checkpoints, make_processor, dataset, tmp_path, settings):
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        checkpoints["siglip"], checkpoints["llama"], memory_top_k=0
    )
    processor = make_processor(model)
    seen = {}

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(model)

    rows = dataset.remove_columns([name for name in dataset.column_names if name == "memory_ids"])
    settings = {"save_total_limit": 3, **settings}
    run(1, model, processor, rows, None, tmp_path, max_steps=3, save_steps=1, callbacks=[Look()], **settings)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2")
    assert not changed_parts(seen[2], weights(loaded)) and changed_parts(seen[2], weights(model))
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "checkpoint-2"))
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (9, 9))}]}]
    assert pipe(text=chat, max_new_tokens=1)[0]["generated_text"][-1]["role"] == "assistant"


def test_a_checkpoint_that_needs_the_rest_of_the_run_says_so(make_model, processor, dataset, bank, tmp_path):
    run(2, make_model(), processor, dataset, bank, tmp_path, max_steps=1, save_steps=1, tune_language_model="lora")
    for load in (AutoModelForImageTextToText.from_pretrained, TinyAlignForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match="checkpoint-1 is a checkpoint in the middle of a run .* goes on from it"):
            load(str(tmp_path / "checkpoint-1"))


def test_killed_while_a_checkpoint_is_written_again(
    make_model, processor, dataset, bank, features, tmp_path, monkeypatch
):
    """The run goes on from an earlier checkpoint, by choice, and dies within the next one, which was complete."""
    settings = {"max_steps": 4, "save_steps": 2, "save_total_limit": 2}
    whole, resumed = make_model(), make_model()
    trainer = run(1, whole, processor, dataset, bank, tmp_path, features, **settings)

    class Killed(BaseException):
        pass

    def kill(self, folder):
        Path(folder, "trained.safetensors").write_bytes(b"half")
        raise Killed

    chosen = {**settings, "resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AlignmentTrainer, "_save_optimizer_and_scheduler", kill)
        run(1, make_model(), processor, dataset, bank, tmp_path, features, **chosen)
    again = run(1, resumed, processor, dataset, bank, tmp_path, features, **settings)
    assert losses(again) == losses(trainer) and not changed_parts(weights(whole), weights(resumed))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_finished_run_is_loaded_and_not_trained(
    stage, make_model, processor, dataset, bank, features, tmp_path, capsys
):
    """4 steps end within the second epoch of 3: `Trainer` would do a fifth."""
    first, again = make_model(), make_model()
    trainer = run(stage, first, processor, dataset, bank, tmp_path, features)
    loaded = run(stage, again, processor, dataset, bank, tmp_path, features)
    assert loaded.state.global_step == 4 and losses(loaded) == losses(trainer)
    assert not changed_parts(weights(first), weights(again))
    assert not again.training and "forward" not in vars(again)
    assert f"{tmp_path} is finished: nothing to train" in capsys.readouterr().out


def test_stage_1_trained_anew_is_another_run_of_stage_2(make_model, processor, dataset, bank, features, tmp_path):
    model, folder = make_model(), tmp_path / "stage1"
    model.save_pretrained(folder)

    def train():
        trainer = make_trainer(2, make_model(), processor, dataset, bank, tmp_path / "2", features, max_steps=1)
        trainer.args.model = str(folder)
        trainer.train()

    train()
    train()  # is finished
    model.base_model.connector.linear_1.weight.data += 1
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="model_weights: "):
        train()


def test_a_run_that_begins_anew(make_model, processor, dataset, bank, features, tmp_path):
    """The checkpoints that it leaves are its own, and so is what goes on from them."""
    run(1, make_model(), processor, dataset, bank, tmp_path, features, save_steps=2)
    anew = {"save_steps": 2, "resume_from_checkpoint": False}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run(1, make_model(), processor, dataset, bank, tmp_path, features, callbacks=[Stop()], **anew)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    again = run(1, make_model(), processor, dataset, bank, tmp_path, features, save_steps=2)
    assert again.state.global_step == 4 and len(losses(again)) == 4


@pytest.mark.parametrize("stage", [1, 2])
def test_training_a_model_again_is_as_precise(stage, make_model, processor, dataset, bank, features, tmp_path):
    """bfloat16 is around its forward as the first time."""
    found = []
    for times in (1, 2):
        model = make_model()
        for time in range(times):
            model.load_state_dict(make_model().state_dict())
            folder = tmp_path / f"{times}{time}"
            trainer = run(stage, model, processor, dataset, bank, folder, features, bf16=True)
        found.append(losses(trainer))
    assert found[0] == found[1]


def test_a_loss_of_ones_own(make_model, processor, dataset, bank, features, tmp_path):
    config, trainer = STAGES[1]
    rows = dataset.add_column("feature_index", list(range(len(dataset))))
    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer(
        make_model(),
        config(output_dir=str(tmp_path), **settings),
        train_dataset=dataset,
        eval_dataset=rows,
        processing_class=processor,
        memory_bank=bank.for_any_tower(),
        vision_features=features,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.float().square().mean(),
    )
    trainer.train()
    assert losses(trainer, "eval_loss")


def test_workers_that_persist_evaluate_other_rows(make_model, processor, dataset, bank, features, tmp_path):
    rows = dataset.add_column("feature_index", list(range(len(dataset))))
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(1, make_model(), processor, dataset, bank, tmp_path, features, **settings)
    found = [trainer.evaluate(part)["eval_loss"] for part in (rows, rows.select(range(3)))]
    assert found[0] != found[1]


def test_adapters_are_saved_after_training(make_model, processor, dataset, bank, features, tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.save_model(tmp_path / "best")

    settings = {"tune_language_model": "lora", "callbacks": [Save()]}
    trainer = make_trainer(2, make_model(), processor, dataset, bank, tmp_path, features, **settings)
    with pytest.raises(ValueError, match="merged at the end of train.., expected save_model.. after it"):
        trainer.train()


def test_other_rows_or_another_reading_are_another_run(make_model, processor, dataset, bank, features, tmp_path):
    run(1, make_model(), processor, dataset, bank, tmp_path, features, max_steps=1)
    copy = datasets.Dataset.from_list(list(dataset))  # its fingerprint is random
    run(1, make_model(), processor, copy, bank, tmp_path, features, max_steps=1)
    other = dataset.select(range(11, -1, -1))
    with pytest.raises(ValueError, match="rows_hash: "):
        run(1, make_model(), processor, other, bank, tmp_path, features, max_steps=1)
    model = make_model(memory_input="both")
    with pytest.raises(ValueError, match="memory_input: 'latents' then, 'both' now"):
        run(1, model, processor, dataset, bank, tmp_path, features, max_steps=1)


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_equals_a_large_batch(stage, make_model, processor, dataset, bank, features, tmp_path):
    """Rows of different lengths: a mean of the small batches' means would differ."""
    large, small = make_model(), make_model()
    settings = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    of_large = run(
        stage, large, processor, dataset, bank, tmp_path / "large", features, per_device_train_batch_size=6, **settings
    )
    of_small = run(
        stage,
        small,
        processor,
        dataset,
        bank,
        tmp_path / "small",
        features,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **settings,
    )
    np.testing.assert_allclose(losses(of_large), losses(of_small), rtol=1e-4)
    after = weights(small)
    for name, tensor in weights(large).items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_loss_is_that_of_the_full_logits(stage, make_model, processor, dataset, bank, features, tmp_path):
    model = make_model()
    batch = TrainingCollator(processor, features, bank)(
        [{**row, "feature_index": index} for index, row in enumerate(dataset)]
    )
    with torch.no_grad():
        expected = model(**batch).loss.item()
    trainer = run(
        stage, model, processor, dataset, bank, tmp_path, features, per_device_train_batch_size=12, max_steps=1
    )
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_evaluation_loss_is_that_of_the_tokens_whatever_the_batches(
    stage, make_model, processor, dataset, bank, features, tmp_path
):
    """Answers of 3 to 10 tokens: the mean of the batches' means would be another in batches of 5 and 2."""
    settings = {"max_steps": 1, "eval_samples": 0, "learning_rate": 1e-9}
    rows = dataset.select(range(7)).add_column("feature_index", list(range(7)))
    model, found = make_model(), []
    for size in (5, 7):
        batches = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": size}
        folder = tmp_path / str(size)
        trainer = run(stage, model, processor, rows, bank, folder, features, rows, **settings, **batches)
        found += losses(trainer, "eval_loss")
    questions = rows.map(lambda row: {"messages": row["messages"][:-1]})
    answers = [[messages[-1]["content"][0]["text"]] for messages in rows["messages"]]
    measured = score_answers(model, processor, questions, answers, bank, features)
    assert found == pytest.approx([measured.losses.sum() / measured.num_tokens.sum()] * 2, rel=2e-5)


def test_other_vision_features_are_another_run(make_model, processor, dataset, bank, tmp_path):
    run(1, make_model(), processor, dataset, bank, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="vision_feature_layer: -2 then, -1 now"):
        run(1, make_model(vision_feature_layer=-1), processor, dataset, bank, tmp_path, max_steps=1)


def test_a_frozen_language_model_has_no_dropout_with_checkpointing_either(
    make_model, make_processor, dataset, bank, tmp_path
):
    """Phi-2 has; the layers themselves stay in training mode, in which they recompute their activations."""
    found = {}
    for checkpointing in (False, True):
        model = make_model(text="phi")
        language_model = model.base_model.language_model
        for layer in language_model.layers:
            layer.resid_dropout.p = layer.self_attn.attention_dropout = 0.5
        modes = []
        language_model.layers[0].register_forward_pre_hook(lambda layer, _, modes=modes: modes.append(layer.training))
        processor = make_processor(model, text="phi")
        settings = {"activation_checkpointing": checkpointing, "max_steps": 2, "warmup_steps": 0}
        trainer = run(1, model, processor, dataset, bank, tmp_path / str(checkpointing), **settings)
        found[checkpointing] = losses(trainer)
        assert set(modes) == {checkpointing}
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_a_tower_that_trains_computes_activations_again_too(make_model, processor, dataset, bank, tmp_path):
    """It is in evaluation mode, in which its layers would keep them all."""
    found = {}
    for checkpointing in (False, True):
        model, modes = make_model(), []
        layers = [
            module
            for module in model.base_model.vision_tower.modules()
            if isinstance(module, GradientCheckpointingLayer)
        ]

        def keep_mode(layer, _, model=model, modes=modes):
            if model.training:  # what trains is found out before
                modes.append(layer.training)

        layers[0].register_forward_pre_hook(keep_mode)
        settings = {"activation_checkpointing": checkpointing, "tune_vision_tower": "full", "max_steps": 2}
        trainer = run(1, model, processor, dataset, bank, tmp_path / str(checkpointing), **settings)
        found[checkpointing] = losses(trainer)
        assert set(modes) == {checkpointing}
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_the_saved_step_is_that_of_the_checkpoint_that_is_loaded(make_model, processor, dataset, bank, tmp_path):
    """The best evaluation may lie between two checkpoints."""
    trainer = run(1, make_model(), processor, dataset, bank, tmp_path, max_steps=1)
    trainer.args.load_best_model_at_end = True
    trainer.state.best_global_step, trainer.state.best_model_checkpoint = 3, str(tmp_path / "checkpoint-2")
    assert stage_record("stage 1", trainer).saved_step == 2
    trainer.state.best_model_checkpoint = None
    assert stage_record("stage 1", trainer).saved_step is None


def test_learning_rates_of_the_parts(make_model, processor, dataset, bank, features, tmp_path):
    model = make_model()
    before = weights(model)
    trainer = run(1, model, processor, dataset, bank, tmp_path, features, memory_connector_lr=5e-3, connector_lr=0.0)
    assert changed_parts(before, weights(model)) == {"memory_connector"}
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0, 5e-3}


def test_connectors_alone_are_saved_and_loaded(make_model, tmp_path):
    trained, other = make_model(), make_model()
    torch.nn.init.ones_(trained.model.connector.linear_1.weight)
    save_trained(trained, tmp_path)
    load_trained(other, tmp_path)
    assert not changed_parts(weights(trained), weights(other))


def test_a_random_bank_trains_as_well_and_differently(
    make_model, model, processor, images, dataset, bank, features, tmp_path
):
    real = run(1, make_model(), processor, dataset, bank, tmp_path / "real", features)
    shuffled = bank.shuffled()
    _, neighbours = find_neighbours(shuffled, model, features, 2, source_ids_of(images))
    dataset = dataset.remove_columns("memory_ids").add_column("memory_ids", neighbours.tolist())
    random = run(1, make_model(), processor, dataset, shuffled, tmp_path / "random", features)
    assert losses(real) != losses(random) and np.isfinite(losses(random)).all()


def test_the_baseline_trains_without_a_bank_from_images_in_workers(make_model, make_processor, dataset, tmp_path):
    model = make_model(memory_top_k=0)
    processor = make_processor(model)
    features = cache_vision_features(model, processor, dataset["image"], tmp_path / "features")
    from_images = run(1, model, processor, dataset, None, tmp_path / "images", dataloader_num_workers=2, max_steps=2)
    cached = run(1, make_model(memory_top_k=0), processor, dataset, None, tmp_path / "cached", features, max_steps=2)
    np.testing.assert_allclose(losses(from_images), losses(cached), rtol=1e-3)


def test_workers_read_the_bank(make_model, processor, dataset, bank, features, tmp_path):
    bank.search(np.ones((1, bank.config.key_dim), np.float32), 1)  # a search in a worker would hang now
    alone = run(1, make_model(), processor, dataset, bank, tmp_path / "alone", features)
    workers = run(1, make_model(), processor, dataset, bank, tmp_path / "workers", features, dataloader_num_workers=2)
    assert losses(alone) == losses(workers)


def test_evaluation_during_training(make_model, processor, dataset, bank, features, tmp_path):
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    indexed = dataset.add_column("feature_index", list(range(12)))
    trainer = run(1, make_model(), processor, dataset, bank, tmp_path / "a", features, indexed, **settings)
    assert len(losses(trainer, "eval_loss")) == 2
    images = run(1, make_model(), processor, dataset, bank, tmp_path / "b", features, dataset, **settings)
    np.testing.assert_allclose(losses(images, "eval_loss"), losses(trainer, "eval_loss"), rtol=1e-3)
    with pytest.raises(ValueError, match="The data set has no image, its columns are .* a column feature_index"):
        trainer.evaluate(dataset.remove_columns("image"))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_trainer_is_used_as_any_other(stage, make_model, processor, dataset, bank, tmp_path):
    """Made, evaluated, trained, evaluated and saved, in any order, and the result is one for `from_pretrained`."""
    model, plain = make_model(), make_model()
    settings = {"eval_samples": 0, "tune_language_model": "lora", "lora_dropout": 0.5, "bf16": True}
    trainer = make_trainer(stage, model, processor, dataset, bank, tmp_path / "a", None, dataset, **settings)
    before = trainer.evaluate()["eval_loss"]
    output = trainer.train()
    assert output.global_step == 4 and output.training_loss == pytest.approx(np.mean(losses(trainer)))
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    assert trainer.evaluate(dataset.select(range(3)))["eval_loss"] != after
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert not changed_parts(weights(model), weights(loaded))
    assert AutoProcessor.from_pretrained(tmp_path / "saved").num_image_tokens == processor.num_image_tokens
    assert not model.training and "forward" not in vars(model)

    # what was asked before the first step changes nothing
    other = run(stage, plain, processor, dataset, bank, tmp_path / "b", **settings)
    assert losses(other) == losses(trainer)
    once_more = make_trainer(stage, make_model(), processor, dataset, bank, tmp_path / "b", **settings)
    assert once_more.train().training_loss == pytest.approx(output.training_loss)  # loaded
    anew = make_trainer(stage, make_model(), processor, dataset, bank, tmp_path / "b", **settings)
    assert anew.train(resume_from_checkpoint=False).training_loss == output.training_loss and losses(anew)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank": None}, "memory_top_k = 2, but no bank was given"),
        ({"model": {"memory_top_k": 0}}, "memory_top_k = 0, but a bank was given"),
        ({"drop": "memory_ids"}, "no memory_ids, its columns are"),
        ({"rows": 0}, "The data set has no rows"),
        ({"features": 3}, "3 vision_features for 12 rows"),
        ({"model": {"memory_top_k": 3}}, "2 memory_ids an image, expected memory_top_k = 3"),
    ],
)
def test_bad_input(change, message, make_model, processor, dataset, bank, features, tmp_path):
    model = make_model(**change.get("model", {}))
    dataset = dataset.remove_columns(change["drop"]) if "drop" in change else dataset
    dataset = dataset.select(range(change.get("rows", 12)))
    with pytest.raises(ValueError, match=message):
        run(1, model, processor, dataset, change.get("bank", bank), tmp_path, features[: change.get("features", 12)])


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_of_text_alone(stage, make_model, processor, dataset, bank, tmp_path):
    """It trains nothing in stage 1, and the language model in stage 2; its loss is that of the text."""
    model = make_model()
    before = weights(model)
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a red square"}]
    rows = datasets.Dataset.from_list([{"images": [], "messages": chat, "memory_ids": []}] * 4)
    with torch.no_grad():
        expected = model(**TrainingCollator(processor, None, bank)(list(rows))).loss.item()
    if stage == 1:
        with pytest.raises(ValueError, match="Nothing was learnt in 2 steps"):
            run(stage, model, processor, rows, bank, tmp_path, max_steps=2)
        assert changed_parts(before, weights(model)) == set()
        return
    trainer = run(stage, model, processor, rows, bank, tmp_path, max_steps=2)
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    assert changed_parts(before, weights(model)) == {"language_model", "weight"}


@pytest.mark.parametrize("stage", [1, 2])
def test_long_rows_are_cut_in_training(stage, make_model, processor, dataset, bank, features, tmp_path):
    longest = max(len(encode_chat(processor, row["messages"])[0]) for row in dataset)
    settings = {"max_length": longest - 1, "max_steps": 1, "per_device_train_batch_size": 12}
    with pytest.raises(ValueError, match="over-long"):
        run(stage, make_model(), processor, dataset, bank, tmp_path / "a", features, **settings)
    trainer = run(stage, make_model(), processor, dataset, bank, tmp_path / "b", features, truncation=True, **settings)
    assert losses(trainer)[0] > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stream_that_somebody_else_made(stage, make_model, processor, dataset, bank, tmp_path):
    stream = dataset.to_iterable_dataset()
    trainer = make_trainer(stage, make_model(), processor, stream, bank, tmp_path, max_steps=2)
    trainer.train()
    assert len(losses(trainer)) == 2


@pytest.mark.parametrize("several", [lambda rows: {"a": rows}, lambda rows: rows.to_list()])
def test_what_is_no_dataset(several, make_model, processor, dataset, bank, tmp_path):
    with pytest.raises(ValueError, match="The data set is a (dict|list), expected a datasets.Dataset"):
        make_trainer(1, make_model(), processor, several(dataset), bank, tmp_path)
