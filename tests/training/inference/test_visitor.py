"""Pictures that the app begins with."""

import io

from PIL import Image

from tinyalign_vlm.training.inference.visitor import examples_of


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
