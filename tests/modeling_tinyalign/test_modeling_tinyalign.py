"""The model: towers, language models, batching, generation, saving, bad input."""

import copy
import inspect
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from tinyalign_vlm import TinyAlignConfig, TinyAlignForConditionalGeneration, TinyAlignModel

PROMPTS = ("what is in the image?", "user", "a red square on a white background?")
MEMORY = (2, 3, 5)  # top_k, memory_tokens, latent_dim of the tiny models


def chat(images: list, text: str) -> list[dict]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


def encode(processor, chats: list, padding_side: str = "left") -> dict:
    return processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )


def memory_values(images: int, seed: int = 0, top_k: int = 2) -> torch.Tensor:
    return torch.randn(images, top_k, *MEMORY[1:], generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def ragged(processor, images):
    """Three rows: two images, one image, no image; prompts of different lengths."""
    chats = [chat(images[:2], PROMPTS[0]), chat(images[2:3], PROMPTS[1]), chat([], PROMPTS[2])]
    return chats, {**encode(processor, chats), "memory_values": memory_values(3)}


def answer(model, inputs: dict, **kwargs) -> torch.Tensor:
    output = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :]


def singles(processor, chats: list, values: torch.Tensor):
    """The rows of a batch, one at a time."""
    start = 0
    for row in chats:
        inputs = encode(processor, [row])
        count = sum(part["type"] == "image" for part in row[0]["content"])
        if count:
            inputs["memory_values"] = values[start : start + count]
        start += count
        yield inputs


@pytest.mark.parametrize("text", ["llama", "qwen2", "phi"])
def test_language_models_keep_their_weights(make_model, checkpoints, text):
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(checkpoints["siglip"], checkpoints[text])
    original = AutoModelForCausalLM.from_pretrained(checkpoints[text])
    input_ids = torch.arange(5, 25)[None]
    logits = model(input_ids=input_ids).logits[..., : original.vocab_size]
    torch.testing.assert_close(logits, original(input_ids=input_ids).logits)
    assert (model.lm_head.bias is not None) == (text == "phi")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (text == "llama")
    assert model.get_input_embeddings().num_embeddings > model.config.image_token_id
    # the end token that the chat template teaches is one as well
    found, end = model.generation_config.eos_token_id, original.generation_config.eos_token_id
    assert found == ([end, 1] if text == "phi" else end)


@pytest.mark.parametrize(
    ("vision", "config", "shape"),
    [
        ("siglip", {}, (16, 16)),
        ("siglip-dual", {"vision_feature_layer": -1}, (16, 16)),
        ("siglip", {"vision_feature_layer": [-2, -1]}, (16, 32)),
        ("siglip", {"vision_pool_size": 2}, (4, 16)),
        ("clip", {}, (17, 16)),
        ("clip", {"vision_feature_select_strategy": "default"}, (16, 16)),
        ("clip-dual", {"vision_feature_select_strategy": "default", "vision_feature_layer": [0, 1, -1]}, (16, 48)),
        ("efficientnet", {}, (64, 1280)),
        ("efficientnet", {"vision_pool_size": 3}, (9, 1280)),
    ],
)
def test_vision_towers(make_model, make_processor, images, vision, config, shape):
    model = make_model(vision, **config)
    processor = make_processor(model, vision)
    inputs = encode(processor, [chat(images[:1], PROMPTS[0]), chat(images[1:3], PROMPTS[1])])
    assert (model.config.image_seq_length, model.config.vision_feature_size) == shape
    features = model.get_vision_features(inputs["pixel_values"])
    assert features.shape[2] == shape[1] and not features.requires_grad
    tokens = model.get_image_features(inputs["pixel_values"], memory_values=memory_values(3)).pooler_output
    assert [token.shape for token in tokens] == [(shape[0] + 3, 32)] * 3
    assert torch.isfinite(model(**inputs, memory_values=memory_values(3)).logits).all()


def test_vision_features_are_those_of_the_tower(make_model, make_processor, checkpoints, images):
    """Checkpoint, dual checkpoint and saved model give the same hidden states; a CNN's grid is read row by row."""
    for vision in ("siglip-dual", "clip-dual", "efficientnet"):
        model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
            checkpoints[vision], checkpoints["llama"], vision_feature_layer=-1
        )
        pixel_values = torch.randn(2, 3, 32, 32)
        tower = AutoModel.from_pretrained(checkpoints[vision])
        if vision == "efficientnet":
            expected = tower(pixel_values).last_hidden_state.permute(0, 2, 3, 1).reshape(2, 64, 1280)
        else:
            expected = tower.vision_model(pixel_values, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model.get_vision_features(pixel_values), expected)


