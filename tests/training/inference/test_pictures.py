"""Pictures that were looked at are kept: by their pixels, bounded, for each bank anew."""

import gc

import torch

from tinyalign_vlm import MemoryBank
from tinyalign_vlm.training.inference import pictures as pictures_module
from tinyalign_vlm.training.inference.conversation import Conversation
from tinyalign_vlm.training.inference.pictures import Pictures


def pixels_of(parts, images) -> torch.Tensor:
    return parts.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


def test_a_picture_is_looked_at_once(parts, images, tower_calls, monkeypatch):
    monkeypatch.setattr(pictures_module, "KEPT_PICTURES", 2)
    pictures, pixels = Pictures(parts.model), pixels_of(parts, images[:3])
    first = pictures.look_at(pixels[0])
    assert torch.equal(first.features, parts.model.get_vision_features(pixels[:1]))
    del tower_calls[:]
    assert pictures.look_at(pixels[0].clone()) is first and tower_calls == []
    for image in pixels[1:]:
        pictures.look_at(image)
    assert len(pictures._kept) == 2 and len(tower_calls) == 2
    assert pictures.look_at(pixels[0]) is not first  # it was the one not asked for longest
    pictures.forget(pictures.look_at(pixels[0]).name)
    assert len(pictures._kept) == 1


def test_other_pixels_are_another_picture(parts, images):
    pictures, pixels = Pictures(parts.model), pixels_of(parts, images[:1])[0]
    changed = pixels.clone()
    changed[0, 0, 0] += 0.01
    names = {pictures.look_at(image).name for image in (pixels, changed, pixels.double(), pixels.flip(1))}
    assert len(names) == 4


def test_a_changed_bank_is_seen_at_once(parts, images, monkeypatch):
    picture = Pictures(parts.model).look_at(pixels_of(parts, images[:1])[0])
    searches, search = [], type(parts.bank).search
    monkeypatch.setattr(type(parts.bank), "search", lambda *args: searches.append(args) or search(*args))
    _, scores, ids = picture.neighbours(parts.bank, 2, {})
    assert picture.neighbours(parts.bank, 2, {})[2] is ids and len(searches) == 1 and ids[0, 0] == 0
    assert picture.neighbours(parts.bank, 2, {}, [parts.bank.rows([0])[0]["source_id"]])[2][0, 0] == ids[0, 1]
    smaller = parts.bank.remove(0)
    assert picture.neighbours(smaller, 2, {})[1][0, 0] == scores[0, 1]
    del smaller, searches[:]
    gc.collect()
    assert len(picture._found) == 1  # a bank that is gone is not kept alive


def test_language_keys_depend_on_the_question(make_model, make_processor, images, captions):
    model = make_model(key_space="language", memory_input="captions")
    processor = make_processor(model)
    rows = [{"image": image, "caption": caption} for image, caption in zip(images, captions, strict=True)]
    model.attach_memory_bank(MemoryBank.build(rows, model, processor), tokenizer=processor.tokenizer)
    chat, found = Conversation(model, processor, max_new_tokens=2), []
    for question in ("a red square", "what is it?"):
        list(chat.ask(question, images[0]))
        query = processor.query_inputs([question])
        expected = model.retrieve(images[0], **query)
        found.append([source.similarity for source in chat.sources])
        assert [source.id for source in chat.sources] == expected.ids[0].tolist()
        assert torch.allclose(torch.tensor(found[-1]), expected.scores[0], atol=1e-5)
        chat.clear()
    assert found[0] != found[1] and len(chat.lessons.pictures._kept) == 1
    image = images[0].rotate(90)
    chat.teach(image, "a zorblax")
    model.attach_memory_bank(model.memory_bank.add(image, model, processor, captions="a zorblax"))
    list(chat.ask("a red square", image))
    expected = model.retrieve(image, **processor.query_inputs(["a red square"]))
    assert [source.caption for source in chat.sources] == expected.captions[0]
