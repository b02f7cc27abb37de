"""Model, processor and bank go to the Hub and come back, with the package and without it."""

import json
import re

import accelerate
import pytest
from hub.machines import RemoteError, without_the_package

AUTO_MAP = {
    "AutoConfig": "configuration_tinyalign.TinyAlignConfig",
    "AutoModel": "modeling_tinyalign.TinyAlignModel",
    "AutoModelForImageTextToText": "modeling_tinyalign.TinyAlignForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_tinyalign.TinyAlignForConditionalGeneration",
}


def with_the_package():
    import tinyalign_vlm  # noqa: F401


def push_all(saved: dict, model_repo: str, bank_repo: str, kwargs: dict, bank_kwargs: dict) -> dict:
    """`kwargs` are for all three; returns the commits."""
    from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor

    model = TinyAlignForConditionalGeneration.from_pretrained(saved["model"])
    bank = MemoryBank.from_pretrained(saved["bank"])
    model.attach_memory_bank(bank)
    commits = {"bank": bank.push_to_hub(bank_repo, **kwargs, **bank_kwargs).oid}
    assert (bank.repo_id, bank.revision) == (bank_repo, commits["bank"])
    commits["model"] = model.push_to_hub(model_repo, **kwargs).oid
    commits["processor"] = TinyAlignProcessor.from_pretrained(saved["model"]).push_to_hub(model_repo, **kwargs).oid
    return commits


def answer(repo: str, image: str, kwargs: dict) -> dict:
    """Loads everything through the Auto classes and asks about an image."""
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    kwargs = {"trust_remote_code": True, **kwargs}
    config = AutoConfig.from_pretrained(repo, **kwargs)
    base = AutoModel.from_pretrained(repo, **kwargs)
    model = AutoModelForImageTextToText.from_pretrained(repo, **kwargs)
    processor = AutoProcessor.from_pretrained(repo, **kwargs)
    attached = [part.base_model._memory_bank is not None for part in (base, model)]
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return {
        "ids": ids[0, -4:].tolist(),
        "captions": model.retrieve(inputs["pixel_values"]).captions,
        "attached": attached,
        "bank": [model.memory_bank.repo_id, model.memory_bank.revision],
        "modules": sorted({type(part).__module__.split(".")[0] for part in (config, base, model, processor)}),
    }


@pytest.fixture(scope="module")
def pushed(owner, saved) -> dict:
    return owner.run(push_all, saved, "org/model", "org/bank", {}, {})


@pytest.fixture(scope="module")
def stranger(make_machine):
    """A machine without a token and without the package."""
    machine = make_machine("stranger")
    machine.run(without_the_package)
    return machine


@pytest.fixture(scope="module")
def answered(pushed, stranger, hub, saved) -> dict:
    return stranger.run(answer, "org/model", saved["query"], {})


def test_the_repository(hub, pushed, saved):
    files = hub.files("org/model")
    config, processor = (json.loads(files[name]) for name in ("config.json", "processor_config.json"))
    assert config["auto_map"] == AUTO_MAP
    assert processor["auto_map"] == {"AutoProcessor": "processing_tinyalign.TinyAlignProcessor"}
    assert (config["memory_bank"], config["memory_bank_revision"]) == ("org/bank", pushed["bank"])
    assert re.fullmatch("[0-9a-f]{40}", pushed["bank"])
    code = {name: content.decode() for name, content in files.items() if name.endswith(".py")}
    for name, text in code.items():
        needed = {f"{module}.py" for module in re.findall(r"^from \.(\w+) import", text, re.MULTILINE)}
        assert needed <= code.keys(), name
        without_optional = re.sub("^ +try:\n +from tinyalign_vlm.*", "", text, flags=re.MULTILINE)
        assert "tinyalign_vlm" not in re.sub('"[^"]*"|`[^`]*`', "", without_optional), name
    text = b"".join(content for name, content in files.items() if name.endswith((".json", ".jinja")))
    assert b"tmp" not in text and b"pytest" not in text, "a path of this machine"
    assert [commit["title"] for commit in hub.repositories["model", "org/model"].history("main")] == [
        "Upload processor",
        "Upload model",
        "initial commit",
    ]
    assert [commit["title"] for commit in hub.repositories["dataset", "org/bank"].history("main")] == [
        "Upload memory bank",
        "initial commit",
    ]