@pytest.mark.parametrize(
    ("vision", "text", "config"),
    [
        (
            SiglipVisionConfig(
                hidden_size=1152, intermediate_size=256, num_attention_heads=16, image_size=384, patch_size=14
            ),
            Qwen2Config(hidden_size=2048, intermediate_size=256, num_attention_heads=16, num_key_value_heads=2),
            {"image_seq_length": 729},
        ),
        (
            CLIPVisionConfig(
                hidden_size=1024, intermediate_size=256, num_attention_heads=16, image_size=336, patch_size=14
            ),
            PhiConfig(hidden_size=2560, intermediate_size=256, num_attention_heads=32, partial_rotary_factor=0.4),
            {"image_seq_length": 576, "vision_feature_select_strategy": "default", "lm_head_bias": True},
        ),
        (
            SiglipVisionConfig(),
            LlamaConfig(hidden_size=576, intermediate_size=256, num_attention_heads=9, num_key_value_heads=3),
            {"image_seq_length": 49, "vision_pool_size": 7},
        ),
    ],
    ids=["siglip-so400m-qwen2.5-3b", "clip-large-phi-2", "siglip-base-smollm2-135m"],
)
def test_two_layers_of_the_real_width(vision, text, config):
    """Real widths and heads; the MLPs are narrow to be quick."""
    vision.num_hidden_layers = text.num_hidden_layers = 2
    text.vocab_size = 100
    model = TinyAlignForConditionalGeneration(
        TinyAlignConfig(vision_config=vision, text_config=text, image_token_id=99, memory_input="both", **config)
    ).eval()
    count = model.config.num_image_tokens
    assert count == config["image_seq_length"] + 32
    input_ids = torch.tensor([[1, *[99] * count, 2, 3]])
    pixel_values = torch.randn(1, 3, vision.image_size, vision.image_size)
    memory = {"memory_values": torch.randn(1, 4, 32, 96), "memory_input_ids": torch.randint(90, (1, 32))}
    memory["memory_scores"] = torch.rand(1, 4)
    with torch.no_grad():
        logits = model(input_ids=input_ids, pixel_values=pixel_values, **memory).logits
    assert logits.shape == (1, count + 3, 100) and torch.isfinite(logits).all()


def test_a_language_model_with_other_names(checkpoints, tmp_path):
    """GPT-2 has neither `model` nor `embed_tokens`; its head is tied."""
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=2))
    gpt2.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path / "gpt2")
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(checkpoints["siglip"], tmp_path / "gpt2")
    model.save_pretrained(tmp_path / "model")
    loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = {"input_ids": torch.full((1, 50), 300), "pixel_values": torch.randn(1, 3, 32, 32), "memory": "off"}
    inputs["input_ids"][0, 48:] = 5
    assert loaded(**inputs).logits.equal(model(**inputs).logits)


def test_pooling_needs_a_square_grid(make_model):
    with pytest.raises(ValueError, match="Found 17 visual tokens, .*default"):
        make_model("clip", vision_pool_size=2)


def test_composition_reports_what_is_random(checkpoints, caplog, tmp_path):
    folder = tmp_path / "headless"
    AutoModelForCausalLM.from_pretrained(checkpoints["phi"]).model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tmp_path / checkpoints["phi"] / file).read_bytes())
    TinyAlignForConditionalGeneration.from_vision_text_pretrained(checkpoints["siglip"], folder)
    report = caplog.messages[-1]
    for part in ("connector, memory_connector", "row 300 for <image>", "2 weights", "lm_head.bias, lm_head.weight"):
        assert part in report


def test_composition_in_half_precision(checkpoints):
    """Both models, but not the connectors; what is given for one of them counts more."""
    compose = TinyAlignForConditionalGeneration.from_vision_text_pretrained
    names = (checkpoints["siglip"], checkpoints["llama"])
    model = compose(*names, dtype=torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "connector" not in name} == {torch.bfloat16}
    assert model.model.connector.linear_1.weight.dtype == torch.float32
    mixed = compose(*names, dtype="bfloat16", vision_kwargs={"dtype": torch.float32}).model
    assert (mixed.vision_tower.dtype, mixed.language_model.dtype) == (torch.float32, torch.bfloat16)


