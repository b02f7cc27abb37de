"""Scores of given answers, against a forward pass of each chat by itself."""

import numpy as np
import pytest
import torch

from tinyalign_vlm.training import InstructionConfig, InstructionTrainer
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.evaluation.answers import evaluate_answers
from tinyalign_vlm.training.evaluation.choices import score_answers


def with_answer(messages, text):
    return [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def questions(dataset):
    """Prompts of different lengths."""
    rows = []
    for number, row in enumerate(dataset):
        user = {
            **row["messages"][0],
            "content": [*row["messages"][0]["content"], {"type": "text", "text": "? " * number}],
        }
        rows.append([user])
    return dataset.remove_columns("messages").add_column("messages", rows)


def test_scores_are_those_of_each_chat_alone(model, processor, questions, bank, features):
    answers = [["red", "a blue square", "green green green"]] * len(questions)
    scores = score_answers(model, processor, questions, answers, bank, features, batch_size=5)
    collator = TrainingCollator(processor, features, bank)
    assert scores.losses.shape == (len(questions), 3)
    for index in (0, 3, 11):
        for number, answer in enumerate(answers[index]):
            row = {**questions[index], "feature_index": index}
            batch = collator([{**row, "messages": with_answer(row["messages"], answer)}])
            with torch.no_grad():
                logits = model(**batch).logits[0, :-1]
            labels = batch["labels"][0, 1:]
            spoken = labels != -100
            losses = torch.nn.functional.cross_entropy(logits[spoken], labels[spoken], reduction="none")
            assert scores.num_tokens[index, number] == spoken.sum()
            assert scores.losses[index, number] == pytest.approx(losses.sum().item(), rel=1e-4)
            assert scores.likelihoods[index, number] == pytest.approx(-losses[:-1].mean().item(), rel=1e-4)


def test_a_learned_answer_is_what_the_model_would_say(make_model, processor, questions, bank, features, tmp_path):
    model = make_model()
    same = questions.map(lambda row: {"messages": with_answer(row["messages"], "blue")})
    config = InstructionConfig(
        str(tmp_path), max_steps=25, learning_rate=1e-2, bf16=False, save_strategy="no", disable_tqdm=True
    )
    parts = {"processing_class": processor, "memory_bank": bank, "vision_features": features}
    InstructionTrainer(model, config, train_dataset=same, **parts).train()
    scores = score_answers(model, processor, questions, [["blue", "red"]] * len(same), bank, features)
    said, _ = evaluate_answers(model, processor, questions, 8, bank=bank, vision_features=features)
    assert said == ["blue"] * len(same)
    assert scores.is_greedy[:, 0].all() and not scores.is_greedy[:, 1].any()
    assert (scores.likelihoods[:, 0] > scores.likelihoods[:, 1]).all()


def test_earlier_turns_are_no_part_of_the_answer(model, processor, questions, bank, features):
    first = {"role": "user", "content": [{"type": "text", "text": "And what colour?"}]}
    longer = questions.map(lambda row: {"messages": [*with_answer(row["messages"], "a square"), first]})
    scores = score_answers(model, processor, longer, [["red"]] * len(longer), bank, features)
    alone = score_answers(model, processor, questions, [["red"]] * len(longer), bank, features)
    assert (scores.num_tokens == alone.num_tokens).all() and not np.allclose(scores.losses, alone.losses)