def test_the_bank_is_attached_at_the_first_retrieval(answered, pushed, user, saved):
    assert answered["attached"] == [False, False]
    assert answered["bank"] == ["org/bank", pushed["bank"]]
    assert answered["captions"][0][0] == "noise 0"
    assert answered["modules"] == ["transformers_modules"]
    user.run(with_the_package)
    installed = user.run(answer, "org/model", saved["query"], {})
    assert installed == {**answered, "modules": ["tinyalign_vlm"]}


def test_loading_asks_for_no_bank(hub, pushed, stranger, saved):
    def load(repo: str):
        from transformers import AutoModelForImageTextToText

        AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)

    hub.requests.clear()
    stranger.run(load, "org/model")
    assert hub.requests and not [request for request in hub.requests if "org/bank" in request]


def first_download(repo: str) -> list[str]:
    """What transformers logs when it fetches a model's Python files, as a model's card does."""
    import logging

    from transformers import AutoModelForImageTextToText, AutoProcessor

    heard, handler = [], logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    for part in (AutoModelForImageTextToText, AutoProcessor):
        part.from_pretrained(repo, revision="main", trust_remote_code=True)
    return heard


def test_a_first_download_is_quiet(make_machine, pushed):
    newcomer = make_machine("newcomer")
    newcomer.run(without_the_package)
    assert newcomer.run(first_download, "org/model") == []


def test_offline(answered, make_machine, saved, hub):
    offline = make_machine("stranger", HF_HUB_OFFLINE="1")
    offline.run(without_the_package)
    hub.requests.clear()
    assert offline.run(answer, "org/model", saved["query"], {}) == answered
    assert hub.requests == []


