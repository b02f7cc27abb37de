"""The processor: placeholders, images, chats, queries, bad input."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CTRLTokenizer

from tinyalign_vlm import TinyAlignProcessor


@pytest.fixture
def language_processor(make_processor, make_model):
    return make_processor(make_model(key_space="language"))


def conversation(answer: str | None = "a red square", image: object = None) -> list[dict]:
    messages = [
        {"role": "system", "content": "system"},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]},
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        messages.append({"role": "user", "content": "user"})
        messages.append({"role": "assistant", "content": "a blue circle."})
    return messages


def pixels(processor, image: object) -> torch.Tensor:
    return processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]


def test_an_image_becomes_its_placeholders(processor, images):
    inputs = processor(images=images[:3], text=["<image>\nwhat", "no image", "<image><image>"], padding=True)
    counts = [row.count(processor.image_token_id) for row in inputs["input_ids"]]
    assert counts == [19, 0, 38]
    nested = processor(images=[images[:1], [], images[1:3]], text=["<image>\nwhat", "no image", "<image><image>"])
    assert np.array_equal(nested["pixel_values"], inputs["pixel_values"])
    assert processor._get_num_multimodal_tokens(image_sizes=[(5, 6)] * 2).num_image_tokens == [19, 19]
    assert processor(text="only text")["input_ids"] == [processor.tokenizer("only text")["input_ids"]]


def test_an_array_of_four_dimensions_is_a_batch(processor):
    batch = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    expected = processor(images=list(batch), text=["<image>", "<image>"], return_tensors="pt")["pixel_values"]
    assert expected.shape == (2, 3, 32, 32)
    for images in (batch, torch.from_numpy(batch)):
        found = processor(images=images, text=["<image>", "<image>"], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected)


def test_a_missing_image_is_named(processor, images):
    with pytest.raises(ValueError, match="image 1: there is no image"):
        processor(images=[images[0], None], text="<image><image>")


def test_rag_is_folded_into_the_image_before_it(processor, images):
    plain = processor(images=images[:1], text="<image>\nwhat is it?")
    for text in ("<image>\n<rag>\nwhat is it?", "<image><rag>\nwhat is it?"):
        assert processor(images=images[:1], text=text)["input_ids"] == plain["input_ids"]


@pytest.mark.parametrize("text", ["llama", "phi"])
def test_chat_templates(make_model, make_processor, images, text):
    processor = make_processor(make_model(text=text), text=text)
    prompt = processor.apply_chat_template(conversation(None), add_generation_prompt=True)
    full = processor.apply_chat_template(conversation())
    if text == "llama":
        start = "<|im_start|>system\nsystem<|im_end|>\n<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n"
        assert prompt == start + "<|im_start|>assistant\n"
        assert full.startswith(prompt + "a red square<|im_end|>\n<|im_start|>user\nuser<|im_end|>\n")
    else:
        assert prompt == "system USER: <image>\nwhat is it? ASSISTANT:"
        assert full == prompt + " a red square</s>USER: user ASSISTANT: a blue circle.</s>"


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("text", ["llama", "phi"])
def test_only_answers_are_in_the_assistant_mask(make_model, make_processor, images, text, padding_side):
    """As TRL's `assistant_only_loss` asks for it: end of turn included, placeholders not."""
    processor = make_processor(make_model(text=text), text=text)
    chats = [conversation(image=images[0]), conversation(image=images[1]), conversation()[2:]]
    chats[1][1]["content"].insert(0, {"type": "image", "image": images[2]})
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": padding_side, "add_special_tokens": False},
    )
    end, space = processor.tokenizer.eos_token, " " if text == "phi" else ""
    for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True):
        assert processor.decode(ids[mask.bool()]) == f"{space}a red square{end}{space}a blue circle.{end}"


def test_the_query_is_the_question(language_processor, images):
    """Only user turns before the first answer: another answer gives the same query."""
    processor = language_processor
    queries = []
    for answer in (None, "a red square", "something else, and long"):
        inputs = processor.apply_chat_template(
            [conversation(answer, images[0])], tokenize=True, return_dict=True, return_tensors="pt"
        )
        queries.append(inputs["query_input_ids"])
    assert processor.decode(queries[0][0]) == "what is it?"
    assert torch.equal(queries[0], queries[1]) and torch.equal(queries[0], queries[2])


