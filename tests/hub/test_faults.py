"""A Hub that fails or lies: a clear error, and a local cache that stays usable."""

import contextlib
import hashlib

import pytest
from hub.machines import RemoteError, without_the_package

SHARD = "data/train-00000-of-00001.parquet"
FILES = ("bank_config.json", "key_encoder.safetensors", "value_encoder/model.safetensors", SHARD)


def push_shuffled(folder: str, repos: list[str]):
    """Banks of different content, so that none is found in the cache of another."""
    from tinyalign_vlm import MemoryBank

    bank = MemoryBank.from_pretrained(folder)
    for seed, repo in enumerate(repos):
        bank.shuffled(seed).push_to_hub(repo)


def load_bank(repo: str, revision: str | None = None) -> str:
    """Opens all that a bank has; does not wait for a server to recover."""
    import time

    from tinyalign_vlm import MemoryBank

    time.sleep = lambda seconds: None
    bank = MemoryBank.from_pretrained(repo, revision=revision)
    assert len(bank.captions) == 12 and bank.gather([0, 11]).any() and bank.value_encoder is not None
    return bank.config.sha256.keys


def load_model(repo: str) -> float:
    import time

    from transformers import AutoModelForImageTextToText

    time.sleep = lambda seconds: None
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    return sum(parameter.double().sum().item() for parameter in model.parameters())