def push_again(repo: str, other: str) -> list[str]:
    """Load, save and push what a repository has, by its own code."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    model.save_pretrained("copy")
    processor.save_pretrained("copy")
    model = AutoModelForImageTextToText.from_pretrained("copy", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("copy", trust_remote_code=True)
    return [part.push_to_hub(other).oid for part in (model, processor)]


def test_nothing_is_lost_on_the_way(hub, pushed, answered, make_machine, stranger, saved):
    second_owner = make_machine("second owner", "hf_owner")
    second_owner.run(without_the_package)
    second_owner.run(push_again, "org/model", "org/again")
    first, again = hub.files("org/model"), hub.files("org/again")
    assert first.keys() == again.keys()
    # without the package the card is the metadata alone
    assert {name for name in first if first[name] != again[name]} <= {"README.md"}
    assert stranger.run(answer, "org/again", saved["query"], {}) == answered
    # where it came from, there is nothing to commit
    head = hub.repositories["model", "org/model"].resolve("main")
    assert second_owner.run(push_again, "org/model", "org/model") == [head, head]


def test_private_repositories(hub, owner, user, make_machine, saved, answered):
    commits = owner.run(push_all, saved, "org/secret", "org/secret-bank", {"private": True}, {})
    assert hub.repositories["model", "org/secret"].private and hub.repositories["dataset", "org/secret-bank"].private
    assert owner.run(answer, "org/secret", saved["query"], {})["bank"] == ["org/secret-bank", commits["bank"]]
    with pytest.raises(RemoteError, match="OSError: .*org/secret"):
        user.run(answer, "org/secret", saved["query"], {})

    def load_bank(repo: str, token: str | None) -> int:
        from tinyalign_vlm import MemoryBank

        return len(MemoryBank.from_pretrained(repo, token=token))

    with pytest.raises(
        RemoteError, match="(?s)bank_config.json of the memory bank 'org/secret-bank' .*401.* the token"
    ):
        user.run(load_bank, "org/secret-bank", None)
    with pytest.raises(RemoteError, match="Repository Not Found"):
        user.run(load_bank, "org/secret-bank", "hf_other")
    assert user.run(load_bank, "org/secret-bank", "hf_owner") == 12
    with pytest.raises(RemoteError, match="403 Forbidden"):
        owner.run(push_all, saved, "org/model", "org/bank", {"token": "hf_other"}, {})


def test_a_bank_that_was_only_named_is_pinned(hub, owner, pushed, saved):
    def push(folder: str, bank: str, revision: str | None) -> list:
        from tinyalign_vlm import TinyAlignForConditionalGeneration

        named = {"memory_bank": bank, "memory_bank_revision": revision}
        model = TinyAlignForConditionalGeneration.from_pretrained(folder, **named)
        model.push_to_hub("org/named")
        return [model.config.memory_bank, model.config.memory_bank_revision]

    for revision in (None, "main"):
        assert owner.run(push, saved["model"], "org/bank", revision) == ["org/bank", pushed["bank"]]
        config = json.loads(hub.files("org/named")["config.json"])
        assert (config["memory_bank"], config["memory_bank_revision"]) == ("org/bank", pushed["bank"])
    with pytest.raises(
        RemoteError, match="(?s)'org/nowhere' at revision main could not be found .*Push the bank first"
    ):
        owner.run(push, saved["model"], "org/nowhere", None)
    owner.run(push, saved["model"], saved["bank"], None)
    config = json.loads(hub.files("org/named")["config.json"])
    assert config["memory_bank"] is None and config["memory_bank_revision"] is None


def compare(repo: str, local: str, kwargs: dict) -> dict:
    """How a model loaded with `kwargs` differs from the one in a folder."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, **kwargs)
    expected = AutoModelForImageTextToText.from_pretrained(local, trust_remote_code=True)
    image_ids = [model.config.image_token_id] * model.config.num_image_tokens
    inputs = {"input_ids": torch.tensor([[*image_ids, 5, 6, 7]]), "pixel_values": torch.ones(1, 3, 32, 32)}
    with torch.no_grad():
        difference = model(**inputs, memory="off").logits.float() - expected(**inputs, memory="off").logits
    return {
        "difference": difference.abs().max().item(),
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}),
        "devices": sorted({weight.device.type for weight in model.parameters()}),
    }


def push_variants(folder: str):
    """Sharded, in bfloat16, and in a subfolder whose code is at the top, as for any remote code."""
    import torch
    from huggingface_hub import HfApi

    from tinyalign_vlm import TinyAlignForConditionalGeneration

    model = TinyAlignForConditionalGeneration.from_pretrained(folder)
    model.push_to_hub("org/sharded", max_shard_size="30KB")
    api = HfApi()
    api.create_repo("org/nested")
    api.upload_folder(repo_id="org/nested", folder_path=folder, path_in_repo="stage2/last")
    api.upload_folder(repo_id="org/nested", folder_path=folder, allow_patterns="*.py")
    TinyAlignForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).push_to_hub("org/half")


@pytest.fixture(scope="module")
def variants(owner, saved):
    owner.run(push_variants, saved["model"])


OFFLOADED = {"device_map": "auto", "max_memory": {"cpu": 100_000}}  # the rest is on the disk
TIED_ON_DISK = pytest.mark.skipif(
    accelerate.__version__ == "1.4.0", reason="accelerate 1.4 forgets tied embeddings on the disk, of any model"
)
CPU, FULL, HALF = ["cpu"], ["float32"], ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("repo", "kwargs", "dtypes", "devices"),
    [
        ("org/sharded", {}, FULL, CPU),
        ("org/sharded", {"device_map": "auto"}, FULL, CPU),
        pytest.param("org/sharded", OFFLOADED, FULL, ["cpu", "meta"], marks=TIED_ON_DISK),
        ("org/sharded", {"dtype": "bfloat16"}, HALF, CPU),
        ("org/half", {"dtype": "auto"}, HALF, CPU),
        ("org/half", {"dtype": "float32"}, FULL, CPU),
        ("org/nested", {"subfolder": "stage2/last"}, FULL, CPU),
    ],
)
@pytest.mark.parametrize("machine", ["stranger", "user"])
def test_ways_to_load(variants, request, saved, repo, kwargs, dtypes, devices, machine):
    found = request.getfixturevalue(machine).run(compare, repo, saved["model"], kwargs)
    assert found["difference"] <= (0.0 if repo != "org/half" and dtypes == FULL else 0.5)
    assert (found["dtypes"], found["devices"]) == (dtypes, devices)


