"""A fake Hub, machines that use it, and what is pushed from them."""

import numpy as np
import pytest
from card_rules import card_errors
from fake_hub import FakeHub
from hub.machines import Machine
from PIL import Image

from tinyalign_vlm import MemoryBank, ValueEncoder, ValueEncoderConfig


@pytest.fixture(scope="session")
def hub():
    with FakeHub(card_errors) as hub:
        yield hub


@pytest.fixture(scope="session")
def make_machine(hub, tmp_path_factory):
    """`make_machine(name, token=None, **environment)`: a new process; the same name has the same caches."""
    root, machines = tmp_path_factory.mktemp("machines"), []

    def make(name: str, token: str | None = None, **environment: str) -> Machine:
        home = root / name
        home.mkdir(exist_ok=True)
        machines.append(Machine({**hub.environment(home / "hf", token), **environment}, home))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


@pytest.fixture(scope="session")
def owner(make_machine) -> Machine:
    """Where things are pushed from; the package is installed."""
    return make_machine("owner", "hf_owner")


@pytest.fixture(scope="session")
def user(make_machine) -> Machine:
    """A stranger's machine without a token; the package is installed."""
    return make_machine("user")


@pytest.fixture(scope="session")
def saved(make_model, make_processor, tmp_path_factory) -> dict[str, str]:
    """Folders "model" (with its processor) and "bank", which fit together."""
    root = tmp_path_factory.mktemp("saved")
    model = make_model()
    processor = make_processor(model)
    sizes = {"num_latents": 3, "latent_dim": 5, "vision_feature_size": 16, "num_vision_tokens": 16}
    heads = {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "num_self_attends_per_block": 1}
    widths = {"d_model": 16, "bytes_per_patch": 4}
    value_encoder = ValueEncoder(ValueEncoderConfig(**sizes, **heads, **widths))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(image), "caption": f"noise {i}"} for i, image in enumerate(pixels)]
    bank = MemoryBank.build(rows, model, processor, value_encoder)
    bank.save_pretrained(root / "bank")
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    rows[0]["image"].save(root / "query.png")
    return {"model": str(root / "model"), "bank": str(root / "bank"), "query": str(root / "query.png")}