def test_composition_refuses_unknown_names(checkpoints):
    compose = TinyAlignForConditionalGeneration.from_vision_text_pretrained
    for name, message in (("memory_topk", "did you mean memory_top_k"), ("revision", "vision_kwargs")):
        with pytest.raises(ValueError, match=f"{name} is no field of TinyAlignConfig.*{message}"):
            compose(checkpoints["siglip"], checkpoints["llama"], **{name: 3})


def test_the_pad_token_has_a_gradient(make_model, tmp_path):
    """It is often the end token as well: composed, and loaded as saved."""
    made = make_model()
    made.config.text_config.pad_token_id = made.config.text_config.eos_token_id
    made.save_pretrained(tmp_path)
    for model in (made, TinyAlignForConditionalGeneration.from_pretrained(tmp_path)):
        model.train()
        pad = model.config.text_config.pad_token_id
        ids = torch.tensor([[pad, 5, pad, 7]])
        model(input_ids=ids, labels=ids).loss.backward()
        embeddings = model.get_input_embeddings()
        assert embeddings.padding_idx is None
        embedded = embeddings(torch.tensor([pad])).sum()
        (gradient,) = torch.autograd.grad(embedded, embeddings.weight)
        assert gradient[pad].abs().sum() > 0


def test_batch_equals_singles(model, processor, ragged):
    chats, batch = ragged
    for side in ("left", "right"):
        inputs = {**encode(processor, chats, side), "memory_values": batch["memory_values"]}
        logits = model(**inputs).logits
        for row, single in enumerate(singles(processor, chats, batch["memory_values"])):
            expected = model(**single).logits[0]
            torch.testing.assert_close(
                logits[row][inputs["attention_mask"][row].bool()], expected, atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 2, "use_cache": False},
        {"num_beams": 2, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_generation_of_a_batch_equals_singles(model, processor, ragged, kwargs):
    chats, batch = ragged
    expected = [answer(model, single, **kwargs)[0] for single in singles(processor, chats, batch["memory_values"])]
    if "prompt_lookup_num_tokens" in kwargs:  # one row at a time is all it can do
        plain = [answer(model, single)[0] for single in singles(processor, chats, batch["memory_values"])]
        assert [row.tolist() for row in expected] == [row.tolist() for row in plain]
        return
    found = answer(model, batch, **kwargs)
    assert found.tolist() == torch.stack(expected).tolist()


def test_sampling_sequences_of_a_row_share_its_images(model, ragged):
    _, batch = ragged
    torch.manual_seed(0)
    found = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2, top_k=1)
    greedy = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert found.tolist() == greedy.repeat_interleave(2, 0).tolist()


def test_chunked_prefill_is_right_or_refused(model, ragged):
    _, batch = ragged
    try:
        found = answer(model, batch, prefill_chunk_size=7)
    except ValueError as error:
        assert "cannot prefill images in chunks" in str(error)
    else:
        assert found.equal(answer(model, batch))


