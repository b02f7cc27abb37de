"""A visitor of the app, and the pictures that it begins with."""

import io

import pytest
from PIL import Image

from tinyalign_vlm.training.inference.visitor import Shared, Visitor, examples_of


def test_the_example_of_a_checkpoint_is_read_like_an_upload(make_model, images, tmp_path):
    """A checkpoint is anybody's: PIL would hand an EPS file to another program, and a broken one would end the app."""
    model, picture = make_model(), tmp_path / "example.png"
    images[0].save(picture)
    assert [example.tobytes() for example in examples_of(str(tmp_path), model)] == [images[0].tobytes()]
    eps = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(eps, "EPS")
    for content in (eps.getvalue(), b"broken", b""):
        picture.write_bytes(content)
        assert list(examples_of(str(tmp_path), model)) == []


def test_a_picture_that_was_left_out_is_read_when_it_is_taught_again(parts, images):
    visitor = Visitor(Shared(parts.model, parts.processor, "model"))
    visitor.look_at(images[9])
    visitor.teach(images[9], "wrong")
    visitor.left_out = [visitor.lessons.rows[0]["source_id"]]
    visitor.teach(images[9], "right")
    list(visitor.ask("what?", 2, 0, False))
    assert visitor.with_memory.sources[0].caption == "right"


def test_a_question_that_fails_is_not_the_last_one(parts, images):
    visitor = Visitor(Shared(parts.model, parts.processor, "model"))
    visitor.look_at(images[9])
    list(visitor.ask("one?", 2, 0, True))
    with pytest.raises(ValueError, match="context"):
        list(visitor.ask("x y " * 499, 2, 0, True))
    assert visitor.last_question() == "one?"