def test_the_query_has_a_row_for_each_text(language_processor, images):
    inputs = language_processor(
        images=[images[:2], [], images[2:3]],
        text=["<image><image>", "none", "<image>"],
        query_text=["what is in the image?", "never seen", "user"],
        padding=True,
        return_tensors="pt",
    )
    rows = [
        ids[mask.bool()] for ids, mask in zip(inputs["query_input_ids"], inputs["query_attention_mask"], strict=True)
    ]
    assert [language_processor.decode(row) for row in rows] == ["what is in the image?", "never seen", "user"]
    assert {"query_input_ids", "query_attention_mask"} <= set(language_processor.model_input_names)
    with pytest.raises(ValueError, match="2 query_text for 1 texts"):
        language_processor(images=images[:1], text="<image>", query_text=["a", "b"])


def test_no_query_unless_the_keys_need_it(processor, images):
    inputs = processor.apply_chat_template([conversation(None, images[0])], tokenize=True, return_dict=True)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert not set(processor.model_input_names) & {"query_input_ids", "query_attention_mask"}


def test_save_and_load(processor, images, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = TinyAlignProcessor.from_pretrained(tmp_path)
    assert (loaded.num_image_tokens, loaded.key_space, loaded.image_token_id) == (19, "vision", 300)
    assert loaded.chat_template == processor.chat_template
    chat = conversation(image=images[0])
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    first, second = (p.apply_chat_template(chat, **kwargs) for p in (processor, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestImages:
    def test_upright_rgb_on_white(self, processor):
        rotated = Image.new("RGB", (40, 20), "red")
        rotated.paste("blue", (0, 0, 20, 20))
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated by 90 degrees
        file = io.BytesIO()
        rotated.save(file, "PNG", exif=exif)
        assert pixels(processor, Image.open(file)).equal(pixels(processor, rotated.rotate(-90, expand=True)))
        white = pixels(processor, Image.new("RGB", (30, 30), "white"))
        for image in (
            Image.new("RGBA", (30, 30), (0, 0, 0, 0)),
            Image.new("LA", (30, 30), (0, 0)),
            Image.new("RGBA", (30, 30), (0, 0, 0, 0)).quantize(),
            Image.new("L", (30, 30), 255),
            Image.new("1", (30, 30), 1),
            Image.fromarray(np.full((30, 30), 65535, np.uint16)),
        ):
            assert pixels(processor, image).equal(white), image.mode
        assert pixels(processor, Image.new("P", (30, 30))).equal(pixels(processor, Image.new("RGB", (30, 30))))

    def test_sources(self, processor, images, tmp_path):
        path = tmp_path / "image.png"
        images[0].save(path)
        text = base64.b64encode(path.read_bytes()).decode()
        expected = pixels(processor, images[0])
        for source in (path, str(path), text, f"data:image/png;base64,{text}", np.asarray(images[0])):
            assert pixels(processor, source).equal(expected)
        grey = images[0].convert("L")
        assert pixels(processor, np.asarray(grey)).equal(pixels(processor, grey))

    def test_numbers_up_to_1(self, processor, images):
        scaled = np.asarray(images[0], np.float32) / 255
        for image in (scaled, torch.from_numpy(scaled).permute(2, 0, 1)):
            with pytest.raises(ValueError, match="numbers up to 1, expected 0 to 255, or do_rescale=False"):
                pixels(processor, image)
            inputs = processor(images=image, text="<image>", do_rescale=False, return_tensors="pt")
            torch.testing.assert_close(inputs["pixel_values"], pixels(processor, images[0]))

    @pytest.mark.parametrize("levels", [np.full((20, 30, 3), 5000, np.uint16), torch.full((1, 20, 30), 4095.0)])
    def test_numbers_above_255(self, processor, levels):
        with pytest.raises(ValueError, match="numbers up to [45][0-9]{3}, expected 0 to 255"):
            pixels(processor, levels)

    def test_broken_files(self, processor, images, tmp_path):
        path = tmp_path / "image.png"
        Image.effect_noise((64, 64), 90).save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        for source in (path, str(path), Image.open(path)):
            with pytest.raises(ValueError, match="image 1: the image cannot be read .*Replace it or leave it out"):
                processor(images=[images[0], source], text="<image><image>")
        path.write_bytes(b"not an image")
        with pytest.raises(ValueError, match="image 0: the image cannot be read .UnidentifiedImageError"):
            pixels(processor, path)
        with pytest.raises(ValueError, match="image 0: 'missing.png' is no file, expected a file, a URL, base64 text"):
            pixels(processor, "missing.png")

    def test_decompression_bomb(self, processor, tmp_path, monkeypatch):
        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        bomb = tmp_path / "bomb.png"
        data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
        bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        with pytest.raises(ValueError, match="image 0: the image is too large .*2500000000 pixels.*MAX_IMAGE_PIXELS"):
            pixels(processor, bomb)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
        with pytest.raises(ValueError, match=r"image 0: the image is too large .*1200 pixels.* expected at most 1000"):
            pixels(processor, tmp_path / "large.png")


class TestBadInput:
    def test_images_and_placeholders(self, processor, images):
        with pytest.raises(ValueError, match=r"\[1, 2\] <image> placeholders, but \[2, 1\] images were passed"):
            processor(images=[images[:2], images[2:3]], text=["<image>", "<image><image>"])
        with pytest.raises(ValueError, match=r"\[1, 2\] <image> placeholders, but \[2\] images were passed"):
            processor(images=images[:2], text=["<image>", "<image><image>"])
        with pytest.raises(ValueError, match=r"\[0\] <image> placeholders, but \[1\] images were passed"):
            processor(images=images[:1], text="no placeholder")
        with pytest.raises(ValueError, match=r"\[1\] <image> placeholders, but \[0\] images were passed"):
            processor(text="<image>")

    def test_truncation_of_placeholders(self, processor, images):
        with pytest.raises(ValueError, match="(?i)mismatch in `image` token count"):
            processor(images=images[:1], text="<image>", truncation=True, max_length=10)

    def test_tokenizer(self, processor, checkpoints, model, make_model):
        tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
        with pytest.raises(ValueError, match="no token '<image>'.*from_vision_text_pretrained"):
            TinyAlignProcessor(processor.image_processor, tokenizer)
        with pytest.raises(ValueError, match="token 300 of .* but the model expects 299"):
            config = type(model.config)(**{**model.config.to_dict(), "image_token_id": 299})
            TinyAlignProcessor.from_vision_text_pretrained(checkpoints["siglip"], checkpoints["llama"], config)


@pytest.mark.parametrize(
    "wrong", [None, [], "hello", {"role": "user", "content": "hello"}, ["hello"], [3], [{}], [0.5]]
)
def test_things_that_are_no_chat(wrong, processor):
    with pytest.raises(ValueError, match="expected"):
        processor.apply_chat_template(wrong)


@pytest.mark.parametrize("part", [None, 0.5, ("text",), {"type": "image_url", "image_url": {}}])
def test_things_that_are_no_part_of_a_chat(part, processor):
    with pytest.raises(ValueError, match="expected|0. images were passed"):
        processor.apply_chat_template(
            [{"role": "user", "content": [part, {"type": "text", "text": "a"}]}], tokenize=True
        )


def test_a_message_of_nothing_asks_nothing(language_processor):
    chat = [{"role": "user", "content": None}, {"role": "user", "content": "what is it?"}]
    inputs = language_processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_tensors="pt")
    assert language_processor.decode(inputs["query_input_ids"][0]).strip() == "what is it?"


@pytest.mark.parametrize("wrong", [3, [3], [], {"text": "hello"}])
def test_things_that_are_no_text(wrong, processor):
    with pytest.raises(TypeError, match="text is .*expected a text or a list of texts"):
        processor(text=wrong)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        processor(text="half a character: \ud83d")


def test_a_tokenizer_in_python_is_refused(processor, tmp_path):
    (tmp_path / "vocab.json").write_text('{"<image>": 0, "a": 1, "<unk>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    with pytest.raises(ValueError, match=r"^The tokenizer is CTRLTokenizer, expected one that has a tokenizer.json.$"):
        TinyAlignProcessor(processor.image_processor, slow)


def test_tensors_of_chats_without_images(processor):
    messages = [{"role": "user", "content": "a red square"}]
    settings = {"tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(messages, return_tensors="pt", **settings)
    assert inputs["pixel_values"].shape[0] == 0 and inputs["pixel_values"].ndim == 4
    assert "pixel_values" not in processor.apply_chat_template(messages, **settings)