def half(body: bytes) -> bytes:
    return body[: len(body) // 2]


def flipped(body: bytes) -> bytes:
    """One byte in the middle is another."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 255]) + body[middle + 1 :]


def requests_for(hub, repo: str, name: str, repo_type: str, settings: dict) -> str:
    """A pattern for the requests for a file, on the Hub and on its CDN; the size in a HEAD answer stays true."""
    sha256 = hashlib.sha256(hub.files(repo, repo_type)[name]).hexdigest()
    return f"^({'GET|HEAD' if 'status' in settings else 'GET'}) .*({repo}/resolve/.*/{name}|/cdn/{sha256})$"


DOWN = "OSError: {name} of the memory bank '{repo}' at revision .* could not be downloaded .*Check the name"
FAULTS = {
    "500": ({"status": 500}, DOWN),
    "403": ({"status": 403}, DOWN),
    "404": ({"status": 404}, DOWN),
    "short": ({"change": half}, DOWN),
    "dropped": ({"keep": 0.5}, DOWN),
    "changed": ({"change": flipped}, "ValueError: .*{repo_folder}.*({name}|/data: the sha256 of the).*(ownload)"),
}
CASES = [(fault, name) for fault in FAULTS for name in FILES]
OTHERS = ("resumed", "cached", *(f"restored-{number}" for number in range(len(FILES))))


@pytest.fixture(scope="module")
def machine(owner, make_machine, saved):
    names = [*range(len(CASES)), *OTHERS]
    owner.run(push_shuffled, saved["bank"], [f"org/fault-{name}" for name in names])
    return make_machine("faults")


@pytest.fixture(scope="module")
def bare(make_machine):
    """A machine without the package, for the code in the repository."""
    machine = make_machine("bare")
    machine.run(without_the_package)
    return machine


@pytest.mark.parametrize(("fault", "name"), CASES)
def test_a_bank_that_fails_to_come(hub, machine, fault, name):
    repo = f"org/fault-{CASES.index((fault, name))}"
    settings, error = FAULTS[fault]
    error = error.format(repo=repo, repo_folder=repo.replace("/", "--"), name=name)
    with hub.fault(requests_for(hub, repo, name, "dataset", settings), **settings) as met:
        with pytest.raises(RemoteError, match=f"(?s){error}"):
            machine.run(load_bank, repo)
    assert met.hits
    machine.run(load_bank, repo)


def test_a_dropped_connection_is_taken_up_again(hub, machine):
    settings = {"keep": 0.5, "times": 1}
    with hub.fault(requests_for(hub, "org/fault-resumed", SHARD, "dataset", settings), **settings) as met:
        with contextlib.suppress(RemoteError):  # huggingface_hub 1.5 goes on at the next call, later ones at once
            machine.run(load_bank, "org/fault-resumed")
        machine.run(load_bank, "org/fault-resumed")
    assert met.hits == 1


@pytest.mark.parametrize("name", FILES)
def test_a_file_changed_under_a_pinned_commit(hub, machine, name):
    """ETag and all; then the Hub is honest again."""
    repo = f"org/fault-restored-{FILES.index(name)}"
    original = hub.files(repo, "dataset")[name]
    commit = hub.repositories["dataset", repo].resolve("main")
    hub.overwrite(repo, name, flipped(original), "dataset")
    try:
        with pytest.raises(RemoteError, match=f"(?s)ValueError: .*({name}|/data: the sha256).*ownload"):
            machine.run(load_bank, repo, commit)
    finally:
        hub.overwrite(repo, name, original, "dataset")
    keys = machine.run(load_bank, repo, commit)

    # what was checked is not fetched again, whatever the Hub has become
    hub.overwrite(repo, name, b"nonsense", "dataset")
    try:
        assert machine.run(load_bank, repo, commit) == keys
    finally:
        hub.overwrite(repo, name, original, "dataset")


def test_a_hub_that_goes_away(hub, machine):
    """What is in the cache is used, by name as well as by commit."""
    repo = "org/fault-cached"
    keys, commit = machine.run(load_bank, repo), hub.repositories["dataset", repo].resolve("main")
    for settings in ({"status": 500}, {"status": 403}, {"status": 404}, {"keep": 0.0}):
        with hub.fault(".*", **settings):
            assert [machine.run(load_bank, repo), machine.run(load_bank, repo, commit)] == [keys, keys]


@pytest.mark.parametrize("name", ["model.safetensors", "connectors.py", "config.json"])
@pytest.mark.parametrize("fault", ["500", "403", "404", "short", "dropped"])
def test_a_model_that_fails_to_come(hub, owner, bare, saved, fault, name):
    def push(folder: str, repo: str):
        from transformers import AutoModelForImageTextToText

        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).push_to_hub(repo)

    repo = f"org/model-{fault}-{name.split('.')[0]}"
    owner.run(push, saved["model"], repo)
    settings, _ = FAULTS[fault]
    with hub.fault(requests_for(hub, repo, name, "model", settings), **settings) as met:
        with pytest.raises(RemoteError):
            bare.run(load_model, repo)
    assert met.hits
    assert bare.run(load_model, repo) == bare.run(load_model, saved["model"])


@pytest.mark.parametrize(
    "request_", ["POST .*/preupload/", "POST .*/objects/batch", "PUT /upload/", "POST .*/commit/"]
)
@pytest.mark.parametrize("status", [403, 500])
def test_a_push_that_is_refused_leaves_nothing_half(hub, owner, saved, request_, status):
    def push(folder: str, repo: str, seed: int):
        import time

        from tinyalign_vlm import MemoryBank

        time.sleep = lambda seconds: None
        bank = MemoryBank.from_pretrained(folder).shuffled(seed)
        try:
            bank.push_to_hub(repo)
        finally:
            assert bank.repo_id is not None or bank.revision is None

    owner.run(push, saved["bank"], "org/refused", 100)
    before, seed = hub.repositories["dataset", "org/refused"].resolve("main"), len(hub.requests)
    with hub.fault(request_, status=status) as met:
        with pytest.raises(RemoteError, match=f"{status}|RuntimeError: Error while uploading"):
            owner.run(push, saved["bank"], "org/refused", seed)
    assert met.hits and hub.repositories["dataset", "org/refused"].resolve("main") == before
    owner.run(push, saved["bank"], "org/refused", seed)
    assert hub.repositories["dataset", "org/refused"].resolve("main") != before
