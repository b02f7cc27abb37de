"""A loss that is no number stops training and names its rows."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch

from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.data.chats import name_row
from tinyalign_vlm.training.data.check import training_data
from tinyalign_vlm.training.stages.loss_check import BadLoss, LossCheck

from .short_runs import changed_parts, losses, run, weights


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("bad", "batch", "accumulated"), [([7], 4, 3), ([7, 2], 12, 1), ([0], 2, 6)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_rows_are_named(
    stage, bad, batch, accumulated, value, make_model, processor, dataset, bank, features, tmp_path
):
    features = features.copy()
    features[bad] = value
    model = make_model()
    before = weights(model)
    dataset = dataset.add_column("id", [f"id-{index}" for index in range(len(dataset))])
    with pytest.raises(BadLoss) as raised:
        run(
            stage,
            model,
            processor,
            dataset,
            bank,
            tmp_path,
            features,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
        )
    message = str(raised.value)
    assert "The loss of step 1 is nan" in message and "learning rate (0.01)" in message
    named = {index for index in range(12) if f"row {index} (id id-{index})" in message}
    assert named == set(bad)
    assert not changed_parts(before, weights(model))  # the step was not taken


def test_batches_of_a_stream_that_fill_no_step_are_dropped():
    model, check = torch.nn.Linear(1, 1), LossCheck(SimpleNamespace(_tr_loss=torch.tensor(3.0)))
    model(torch.ones(1, 1)).sum().backward()
    check.on_epoch_end(None, None, None, model=model)
    assert model.weight.grad is not None  # all were in a step
    check.add(torch.tensor(1.0), {}, ["row 1"])
    check.on_epoch_end(None, None, None, model=model)
    assert model.weight.grad is None and check.batches == [] and check.trainer._tr_loss == 2


def test_batches_that_fill_no_step_are_not_in_the_logged_loss(make_model, processor, dataset, bank, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-9}
    trainer = run(1, make_model(), processor, dataset.to_iterable_dataset(), bank, tmp_path, **settings)
    assert max(losses(trainer)) < 1.3 * min(losses(trainer))


def test_weights_that_are_no_numbers_are_not_the_rows_fault(make_model, processor, dataset, bank, features, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.connector.linear_1.weight[0] = float("nan")
    with pytest.raises(BadLoss, match="weights are NaN or infinite .model.connector.linear_1.weight and 0 others"):
        run(1, model, processor, dataset, bank, tmp_path, features)


def test_text_alone(make_model, processor, dataset, bank, tmp_path):
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a red square"}]
    rows = datasets.Dataset.from_list([{"images": [], "messages": chat, "memory_ids": []}] * 4)
    model = make_model()
    with torch.no_grad():  # the head is frozen in stage 1
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(BadLoss, match="It is no number for (row [0-3](, )?){4}. Look"):
        run(1, model, processor, rows, bank, tmp_path)


def test_rows_keep_the_numbers_that_they_have_in_the_file(tmp_path, images):
    """Bad rows are skipped: the fourth row is row 3 whatever became of the second."""
    images[0].save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    names = ("a.png", "b.png", "a.png", "a.png")
    rows = [{"id": number, "image": name, "conversations": turns} for number, name in enumerate(names)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = AlignmentConfig(output_dir=str(tmp_path / "out"), dataset=str(tmp_path / "rows.json"))
    config.image_folder = str(tmp_path)
    kept = training_data(config, None)
    assert kept["row"] == [0, 2, 3] and kept["id"] == ["0", "2", "3"]
    config.streaming = True
    assert [row["row"] for row in training_data(config, None)] == [0, 2, 3]


def test_names_of_rows():
    assert name_row({"row": 7}, []) == "row 7"
    assert name_row({"row": 7, "id": "1F578"}, ["a.png", {"path": "b.png", "bytes": b""}, object()]) == (
        "row 7 (id 1F578, a.png, b.png)"
    )
