"""Trainers with spare neighbours and similarities in their rows: memory dropout, thresholds, captions in prompts."""

import numpy as np
import pytest

from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.memory_dropout import MemoryDropout

from .short_runs import losses
from .short_runs import run as short_run


def run(model, processor, rows, bank, features, folder, eval_dataset=None, **settings):
    return short_run(1, model, processor, rows, bank, folder, features, eval_dataset, seed=3, **settings)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_with_dropout_resumes_and_differs_by_epoch(
    workers, make_model, processor, scored_rows, bank, features, tmp_path
):
    settings = {"memory_dropout": 0.7, "max_steps": 6, "save_steps": 2, "save_total_limit": 3}
    settings |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    whole = run(make_model(), processor, scored_rows, bank, features, tmp_path, **settings)
    assert int(whole.data_collator.dropout.epoch) == 1  # 12 rows in batches of 4: the second epoch began
    if workers == 0:
        without = run(make_model(), processor, scored_rows, bank, features, tmp_path / "without", max_steps=6)
        assert losses(whole) != losses(without)
        for step in (6, 4):  # as if it had been killed in the second epoch
            (tmp_path / f"checkpoint-{step}/trainer_state.json").unlink()
        resumed = run(make_model(), processor, scored_rows, bank, features, tmp_path, **settings)
        assert losses(resumed) == losses(whole)


def test_dropout_is_the_same_in_large_and_small_batches(make_model, processor, scored_rows, bank, features, tmp_path):
    settings = {"memory_dropout": 0.7, "max_grad_norm": 0.0, "optim": "sgd", "max_steps": 4}
    large = run(
        make_model(), processor, scored_rows, bank, features, tmp_path / "l", **settings, per_device_train_batch_size=6
    )
    small = run(
        make_model(),
        processor,
        scored_rows,
        bank,
        features,
        tmp_path / "s",
        **settings,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    np.testing.assert_allclose(losses(large), losses(small), rtol=1e-4)


def test_evaluation_has_no_dropout(make_model, processor, scored_rows, bank, features, tmp_path):
    rows = scored_rows.add_column("feature_index", list(range(12)))
    evaluated = []
    for rate in (0.0, 1.0):
        settings = {"max_steps": 1, "learning_rate": 1e-9, "memory_dropout": rate}
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
        folder = tmp_path / str(rate)
        trainer = run(make_model(), processor, rows, bank, features, folder, rows, **settings)
        evaluated.append(losses(trainer, "eval_loss"))
    assert evaluated[0] == evaluated[1] != []


def test_scores_are_asked_for_where_the_model_needs_them(
    make_model, processor, dataset, scored_rows, bank, features, tmp_path
):
    for config in ({"memory_scores": True}, {"retrieval_threshold": 0.5}):
        with pytest.raises(ValueError, match="no memory_scores, its columns are"):
            run(make_model(**config), processor, dataset, bank, features, tmp_path / "missing")
    trained = run(make_model(memory_scores=True), processor, scored_rows, bank, features, tmp_path / "scores")
    assert np.isfinite(losses(trained)).all()
    everything = run(make_model(), processor, scored_rows, bank, features, tmp_path / "everything")
    nothing = run(make_model(retrieval_threshold=1.0), processor, scored_rows, bank, features, tmp_path / "nothing")
    assert losses(everything) != losses(nothing)
    spare = dataset.add_column("memory_scores", [row[:2] for row in scored_rows["memory_scores"]])
    assert losses(run(make_model(), processor, spare, bank, features, tmp_path / "2")) == losses(everything)


def test_text_only_retrieval_reads_captions_at_run_time(
    make_model, make_processor, scored_rows, bank, features, captions, tmp_path
):
    model = make_model(memory_top_k=0, prompt_captions=2)
    processor = make_processor(model)
    collator = TrainingCollator(processor, features, bank, dropout=MemoryDropout(0.0, 2), prompt_captions=2)
    row = {**scored_rows[0], "feature_index": 0}
    batch = collator([row])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert f"Similar: {'; '.join(captions[index] for index in row['memory_ids'][:2])}\n" in text
    assert not {"memory_ids", "memory_values"} & batch.keys()
    trainer = run(model, processor, scored_rows, bank, features, tmp_path)
    assert np.isfinite(losses(trainer)).all()
    other = scored_rows.remove_columns(["memory_ids", "memory_scores"])
    other = other.add_column("memory_ids", [ids[2:] for ids in scored_rows["memory_ids"]])
    first, second = (
        trainer.evaluate(rows.add_column("feature_index", list(range(12)))) for rows in (scored_rows, other)
    )
    assert not np.isclose(first["eval_loss"], second["eval_loss"])


def test_images_with_one_chat_are_dropped_each_for_itself(processor, scored_rows, bank):
    """Labels and yes/no questions are the same chat for many images."""
    row = {**scored_rows[0], "messages": scored_rows[0]["messages"]}
    collator = TrainingCollator(processor, bank=bank, dropout=MemoryDropout(0.5, 2))
    found = [collator.neighbours({**row, "source_ids": [f"{number:032x}"]}, 1)[0][0] for number in range(40)]
    assert len({tuple(ids) for ids in found}) > 2
