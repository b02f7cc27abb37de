"""Metrics, several data sets, prediction and pushing, as users of transformers' and TRL's trainers do them."""

import numpy as np
import pytest

from tinyalign_vlm import TinyAlignForConditionalGeneration, TinyAlignProcessor
from tinyalign_vlm.training.stages.trainers import AlignmentTrainer

from .short_runs import STAGES, losses, make_trainer, run


@pytest.fixture
def indexed(dataset):
    return dataset.add_column("feature_index", list(range(len(dataset))))


@pytest.mark.parametrize("stage", [1, 2])
def test_prediction_is_evaluation(stage, make_model, processor, dataset, indexed, bank, features, tmp_path):
    """With all neighbours, before and after training."""
    settings = {"memory_dropout": 0.9, "max_steps": 1}
    trainer = make_trainer(stage, make_model(), processor, dataset, bank, tmp_path, features, **settings)
    for _ in range(2):
        predicted = trainer.predict(indexed)
        assert predicted.metrics["test_loss"] == trainer.evaluate(indexed)["eval_loss"]
        assert "forward" not in vars(trainer.model)
        trainer.train()


@pytest.mark.parametrize("stage", [1, 2])
def test_metrics_of_logits(stage, make_model, processor, dataset, indexed, bank, features, tmp_path):
    def compute_metrics(prediction):
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((logits.argmax(-1) == labels)[labels != -100].mean())}

    config, trainer = STAGES[stage]
    trainer = trainer(
        make_model(),
        config(output_dir=str(tmp_path), max_steps=1),
        train_dataset=dataset,
        processing_class=processor,
        memory_bank=bank.for_any_tower(),
        vision_features=features,
        compute_metrics=compute_metrics,
    )
    found = trainer.evaluate(indexed)
    assert 0 <= found["eval_accuracy"] <= 1
    trainer.compute_metrics = None
    assert found["eval_loss"] == pytest.approx(trainer.evaluate(indexed)["eval_loss"], rel=1e-5)


def test_several_evaluation_sets(make_model, processor, dataset, indexed, bank, features, tmp_path, capsys):
    sets = {"whole": indexed, "part": indexed.select(range(3))}
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_samples": 1}
    trainer = make_trainer(
        1, make_model(), processor, dataset, bank, tmp_path, features, eval_dataset=sets, **settings
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_whole_loss", "eval_part_loss"} <= logged


def test_the_given_bank_is_read(make_model, processor, dataset, indexed, bank, features, tmp_path):
    """And neither another one that was attached before, nor none."""
    bank.for_any_tower().save_pretrained(tmp_path / "bank")
    found = []
    for attached in (None, bank.shuffled().for_any_tower(), bank.for_any_tower()):
        model = make_model(memory_input="captions")
        if attached is not None:
            model.attach_memory_bank(attached, tokenizer=processor.tokenizer)
        trainer = make_trainer(1, model, processor, dataset, bank, tmp_path / "out", features)
        found.append(trainer.evaluate(indexed)["eval_loss"])
        assert np.array_equal(model.memory_bank.key_array, bank.key_array)
    assert found[0] == found[1] == found[2]


def test_rows_longer_than_the_context_are_not_trained_on(make_model, processor, dataset, bank, features, tmp_path):
    chats = list(dataset["messages"])
    model = make_model()
    chats[0][-1]["content"][0]["text"] = "x " * (model.config.text_config.max_position_embeddings + 1)
    rows = dataset.remove_columns("messages").add_column("messages", chats).select([0])
    trainer = make_trainer(1, model, processor, rows, bank, tmp_path, features[:1], max_steps=1)
    with pytest.raises(ValueError, match="expected at most"):
        trainer.train()


def test_the_whole_model_is_pushed(make_model, processor, dataset, bank, features, tmp_path, monkeypatch):
    pushed = {}
    for kind in (TinyAlignForConditionalGeneration, TinyAlignProcessor):
        monkeypatch.setattr(
            kind, "push_to_hub", lambda self, name, **given: pushed.update({type(self): (name, given)})
        )
    trainer = make_trainer(1, make_model(), processor, dataset, bank, tmp_path / "my-model", features, max_steps=1)
    trainer.save_model()
    saved = (tmp_path / "my-model" / "model.safetensors").read_bytes()
    trainer.push_to_hub(commit_message="trained", token="t")
    for name, given in pushed.values():
        assert name == "my-model" and given == {
            "token": "t",
            "revision": None,
            "commit_message": "trained",
            "private": None,
        }
    assert len(pushed) == 2 and (tmp_path / "my-model" / "model.safetensors").read_bytes() == saved


def test_a_trainer_for_evaluation_alone(make_model, processor, indexed, bank, features, tmp_path):
    config, trainer = STAGES[1]
    given = {"processing_class": processor, "memory_bank": bank.for_any_tower(), "vision_features": features}
    trainer = AlignmentTrainer(make_model(), config(output_dir=str(tmp_path)), **given)
    assert np.isfinite(trainer.evaluate(indexed)["eval_loss"])
    with pytest.raises(ValueError, match="data have no (answers|rows)"):
        trainer.evaluate(indexed.to_iterable_dataset().take(0))


def test_pictures_that_a_transform_changes(make_model, processor, dataset, bank, tmp_path):
    """Augmentation: the transform gets decoded pictures, and what it makes of them is trained on."""
    seen = []

    def turn(rows):
        seen.extend(rows["image"])
        return {**rows, "image": [image.rotate(180) for image in rows["image"]]}

    trainer = make_trainer(1, make_model(), processor, dataset.with_transform(turn), bank, tmp_path, max_steps=1)
    trainer.train()
    assert seen and np.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("given", [False, "no", "False"])
def test_a_run_that_is_not_to_be_resumed_begins_anew(
    given, make_model, processor, dataset, bank, features, tmp_path, capsys
):
    for resume in (None, given):
        settings = {"max_steps": 2, "save_steps": 1, "resume_from_checkpoint": resume}
        trainer = make_trainer(1, make_model(), processor, dataset, bank, tmp_path, features, **settings)
        trainer.train()
    assert "finished" not in capsys.readouterr().out and trainer.state.global_step == 2


def test_evaluation_drops_no_rows(make_model, processor, dataset, indexed, bank, features, tmp_path):
    settings = {"dataloader_drop_last": True, "per_device_eval_batch_size": 8}
    trainer = make_trainer(1, make_model(), processor, dataset, bank, tmp_path, features, **settings)
    found, few = trainer.evaluate(indexed)["eval_loss"], trainer.evaluate(indexed.select(range(5)))["eval_loss"]
    trainer.args.dataloader_drop_last = False
    assert found == trainer.evaluate(indexed)["eval_loss"] and few > 0


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_the_format_of_a_data_set_changes_nothing(kind, make_model, processor, dataset, bank, tmp_path):
    found = []
    for rows in (dataset, dataset.with_format(kind)):
        folder = tmp_path / str(len(found))
        found.append(losses(run(1, make_model(), processor, rows, bank, folder, max_steps=1)))
    assert found[0] == found[1]