def cache_names() -> list[str]:
    """Names of the cache in this transformers: since 5.24 `cache`, and until 5.40 `past_key_values` as well."""
    known = inspect.signature(LlamaModel.forward).parameters
    return ["cache", "past_key_values"] if "cache" in known else ["past_key_values"]


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # the old name is the caller's
@pytest.mark.parametrize("name", cache_names())
@torch.no_grad()
def test_a_cache_is_taken_and_returned(model, ragged, name):
    """The last token alone, behind a cache of the others, has the logits that it has in the whole prompt."""
    _, batch = ragged
    images = {key: batch[key][:2] for key in ("pixel_values", "memory_values")}  # of the first row
    prompt = {key: batch[key][:1] for key in ("input_ids", "attention_mask")}
    whole = model(**prompt, **images)
    outputs = model(**{key: value[:, :-1] for key, value in prompt.items()}, **images)
    last = {"input_ids": prompt["input_ids"][:, -1:], "attention_mask": prompt["attention_mask"]}
    again = model(**last, **{name: outputs[name]})
    assert again[name].get_seq_length() == prompt["input_ids"].shape[1]
    torch.testing.assert_close(again.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # the old name is the caller's
@pytest.mark.parametrize("name", cache_names())
def test_generate_takes_a_cache(model, ragged, name):
    """Generated in two calls, the second from the cache of the first: what one call says."""
    _, batch = ragged
    expected = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, **settings)
    mask = F.pad(batch["attention_mask"], (0, 3), value=1)
    rest = {"input_ids": first.sequences, "attention_mask": mask, name: first[name]}
    second = model.generate(**rest, max_new_tokens=3, min_new_tokens=3, **settings)
    assert torch.equal(second.sequences, expected)


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # the old name is the caller's
@pytest.mark.parametrize("name", cache_names())
@pytest.mark.parametrize("new_images", [0, 1])
@pytest.mark.parametrize("whole", [True, False])
def test_a_chat_goes_on_from_a_cache(model, processor, images, name, new_images, whole):
    """The second turn from the cache of the first, with all images again: what it is without a cache."""
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    turns = chat(images[:2], PROMPTS[0])
    first = encode(processor, [turns])
    values = memory_values(3)
    found = model.generate(**first, memory_values=values[:2], **settings, return_dict_in_generate=True)
    ids = found.sequences
    turns += chat(images[2 : 2 + new_images], PROMPTS[2])
    rest = encode(processor, [turns[1:]])
    pixels = [first["pixel_values"]] + ([rest["pixel_values"]] if new_images else [])
    seen = {"pixel_values": torch.cat(pixels), "memory_values": values[: 2 + new_images]}
    inputs = {"input_ids": torch.cat([ids, rest["input_ids"]], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = model.generate(**inputs, **seen, **settings)[:, -4:]
    cached = found[name].get_seq_length()
    with torch.no_grad():
        logits = model(**inputs, **seen).logits[:, -1]
        new = {**inputs, "input_ids": inputs["input_ids"][:, cached:], name: copy.deepcopy(found[name])}
        torch.testing.assert_close(model(**new, **seen).logits[:, -1], logits, atol=1e-4, rtol=1e-4)
    if not whole:
        inputs["input_ids"] = inputs["input_ids"][:, cached:]
    assert model.generate(**inputs, **seen, **{name: found[name]}, **settings)[:, -4:].equal(expected)


def test_a_batch_of_chats_goes_on_from_a_cache(model, processor, images):
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    chats = [chat(images[:2], PROMPTS[1]), chat(images[2:3], PROMPTS[0])]
    batch, values = encode(processor, chats), memory_values(4)
    found = model.generate(**batch, memory_values=values[:3], **settings, return_dict_in_generate=True)
    rest = encode(processor, [chat(images[3:4], PROMPTS[1]), chat([], PROMPTS[2])])
    inputs = {
        "input_ids": torch.cat([found.sequences, rest["input_ids"]], 1),
        "attention_mask": torch.cat([F.pad(batch["attention_mask"], (0, 3), value=1), rest["attention_mask"]], 1),
        "pixel_values": torch.cat([batch["pixel_values"][:2], rest["pixel_values"], batch["pixel_values"][2:]]),
        "memory_values": values[[0, 1, 3, 2]],
    }
    expected = model.generate(**inputs, **settings)
    cache = found[cache_names()[0]]
    assert model.generate(**inputs, **settings, **{cache_names()[0]: cache}).equal(expected)


def test_a_cache_that_ends_within_an_image(model, ragged):
    _, batch = ragged
    row = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    row |= {name: batch[name][:2] for name in ("pixel_values", "memory_values")}
    place = (row["input_ids"][0] == model.config.image_token_id).nonzero()[5].item()
    cache = model(input_ids=torch.full((1, place), 5), use_cache=True)[cache_names()[0]]
    with pytest.raises(ValueError, match="The cache ends within an image, after 5 of its 19 tokens"):
        model.generate(**row, max_new_tokens=1, **{cache_names()[0]: cache})


@torch.no_grad()
def test_generate_without_a_prompt_and_with_embeddings(model, ragged):
    """As transformers' models do: from the first token, and from embeddings that are complete."""
    _, batch = ragged
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    start = torch.tensor([[model.generation_config.bos_token_id]])
    assert model.generate(**settings).equal(model.generate(input_ids=start, **settings))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    features = model.get_image_features(**{name: batch[name] for name in ("pixel_values", "memory_values")})
    embeds[batch["input_ids"] == model.config.image_token_id] = torch.cat(features.pooler_output)
    expected, mask = model.generate(**batch, **settings), batch["attention_mask"]
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, **settings)
    assert found.equal(expected[:, -3:])
    given = {"input_ids": batch["input_ids"], "inputs_embeds": embeds, "attention_mask": mask}
    assert model.generate(**given, **settings).equal(expected)
    whole = model(**batch).logits
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, whole)


