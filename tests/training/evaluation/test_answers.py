"""Evaluation on hand-made cases. What a model says that has learned an answer: test_choices.py."""

import pytest

from tinyalign_vlm.training.evaluation.answers import evaluate_answers, reference_of


def test_answers_are_those_of_single_rows(model, processor, dataset, bank, features):
    questions = dataset.map(lambda row: {"messages": row["messages"][:1]})
    read = {"bank": bank, "vision_features": features}
    batched, seconds = evaluate_answers(model, processor, questions, 5, batch_size=12, **read)
    single, _ = evaluate_answers(model, processor, questions, 5, batch_size=1, **read)
    assert batched == single and len(single) == 12 and seconds > 0


def test_the_reference_is_the_last_turn():
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "blue"}]
    assert reference_of(messages) == "blue"
    with pytest.raises(ValueError, match="ends with a turn of 'user'"):
        reference_of(messages[:1])
