"""Evaluation on hand-made cases."""

import pytest

from tinyalign_vlm.training.evaluation.answers import GreedyAnswers, evaluate_answers, reference_of


def test_answers_are_those_of_single_rows(model, processor, dataset, bank, features, captions):
    batched = evaluate_answers(model, processor, dataset, bank, features, batch_size=12, max_new_tokens=5)
    single = evaluate_answers(model, processor, dataset, bank, features, batch_size=1, max_new_tokens=5)
    assert batched.answers == single.answers and len(single.answers) == 12
    assert batched.references == captions and (batched.seconds > 0).all() and not batched.exact_match.any()


def test_the_answer_in_the_data_does_not_change_the_models(model, processor, dataset, bank, features):
    changed = dataset.map(
        lambda row: {
            "messages": [row["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
        }
    )
    first = evaluate_answers(model, processor, dataset, bank, features, max_new_tokens=5)
    second = evaluate_answers(model, processor, changed, bank, features, max_new_tokens=5)
    assert first.answers == second.answers and first.references != second.references


def test_a_learned_answer_is_an_exact_match(make_model, processor, dataset, bank, features, tmp_path):
    from tinyalign_vlm.training import InstructionConfig, InstructionTrainer

    model = make_model()
    same = dataset.map(
        lambda row: {
            "messages": [row["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
        }
    )
    config = InstructionConfig(
        str(tmp_path), max_steps=25, learning_rate=1e-2, bf16=False, save_strategy="no", disable_tqdm=True
    )
    trainer = InstructionTrainer(
        model,
        config,
        train_dataset=same,
        processing_class=processor,
        memory_bank=bank,
        vision_features=features,
    )
    trainer.train()
    result = evaluate_answers(model, processor, same, bank, features, max_new_tokens=8)
    assert result.answers == ["blue"] * 12 and result.exact_match.all()


def test_exact_match_ignores_only_spaces_around():
    said = GreedyAnswers(["red ", "Red", "red square", ""], ["red", "red", "red  square", ""], None)
    assert said.exact_match.tolist() == [True, False, False, True]


def test_the_reference_is_the_last_turn():
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "blue"}]
    assert reference_of(messages) == "blue"
    with pytest.raises(ValueError, match="ends with a turn of 'user'"):
        reference_of(messages[:1])
