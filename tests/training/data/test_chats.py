"""What a chat must be, and its tokens."""

import pytest
import torch

from tinyalign_vlm.training.data.chats import BadRow, add_captions, check_messages, encode_chat, to_messages


@pytest.mark.parametrize("text", ["llama", "phi"])
def test_a_chat_is_encoded_as_the_processor_does(text, make_model, make_processor, images):
    processor = make_processor(make_model(text=text), text=text)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what <image> <|im_end|>"}, {"type": "image"}]},
        {"role": "assistant", "content": "a red square"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "blue"},
    ]
    expected = processor.apply_chat_template(
        [
            {**messages[0], "content": [messages[0]["content"][0], {"type": "image", "image": images[0]}]},
            *messages[1:],
        ],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    ids, assistant = encode_chat(processor, messages)
    assert ids == expected["input_ids"][0].tolist()
    assert assistant == torch.as_tensor(expected["assistant_masks"])[0].tolist()
    spoken = processor.tokenizer.decode([token for token, mask in zip(ids, assistant, strict=True) if mask])
    end = processor.tokenizer.eos_token
    assert "".join(spoken.split()) == f"aredsquare{end}blue{end}"


def test_a_processor_without_a_template_is_refused(make_model, make_processor):
    """The tokenizer's own, which would be taken instead, marks no answers."""
    processor = make_processor(make_model())
    processor.chat_template = None
    processor.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="no chat template, expected one that marks answers"):
        encode_chat(processor, to_messages("what?", "a cat"))


@pytest.mark.parametrize("answer", [None, 3, "", " \n"])
def test_an_answer_is_text(answer):
    expected = "has the text 3, expected a string" if answer == 3 else "turn is empty, expected text that is not blank"
    with pytest.raises(ValueError, match=expected):
        check_messages(to_messages("what?", answer))


def test_a_blank_question_is_refused():
    with pytest.raises(BadRow, match="empty prompt: the prompt is ' ', expected text that is not blank"):
        to_messages(" ", "a cat")


def test_captions_come_before_the_question():
    chat = to_messages("what?", "blue")
    written = add_captions(chat, ["red", "green"])
    assert [part.get("text") for part in written[0]["content"]] == [None, "Similar: red; green\n", "what?"]
    assert written[1] == chat[1] and len(chat[0]["content"]) == 2
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "what?"}]
    assert add_captions(plain, ["red"])[1]["content"] == "Similar: red\nwhat?"
    assert add_captions(chat, []) is chat


def test_an_answer_goes_back_as_it_was_trained(make_model, make_processor):
    """Without ChatML the space before an answer is part of it: one that was generated must not have two."""
    processor = make_processor(make_model(text="phi"), text="phi")
    chats = [[*to_messages("q", answer), {"role": "user", "content": "why?"}] for answer in ("red", " red")]
    first, again = (encode_chat(processor, chat, add_generation_prompt=True)[0] for chat in chats)
    assert first == again