def test_no_deprecation_of_ours(model, ragged, monkeypatch):
    """transformers warns of old names through its loggers, once a process."""
    messages = []

    def warn(self, message, *args, **kwargs):
        messages.append(str(message))

    monkeypatch.setattr(logging.Logger, "warning_once", warn)
    monkeypatch.setattr(logging.Logger, "warning", warn)
    _, batch = ragged
    model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    model(**batch, return_dict=False)
    model.generate(**batch, max_new_tokens=2, do_sample=False, num_beams=2, return_dict_in_generate=True)
    assert [message for message in messages if "deprecated" in message] == []


def test_outputs_tell_of_the_images(model, ragged):
    _, batch = ragged
    for outputs in (model(**batch), model.model(**batch)):
        assert [len(tokens) for tokens in outputs.image_outputs.pooler_output] == [model.config.num_image_tokens] * 3
        assert len(outputs.image_outputs.last_hidden_state) == 3
    text = model(input_ids=torch.tensor([[5, 6]]))
    assert text.image_outputs is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_connectors_are_float32_whatever_the_default_dtype_is(make_model, dtype):
    config = make_model().config
    torch.set_default_dtype(dtype)
    try:
        model = TinyAlignForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    connectors = {parameter.dtype for name, parameter in model.named_parameters() if "connector" in name}
    assert connectors == {torch.float32}


def test_the_image_token_is_never_generated(make_model, make_processor, images):
    model = make_model()
    inputs = encode(make_processor(model), [chat(images[:1], PROMPTS[0])])
    model.lm_head = torch.nn.Linear(32, 301)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data[300] = 100.0
    assert (answer(model, {**inputs, "memory_values": memory_values(1)}) != 300).all()


def test_generate_takes_the_same_inputs_as_forward(model, processor, images):
    inputs = {**encode(processor, [chat(images[:2], PROMPTS[0])]), "memory_values": memory_values(2)}
    expected = answer(model, inputs)
    features = model.get_vision_features(inputs.pop("pixel_values"))
    assert answer(model, {**inputs, "vision_features": features}).equal(expected)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        vision_features=features,
        memory_values=inputs["memory_values"],
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        num_beams=2,
    )
    assert found.equal(answer(model, {**inputs, "vision_features": features}, num_beams=2))


def test_images_that_are_encoded_already(model, processor, images):
    """What is to be remembered about them cannot change any more: it is refused, and not left out in silence."""
    inputs = {**encode(processor, [chat(images[:2], PROMPTS[0])]), "memory_values": memory_values(2)}
    expected = answer(model, inputs)
    seen = {"image": model.get_image_features(inputs.pop("pixel_values"), memory_values=inputs.pop("memory_values"))}
    assert answer(model, {**inputs, "mm_encoder_outputs": seen, "memory": "on"}).equal(expected)
    for late in ({"memory": "off"}, {"exclude_ids": [0, 1]}, {"memory_top_k": 1}, {"memory_values": memory_values(2)}):
        with pytest.raises(ValueError, match=f"Found {next(iter(late))} with mm_encoder_outputs"):
            answer(model, {**inputs, "mm_encoder_outputs": seen, **late})
        with pytest.raises(ValueError, match=f"Found {next(iter(late))} with mm_encoder_outputs"):
            model(**inputs, mm_encoder_outputs=seen, **late)


def test_parts_on_the_disk(make_model, make_processor, images, tmp_path):
    """A tower and connectors that accelerate loads when they are needed. (SigLIP's head cannot be.)"""
    model = make_model("clip", vision_feature_select_strategy="default")
    processor = make_processor(model, "clip")
    model.save_pretrained(tmp_path / "model")
    inputs = {**encode(processor, [chat(images[:2], PROMPTS[0])]), "memory_values": memory_values(2)}
    places = dict.fromkeys(("model.language_model", "lm_head"), "cpu")
    places |= dict.fromkeys(("model.vision_tower", "model.connector", "model.memory_connector"), "disk")
    loaded = TinyAlignForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_attention_implementations_agree(model, ragged, tmp_path):
    _, batch = ragged
    logits = {}
    for implementation in ("eager", "sdpa"):
        other = copy.deepcopy(model)
        other.set_attn_implementation(implementation)
        assert other.model.language_model.config._attn_implementation == implementation
        logits[implementation] = other(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-4, rtol=1e-4)


