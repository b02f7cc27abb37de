"""Chats as batches."""

import pickle

import datasets
import numpy as np
import pytest
import torch

from tinyalign_vlm.modeling_tinyalign.row_encoder import image_source_id
from tinyalign_vlm.training.data.chats import encode_chat, to_messages
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.features import cache_vision_features
from tinyalign_vlm.training.data.memory_dropout import MemoryDropout
from tinyalign_vlm.training.data.training_rows import training_rows


def several_images(question: str, *answers: str) -> list[dict]:
    """A chat with two images in its first question."""
    first = [{"type": "image"}, {"type": "text", "text": question}, {"type": "image"}]
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": answers[0]}]
    for answer in answers[1:]:
        messages += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": answer}]
    return messages


def test_labels_are_the_answers_and_their_end(processor, features):
    rows = [
        {"messages": to_messages("what is in the image?", answer), "feature_index": index}
        for index, answer in enumerate(["blue", "a red square on a white background"])
    ]
    batch = TrainingCollator(processor, features)(rows)
    tokenizer = processor.tokenizer
    for row, answer in enumerate(["blue", "a red square on a white background"]):
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != -100]) == answer + "<|im_end|>"
        assert torch.equal(labels[labels != -100], batch["input_ids"][row][labels != -100])
    lengths = batch["attention_mask"].sum(1)
    assert lengths[0] < lengths[1] == batch["input_ids"].shape[1]
    assert (batch["labels"][0, lengths[0] :] == -100).all()
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [processor.num_image_tokens] * 2


def test_values_of_the_neighbours(processor, features, bank, dataset):
    rows = [{**row, "feature_index": 11 - index} for index, row in enumerate(dataset.select(range(3)))]
    rows[1]["memory_ids"] = [4, -1]
    batch = TrainingCollator(processor, features, bank)(rows)
    assert torch.equal(batch["memory_ids"][1], torch.tensor([4, -1]))
    assert torch.equal(batch["memory_values"][1, 0].float(), bank.gather(torch.tensor([4]))[0])
    assert batch["memory_values"].shape == (3, 2, 3, 5) and (batch["memory_values"][1, 1] == 0).all()
    assert np.array_equal(batch["vision_features"].numpy(), features[[11, 10, 9]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": to_messages("what?", "blue")[:1]}, "no token to learn"),
        ({"messages": several_images("what?", "blue")}, "has 1 feature_index, but its chat is about 2 images"),
        ({"messages": [{"role": "assistant", "content": "blue"}]}, "1 feature_index, but its chat is about 0 images"),
        ({"messages": to_messages("what?", "blue"), "feature_index": None}, "no 'feature_index'"),
        ({"messages": None}, "no 'messages'"),
        (
            {"messages": "blue"},
            "The row with feature_index 0 cannot be trained on: no chat: the chat is 'blue', expected a list",
        ),
        ({"messages": [{"role": "assistant", "content": " "}]}, "an assistant turn is empty"),
        ({"messages": [{"role": "assistant", "content": None}]}, "an assistant turn is empty"),
        ({"messages": [{"role": "user", "content": ["what?"]}]}, "the content \\['what\\?'\\], expected text or"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "'user' has the text 3"),
    ],
)
def test_bad_rows(row, message, processor, features):
    with pytest.raises(ValueError, match=message):
        TrainingCollator(processor, features)([{"feature_index": 0, **row}])