def test_sharded_and_in_a_subfolder(variants, hub, stranger):
    names = hub.files("org/sharded")
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert "model.safetensors.index.json" in names

    def load(repo: str, kwargs: dict) -> int:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(repo, trust_remote_code=True, **kwargs).num_image_tokens

    assert stranger.run(load, "org/nested", {"subfolder": "stage2/last"}) == 19


def push_versions(saved: dict) -> list[str]:
    """v1; then main, with other weights, another processor and other code."""
    from huggingface_hub import HfApi

    from tinyalign_vlm import MemoryBank, TinyAlignForConditionalGeneration, TinyAlignProcessor

    api, bank = HfApi(), MemoryBank.from_pretrained(saved["bank"])
    model = TinyAlignForConditionalGeneration.from_pretrained(saved["model"])
    processor = TinyAlignProcessor.from_pretrained(saved["model"])
    model.attach_memory_bank(bank)
    bank.push_to_hub("org/two-banks")
    model.push_to_hub("org/two")
    first = processor.push_to_hub("org/two").oid
    api.create_tag("org/two", tag="v1")
    model.lm_head.weight.data += 1
    processor.chat_template = "{# second #}" + processor.chat_template
    model.attach_memory_bank(bank.shuffled())
    model.memory_bank.push_to_hub("org/two-banks")
    model.push_to_hub("org/two")
    processor.push_to_hub("org/two")
    for name in ("connectors.py", "images.py"):  # each is imported by another file
        code = open(f"{saved['model']}/{name}").read() + "\nVERSION = 2\n"
        commit = api.upload_file(path_or_fileobj=code.encode(), path_in_repo=name, repo_id="org/two")
    return [first, commit.oid]


def versions(image: str, kwargs: dict) -> dict:
    import sys

    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained("org/two", trust_remote_code=True, **kwargs)
    kwargs.pop("code_revision", None)
    processor = AutoProcessor.from_pretrained("org/two", trust_remote_code=True, **kwargs)
    pixels = processor.image_processor(images=[Image.open(image)], return_tensors="pt")["pixel_values"]
    code = {}
    for part, helper in ((model, "connectors"), (processor, "images")):
        package = type(part).__module__.rpartition(".")[0]
        code[helper] = [package.rpartition(".")[2], "VERSION" in vars(sys.modules[f"{package}.{helper}"])]
    return {
        "code": code,
        "weights": 2 if model.lm_head.weight.mean() > 0.5 else 1,
        "template": 2 if "second" in processor.chat_template else 1,
        "caption": model.retrieve(pixels, top_k=1).captions[0][0],
    }


def test_a_revision_is_of_code_and_data_alike(owner, stranger, saved):
    first, second = owner.run(push_versions, saved)
    old = {"connectors": [first, False], "images": [first, False]}
    new = {"connectors": [second, True], "images": [second, True]}
    for revision in ("v1", first):
        found = stranger.run(versions, saved["query"], {"revision": revision})
        assert found == {"code": old, "weights": 1, "template": 1, "caption": "noise 0"}
    latest = stranger.run(versions, saved["query"], {})
    assert latest["caption"] != "noise 0"
    assert latest == {"code": new, "weights": 2, "template": 2, "caption": latest["caption"]}
    mixed = stranger.run(versions, saved["query"], {"revision": "v1", "code_revision": "main"})
    assert mixed["weights"] == 1 and mixed["caption"] == "noise 0"
    assert mixed["code"] == {**old, "connectors": new["connectors"]}