def test_memory_off_and_empty_slots_are_the_same(model, processor, images):
    inputs = encode(processor, [chat(images[:1], PROMPTS[0])])
    off = model(**inputs, memory="off").logits
    empty = model(**inputs, memory_values=memory_values(1), memory_ids=torch.full((1, 2), -1)).logits
    full = model(**inputs, memory_values=memory_values(1)).logits
    torch.testing.assert_close(off, empty)
    assert not torch.allclose(off, full)
    assert answer(model, inputs, memory="off").shape == (1, 4)


def test_latents_of_every_neighbour_are_read_in_order(model):
    pixel_values = torch.zeros(1, 3, 32, 32)
    values = memory_values(1)
    tokens = [
        model.get_image_features(pixel_values, memory_values=v).pooler_output[0][16:]
        for v in (values, values.flip(1), values * torch.tensor([1.0, 0.0])[:, None, None])
    ]
    assert not torch.allclose(tokens[0], tokens[1]) and not torch.allclose(tokens[0], tokens[2])


def test_top_k_zero_is_the_plain_baseline(make_model, make_processor, images):
    model = make_model(memory_top_k=0)
    assert not any("memory" in name for name, _ in model.named_parameters())
    inputs = encode(make_processor(model), [chat(images[:1], PROMPTS[0])])
    assert answer(model, inputs).equal(answer(model, inputs, memory="off"))
    with pytest.raises(ValueError, match="memory_top_k is 0"):
        model(**inputs, memory_values=memory_values(1))


def test_loss_at_supervised_positions_only(model, ragged):
    _, batch = ragged
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    labels[:, ::2] = -100
    full = model(**batch, labels=labels)
    short = model(**batch, labels=labels, supervised_logits_only=True)
    torch.testing.assert_close(short.loss, full.loss)
    assert short.logits.shape == ((labels[:, 1:] != -100).sum(), model.config.text_config.vocab_size)
    accumulated = model(**batch, labels=labels, supervised_logits_only=True, num_items_in_batch=7).loss
    torch.testing.assert_close(accumulated, full.loss * (labels[:, 1:] != -100).sum() / 7)


def test_logits_to_keep(model, ragged):
    _, batch = ragged
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, model(**batch).logits[:, -1:])


def test_base_model_fuses_without_the_head(model, ragged):
    """TRL calls `model.base_model(**inputs)` and has a loss of its own."""
    _, batch = ragged
    hidden = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(**batch).logits)


def test_gradients_and_checkpointing(make_model, ragged):
    _, batch = ragged
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            newer = hasattr(model, "activation_checkpointing_enable")  # its name from transformers 5.23 on
            (model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable)()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert not any("vision_tower" in name for name in gradients[0])
    for part in ("model.connector.linear_1.weight", "model.memory_connector.mlp.linear_1.weight"):
        assert gradients[0][part].abs().sum() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4)


def test_frozen_parts_in_bfloat16_with_connectors_in_float32(make_model, ragged):
    """Stage 1: connectors train in float32 between frozen parts in bfloat16."""
    _, batch = ragged
    model = make_model().train()
    model.requires_grad_(False)
    model.model.vision_tower.bfloat16()
    model.model.language_model.bfloat16()
    model.lm_head.bfloat16()
    connectors = (model.model.connector, model.model.memory_connector)
    for connector in connectors:
        connector.requires_grad_(True)
    output = model(**batch, labels=batch["input_ids"], supervised_logits_only=True)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    gradients = [p.grad for connector in connectors for p in connector.parameters()]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_the_vision_tower_stays_in_evaluation_mode(make_model):
    """Batch statistics and dropout of a CNN would move the keys."""
    model = make_model("efficientnet").train()
    pixel_values = torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(model.model.vision_tower.state_dict())
    first, second = model.get_vision_features(pixel_values), model.get_vision_features(pixel_values)
    assert model.model.connector.training and not model.model.vision_tower.training
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    assert first.equal(second)
    assert all(before[name].equal(tensor) for name, tensor in model.model.vision_tower.state_dict().items())