def test_a_broken_image_is_named(make_model, processor, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = {"image": [str(tmp_path / "broken.png")], "messages": [to_messages("what?", "blue")]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (row,) = training_rows(make_model(memory_top_k=0), dataset, None, None)
    with pytest.raises(
        ValueError, match="An image of a row cannot be used: broken image: .*broken.png .*The row's chat: .*blue"
    ):
        TrainingCollator(processor)([row])


def test_several_images_and_none(make_model, processor, images, features, bank):
    """Rows of two images, none and one are what the processor makes of the same chats."""
    chats = [
        several_images("or", "blue", "white"),
        [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a red square"}],
        to_messages("what?", "blue"),
    ]
    own, index, ids = [images[:2], [], images[2:3]], [[0, 1], [], 2], [[[3, 4], [5, 6]], [], [7, -1]]
    rows = [
        {"messages": chat, "images": row_images, "feature_index": row_index, "memory_ids": memory_ids}
        for chat, row_images, row_index, memory_ids in zip(chats, own, index, ids, strict=True)
    ]
    batch = TrainingCollator(processor, None, bank)(rows)
    expected = processor(
        images=[row["images"] for row in rows if row["images"]],
        text=processor.apply_chat_template([chats[0], chats[2]]),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert torch.equal(batch["input_ids"][[0, 2]], expected["input_ids"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert batch["memory_ids"].tolist() == [[3, 4], [5, 6], [7, -1]]
    assert batch["memory_values"].shape == (3, 2, 3, 5)
    cached = TrainingCollator(processor, features, bank)(rows)
    assert np.array_equal(cached["vision_features"].numpy(), features[:3])
    model = make_model()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**cached).loss, rtol=1e-3, atol=0)
    assert "pixel_values" not in TrainingCollator(processor, None, bank)(rows[1:2])
    with pytest.raises(ValueError, match="A row has 1 images, but its chat is about 2"):
        TrainingCollator(processor)([{**rows[0], "images": images[:1]}])
    with pytest.raises(ValueError, match="A row has 1 memory_ids, but its chat is about 2"):
        TrainingCollator(processor, None, bank)([{**rows[0], "memory_ids": [1, 2]}])


def test_streamed_rows_are_searched_by_the_model(make_model, processor, images, captions, bank):
    """Without itself, as when the neighbours were looked up before."""
    rows = [
        {"messages": to_messages("what?", caption), "images": [image], "source_ids": [image_source_id(image)]}
        for image, caption in zip(images, captions, strict=True)
    ]
    model = make_model()
    model.attach_memory_bank(bank)
    batch = TrainingCollator(processor, None, bank)(rows)
    found = model.get_image_features(batch["pixel_values"], exclude_ids=batch["exclude_ids"]).memory_ids
    own = torch.arange(len(rows))[:, None]
    assert not (found == own).any() and (found >= 0).all()
    looked_up = [{**row, "memory_ids": ids} for row, ids in zip(rows, found.tolist(), strict=True)]
    for row in looked_up:
        del row["source_ids"]
    with torch.no_grad():
        searched, given = model(**batch).loss, model(**TrainingCollator(processor, None, bank)(looked_up)).loss
    torch.testing.assert_close(searched, given, rtol=1e-3, atol=0)
    question = [{"type": "image", "text": None}] * 2 + [{"type": "text", "text": "which is red?"}]
    names = [row["source_ids"][0] for row in rows[:2]]
    pair = {"messages": [{"role": "user", "content": question}, rows[0]["messages"][1]], "source_ids": names}
    batch = TrainingCollator(processor, None, bank)([{**pair, "images": images[:2]}, rows[2]])
    assert batch["exclude_ids"] == [names, names, rows[2]["source_ids"]]  # nor the image beside it


def test_a_worker_maps_the_features_itself(model, processor, images, dataset, tmp_path):
    features = cache_vision_features(model, processor, images, tmp_path / "features")
    collator = TrainingCollator(processor, features)
    copy = pickle.loads(pickle.dumps(collator))
    assert isinstance(copy.vision_features, np.memmap) and np.array_equal(copy.vision_features, features)
    part = pickle.loads(pickle.dumps(TrainingCollator(processor, features[3:])))
    assert np.array_equal(part.vision_features, features[3:])


def indexed(rows) -> list[dict]:
    return [{**row, "feature_index": index} for index, row in enumerate(rows)]


def test_a_batch_has_the_nearest_and_their_similarities(processor, scored_rows, bank, features):
    batch = TrainingCollator(processor, features, bank, dropout=MemoryDropout(0.0, 2))(indexed(scored_rows))
    assert batch["memory_ids"].tolist() == [ids[:2] for ids in scored_rows["memory_ids"]]
    np.testing.assert_allclose(batch["memory_scores"], np.array(scored_rows["memory_scores"])[:, :2], rtol=1e-6)
    assert torch.equal(batch["memory_values"], bank.gather(batch["memory_ids"], torch.float16))


def test_similarities_of_other_neighbours_are_refused(processor, scored_rows, bank, features):
    (row,) = indexed(scored_rows)[:1]
    with pytest.raises(ValueError, match="they must be as many"):
        TrainingCollator(processor, features, bank)([{**row, "memory_scores": row["memory_scores"][:2]}])


def test_dropout_reaches_the_model(make_model, processor, scored_rows, bank, features):
    """Off for all is the model with its memory off."""
    for seed in range(20):  # one image in six has all of them off, if any
        collator = TrainingCollator(processor, features, bank, dropout=MemoryDropout(1.0, 2, seed))
        batch = collator(indexed(scored_rows))
        ids = batch["memory_ids"]
        if (ids < 0).all(1).any():
            break
    assert (ids < 0).all(1).any() and (ids >= 0).any()
    assert torch.equal(ids < 0, batch["memory_scores"].isinf())
    assert collator.for_evaluation()(indexed(scored_rows))["memory_ids"].tolist() == [
        row[:2] for row in scored_rows["memory_ids"]
    ]
    model = make_model()
    off = (ids < 0).all(1)
    some = {name: tensor[off] for name, tensor in batch.items()}
    plain = {name: tensor for name, tensor in some.items() if not name.startswith("memory")}
    with torch.no_grad():
        torch.testing.assert_close(model(**some).logits, model(**plain, memory="off").logits)


def test_several_images_of_a_row_are_treated_each_for_itself(processor, bank, features):
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "blue"}]
    row = {
        "messages": chat,
        "feature_index": [0, 1],
        "memory_ids": [[3, 4, 5], [6, 7, 8]],
        "memory_scores": [[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]],
    }
    text = {"messages": [{"role": "user", "content": "what?"}, chat[1]], "feature_index": [], "memory_ids": []}
    batch = TrainingCollator(processor, features, bank, dropout=MemoryDropout(0.0, 2))(
        [{**text, "memory_scores": []}, row]
    )
    assert batch["memory_ids"].tolist() == [[3, 4], [6, 7]]
    np.testing.assert_allclose(batch["memory_scores"], [[0.9, 0.8], [0.6, 0.5]], rtol=1e-6)


def test_captions_that_do_not_fit_are_left_out(make_model, make_processor, scored_rows, bank, features):
    processor = make_processor(make_model(memory_top_k=0, prompt_captions=4))
    (row,) = indexed(scored_rows)[:1]

    def length(limit: int) -> int:
        dropout = MemoryDropout(0.0, 4)
        collator = TrainingCollator(processor, features, bank, limit, dropout=dropout, prompt_captions=4)
        return collator([row])["input_ids"].shape[1]

    bare, full = len(encode_chat(processor, row["messages"])[0]), length(10_000)
    assert length(bare) == bare and bare < length(full - 1) < full