def test_image_features_with_what_the_tower_puts_out(make_model, ragged):
    """On request, as every model of transformers gives them; and all of it as a tuple, too."""
    model = make_model(attn_implementation="eager")
    inputs = {name: ragged[1][name] for name in ("pixel_values", "memory_values")}
    plain = model.get_image_features(**inputs)
    assert plain.hidden_states is None and plain.attentions is None
    outputs = model.get_image_features(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    torch.testing.assert_close(outputs.hidden_states[-2], outputs.last_hidden_state)
    features, tokens = model.get_image_features(**inputs, return_dict=False)
    assert torch.equal(features, plain.last_hidden_state)
    assert all(torch.equal(*pair) for pair in zip(tokens, plain.pooler_output, strict=True))


@pytest.mark.parametrize("top_k", [0, 2])
def test_quantizers_leave_the_connectors_alone(make_model, top_k):
    model = make_model(memory_top_k=top_k)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            converted = should_convert_module(name, model._keep_in_fp32_modules)
            assert converted != ("connector" in name), name


def test_config_round_trip(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    loaded = TinyAlignConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {
        **model.config.to_dict(),
        "auto_map": loaded.auto_map,
        "dtype": loaded.to_dict()["dtype"],
    }
    with pytest.raises(ValueError, match="memory_top_k is -1"):
        TinyAlignConfig(top_k=-1)
    with pytest.raises(ValueError, match="Found top_k=3 and memory_top_k=5, two names"):
        TinyAlignConfig(top_k=3, memory_top_k=5)
    for name in ("memory_tokens", "latent_dim", "image_seq_length"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected 1 or more"):
            TinyAlignConfig(**{name: 0})
    with pytest.raises(StrictDataclassFieldValidationError, match="memory_top_k"):
        TinyAlignConfig(top_k="3")


def test_top_k_is_another_name_of_memory_top_k(checkpoints, tmp_path):
    assert TinyAlignConfig().memory_top_k == 4
    assert TinyAlignConfig(top_k=0).memory_top_k == 0
    config = TinyAlignConfig(top_k=3, memory_top_k=3)
    assert config.to_dict() == TinyAlignConfig(top_k=3).to_dict() == TinyAlignConfig(memory_top_k=3).to_dict()
    config.save_pretrained(tmp_path / "config")
    assert "top_k" not in json.loads((tmp_path / "config" / "config.json").read_text())
    assert TinyAlignConfig.from_pretrained(tmp_path / "config").memory_top_k == 3
    model = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        checkpoints["siglip"], checkpoints["llama"], top_k=3
    )
    model.save_pretrained(tmp_path / "model")
    loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.config.memory_top_k == 3 and loaded.generation_config.top_k == model.generation_config.top_k
    for name in ("top_k", "memory_top_k"):
        loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "model", **{name: 0})
        assert loaded.config.memory_top_k == 0 and not any("memory" in key for key in loaded.state_dict())
        assert TinyAlignConfig.from_pretrained(tmp_path / "config", **{name: 4}).memory_top_k == 4
    with pytest.raises(ValueError, match="efficientnet config has no hidden_size"):
        TinyAlignConfig(vision_config={"model_type": "efficientnet"})


class TestBadInput:
    def test_a_row_with_wrong_placeholders_is_named(self, model, processor, images):
        """Two wrong rows must not cancel out."""
        inputs = encode(processor, [chat(images[:1], PROMPTS[0]), chat(images[1:2], PROMPTS[0])])
        inputs["memory_values"] = memory_values(2)
        ids = inputs["input_ids"]
        position = (ids == model.config.image_token_id)[1].nonzero()[0]
        ids[1, position] = 5
        ids[0, 0] = model.config.image_token_id
        for call in (model, model.model, model.generate):
            with pytest.raises(
                ValueError, match=r"Row 0 has 20 image placeholders .* multiple of 19: 16 visual \+ 3 memory"
            ):
                call(**inputs)

    def test_number_of_images(self, model, ragged):
        _, batch = ragged
        with pytest.raises(ValueError, match=r"\[2, 1, 0\] images, 3 in all, but 2 images"):
            model(**{**batch, "pixel_values": batch["pixel_values"][:2], "memory_values": memory_values(2)})
        without = {name: value for name, value in batch.items() if name not in ("pixel_values", "memory_values")}
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"\[38, 19, 0\] image placeholders .* no image was given"):
                call(**without)

    def test_memory(self, model, processor, images):
        inputs = encode(processor, [chat(images[:1], PROMPTS[0])])
        with pytest.raises(ValueError, match=r"no memory bank is attached.*attach_memory_bank.*memory='off'"):
            model(**inputs)
        with pytest.raises(ValueError, match=r"shape \(1, 2, 4, 5\), expected .* = \(1, 2, 3, 5\)"):
            model(**inputs, memory_values=torch.zeros(1, 2, 4, 5))
        with pytest.raises(ValueError, match=r"shape \(1, 3, 3, 5\)"):
            model(**inputs, memory_values=torch.zeros(1, 3, 3, 5))
        with pytest.raises(ValueError, match="memory is 'none', expected 'on' or 'off'"):
            model(**inputs, memory="none")

    @pytest.mark.parametrize("made, changed", [(2, 3), (0, 2)])
    def test_another_top_k(self, make_model, made, changed):
        model = make_model(memory_top_k=made)
        model.config.memory_top_k = changed
        with pytest.raises(ValueError, match=f"memory_top_k is {changed}, but the model was made for {made} neighb"):
            model.get_image_features(torch.zeros(1, 3, 32, 32), memory="off")

    def test_nothing_given(self, model):
        with pytest.raises(ValueError, match="Pass input_ids or inputs_embeds"):
            model.generate(pixel_values=torch.zeros(1, 3, 32, 32), memory="off")
        for images in ({}, {"pixel_values": 0, "vision_features": 0}):
            with pytest.raises(ValueError, match="exactly one of pixel_values and vision_features"):
                model.retrieve(**images)

    def test_visual_tokens(self, model, processor, images):
        with pytest.raises(ValueError, match="9 visual tokens, expected config.image_seq_length = 16"):
            model.get_image_features(vision_features=torch.zeros(1, 9, 16), memory="off")
        with pytest.raises(ValueError, match="exactly one of pixel_values and vision_features"):
            model.get_image_features(memory="off")


def test_save_and_load(model, ragged, tmp_path):
    _, batch = ragged
    model.save_pretrained(tmp_path)
    loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded(**batch).logits.equal(model(**batch).logits)
    assert loaded.generation_config.suppress_tokens == [model.config.image_token_id]
    base = TinyAlignModel.from_pretrained(tmp_path).eval()
    assert base(**batch).last_hidden_state.equal(model.model(**batch).last_hidden_state)


def test_connectors_stay_float32(make_model, ragged, tmp_path):
    """What stage 1 trained in float32 is loaded as it was saved, in a model that is otherwise bfloat16."""
    _, batch = ragged
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = TinyAlignForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "connector" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "connector" not in name} == {torch.bfloat16}
    assert loaded(**batch).logits.dtype == torch.bfloat16
    assert answer(loaded, batch).shape == (3, 4)
    loaded.save_pretrained(tmp_path / "again")
    again = TinyAlignForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert again(**batch).logits.equal(loaded(**batch).logits)


def test_configs_that_are_none_of_a_model(checkpoints, make_model, tmp_path):
    for name in ("llama", "siglip"):
        with pytest.raises(ValueError, match="config.json is of a .* model, expected a TinyAlign checkpoint"):
            TinyAlignForConditionalGeneration.from_pretrained(checkpoints[name])
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="retrieval_threshold is 80.0, expected -1 or more, and at most 1"):
        TinyAlignConfig.from_pretrained(tmp_path, retrieval_threshold=80.0)


def test_another_bank_is_not_at_the_commit_of_the_one_that_is_named(tmp_path):
    TinyAlignConfig(memory_bank="org/bank", memory_bank_revision="0" * 40).save_pretrained(tmp_path)
    assert TinyAlignConfig.from_pretrained(tmp_path).memory_bank_revision == "0" * 40
    config = TinyAlignConfig.from_pretrained(tmp_path, memory_bank="other/bank")
    assert (config.memory_bank, config.memory_bank_revision) == ("other/bank", None)
    config = TinyAlignConfig.from_pretrained(tmp_path, memory_bank="other/bank", memory_bank_revision="v1")
    assert config.memory_bank_revision == "v1"


def test_a_local_bank_is_not_saved(make_model, tmp_path, caplog):
    model = make_model()
    model.config.memory_bank = str(tmp_path)
    model.save_pretrained(tmp_path / "model")
    assert "local path" in caplog.text and model.config.memory_bank == str(tmp_path)
    assert TinyAlignConfig.from_pretrained(tmp_path / "model").memory_bank is None


def test_a_local_bank_outlives_a_save_that_fails(make_model, tmp_path):
    model = make_model()
    model.config.memory_bank = str(tmp_path)
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path / "model", max_shard_size=object())
    assert model.config.memory_bank == str(tmp_path)
