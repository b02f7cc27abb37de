"""A bank on the Hub is a dataset like any other, and a bank."""

import pytest
from hub.machines import RemoteError
from huggingface_hub import DatasetCard

COLUMNS = {
    "id": "Value('int64')",
    "source_id": "Value('string')",
    "caption": "Value('string')",
    "key": "List(Value('float32'), length=16)",
    "value": "List(Value('float16'), length=15)",
    "thumbnail": "Image(mode=None, decode=True)",
}


def push(folder: str, repo: str, kwargs: dict, seed: int | None = None, shard_bytes: int | None = None) -> str:
    from tinyalign_vlm import MemoryBank
    from tinyalign_vlm.modeling_tinyalign import bank_folder, bank_rows

    before = bank_folder.SHARD_BYTES, bank_folder.BATCH_ROWS
    if shard_bytes is not None:
        bank_folder.SHARD_BYTES = shard_bytes
        bank_folder.BATCH_ROWS = bank_rows.BATCH_ROWS = 2
    try:
        bank = MemoryBank.from_pretrained(folder)
        return (bank if seed is None else bank.shuffled(seed)).push_to_hub(repo, **kwargs).oid
    finally:
        bank_folder.SHARD_BYTES, bank_folder.BATCH_ROWS = before
        bank_rows.BATCH_ROWS = before[1]


def rows(repo: str, kwargs: dict) -> list[str]:
    from tinyalign_vlm import MemoryBank

    return MemoryBank.from_pretrained(repo, **kwargs).captions


def keys(repo: str, revision: str) -> str:
    from tinyalign_vlm import MemoryBank

    return MemoryBank.from_pretrained(repo, revision=revision).config.sha256.keys


@pytest.fixture(scope="module")
def bank(owner, saved) -> str:
    """Commit of org/rows."""
    return owner.run(push, saved["bank"], "org/rows", {}, None, 2000)


def look_at(name: str) -> list:
    """What `bank info`, `verify` and `view` print of a bank, and the page."""
    import contextlib
    import io
    from pathlib import Path

    from tinyalign_cli.main import main

    texts = []
    for command in (["info", name], ["verify", name], ["view", name, "-o", "page.html"]):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            main(["bank", *command])
        texts.append(output.getvalue())
    return [*texts, Path("page.html").read_text()]


def test_commands_that_look_at_a_bank_take_its_repository(bank, user):
    info, verified, view, page = user.run(look_at, "org/rows")
    assert "12 of 12 images" in info and verified == "org/rows: OK\n"
    assert view.startswith("page.html: 12 of 12 rows") and '"name": "org/rows"' in page and bank not in page
    for name in ("no/such-bank", "nothing", "some/where/else"):
        with pytest.raises(RemoteError, match=name):
            user.run(look_at, name)


def load_columns(repo: str, streaming: bool) -> dict:
    from datasets import load_dataset

    dataset = load_dataset(repo, streaming=streaming)
    rows = list(dataset["train"])
    return {
        "splits": list(dataset),
        "columns": {name: str(feature) for name, feature in dataset["train"].features.items()},
        "captions": [row["caption"] for row in rows],
        "picture": [rows[0]["thumbnail"].mode, *rows[0]["thumbnail"].size],
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset(bank, user, hub, streaming):
    assert user.run(load_columns, "org/rows", streaming) == {
        "splits": ["train"],
        "columns": COLUMNS,
        "captions": [f"noise {i}" for i in range(12)],
        "picture": ["RGB", 24, 24],
    }
    assert sum(name.endswith(".parquet") for name in hub.files("org/rows", "dataset")) > 3


def from_datasets(folder: str) -> dict:
    """Captions of banks made of loaded rows."""
    from datasets import load_dataset

    from tinyalign_vlm import MemoryBank

    dataset, bank = load_dataset("org/rows", split="train"), MemoryBank.from_pretrained("org/rows")
    streamed = load_dataset("org/rows", split="train", streaming=True)
    few = dataset.filter(lambda row: row["id"] % 5 == 0)
    kept = bank.rows([0, 5, 10])
    banks = {
        "all": MemoryBank.from_dataset(dataset, like=folder),
        "few": MemoryBank.from_dataset(few, like=bank),
        "streamed": MemoryBank.from_dataset(streamed, like="org/rows"),
        "folder": MemoryBank.from_dataset(streamed.decode(False).filter(lambda row: row["id"] % 5 == 0), like=folder),
    }
    for part in ("keys", "values", "rows"):
        hashes = {vars(bank.config.sha256)[part] for bank in (bank, banks["all"], banks["streamed"])}
        assert len(hashes) == 1, part
    for name in ("few", "folder"):
        assert [row["source_id"] for row in banks[name].rows([0, 1, 2])] == [row["source_id"] for row in kept]
        assert banks[name].thumbnail(1).tobytes() == bank.thumbnail(5).tobytes()
        assert (banks[name].gather([1]) == bank.gather([5])).all()
    return {name: bank.captions for name, bank in banks.items()}


def test_from_dataset(bank, owner, saved):
    found, few = owner.run(from_datasets, saved["bank"]), ["noise 0", "noise 5", "noise 10"]
    everything = [f"noise {i}" for i in range(12)]
    assert found == {"all": everything, "streamed": everything, "few": few, "folder": few}


def test_from_dataset_takes_one_split(bank, owner):
    def of_all_splits():
        from datasets import load_dataset

        from tinyalign_vlm import MemoryBank

        MemoryBank.from_dataset(load_dataset("org/rows"), like="org/rows")

    with pytest.raises(RemoteError, match=r"has the splits \['train'\]: pass one of them"):
        owner.run(of_all_splits)


def test_downloaded_once(owner, make_machine, hub, saved):
    commit = owner.run(push, saved["bank"], "org/once", {}, 1)
    machine = make_machine("once")
    hub.requests.clear()
    captions = machine.run(rows, "org/once", {"revision": commit})
    downloads = [request for request in hub.requests if request.startswith("GET /cdn")]
    assert len(downloads) == 3 and not [request for request in hub.requests if "README" in request]
    hub.requests.clear()
    assert machine.run(rows, "org/once", {"revision": commit}) == captions
    assert hub.requests == [], "a pinned revision that is there needs no network"
    assert machine.run(rows, "org/once", {}) == captions
    assert [request for request in hub.requests if "resolve" in request] == [
        "HEAD /datasets/org/once/resolve/main/bank_config.json"
    ]


def test_one_commit_and_no_stale_shards(owner, user, hub, saved):
    owner.run(push, saved["bank"], "org/growing", {}, None, 2000)
    before = hub.files("org/growing", "dataset")
    hub.repositories["dataset", "org/growing"].at("main").files["data/notes.txt"] = (
        hub.repositories["dataset", "org/growing"].at("main").files["README.md"]
    )
    commit = owner.run(push, saved["bank"], "org/growing", {"commit_message": "Shuffled"}, 2)
    after = hub.files("org/growing", "dataset")
    assert sum(name.endswith(".parquet") for name in before) > 3
    found = {name for name in after if name.startswith("data/")}
    assert found == {"data/train-00000-of-00001.parquet", "data/notes.txt"}
    history = hub.repositories["dataset", "org/growing"].history("main")
    assert [entry["title"] for entry in history] == ["Shuffled", "Upload memory bank", "initial commit"]
    assert history[0]["id"] == commit and len(user.run(rows, "org/growing", {})) == 12
    assert user.run(rows, "org/growing", {"revision": history[1]["id"]}) == [f"noise {i}" for i in range(12)]


def test_branches_and_pull_requests(owner, user, hub, saved):
    first = owner.run(push, saved["bank"], "org/branches", {})
    on_branch = owner.run(push, saved["bank"], "org/branches", {"revision": "next"}, 1)
    requested = owner.run(push, saved["bank"], "org/branches", {"create_pr": True}, 2)
    repository = hub.repositories["dataset", "org/branches"]
    assert [repository.resolve(name) for name in ("main", "next", "refs/pr/1")] == [first, on_branch, requested]
    found = [user.run(keys, "org/branches", name) for name in ("main", "next", "refs/pr/1")]
    assert len(set(found)) == 3 and found == [
        user.run(keys, "org/branches", sha) for sha in (first, on_branch, requested)
    ]
    with pytest.raises(RemoteError, match="at revision nope .*RevisionNotFoundError"):
        user.run(rows, "org/branches", {"revision": "nope"})


def test_the_card(owner, hub, saved):
    owner.run(push, saved["bank"], "org/card", {})
    card = DatasetCard(hub.files("org/card", "dataset")["README.md"].decode())
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert "| 12 |" in card.text or "12 rows" in card.text, card.text
    assert "More Information Needed" not in card.text
    owner.run(push, saved["bank"], "org/card", {"card": "Mine."}, 1)
    owner.run(push, saved["bank"], "org/card", {}, 2)
    assert hub.files("org/card", "dataset")["README.md"] == b"Mine."


def remove(folder: str) -> dict:
    from tinyalign_vlm import MemoryBank

    bank = MemoryBank.from_pretrained(folder)
    name = bank.rows([3])[0]["source_id"]
    errors = []
    for rows in (12, -1, "0" * 32, list(range(12))):
        try:
            bank.remove(rows)
        except ValueError as error:
            errors.append(str(error))
    smaller = bank.remove([name, 7, 7])
    return {
        "captions": [bank.remove(name).captions, bank.remove(0).captions, smaller.captions],
        "ids": [row["id"] for row in smaller.rows(range(10))],
        "left": [len(bank), len(smaller.ids_of(name))],
        "searched": smaller.search(bank.key_encoder.mean[None], 10)[1].shape[1],
        "errors": errors,
    }


def test_remove(owner, saved):
    found = owner.run(remove, saved["bank"])
    everything = [f"noise {i}" for i in range(12)]
    assert found["captions"] == [
        [caption for i, caption in enumerate(everything) if i not in gone] for gone in ({3}, {0}, {3, 7})
    ]
    assert found["ids"] == list(range(10)) and found["left"] == [12, 0] and found["searched"] == 10
    *unknown, everything = found["errors"]
    assert all("has no row" in error and "an id from 0 to 11" in error for error in unknown) and len(unknown) == 3
    assert "All 12 rows would be removed" in everything


def upload_pairs(numbers: list[int], repo_id: str) -> str:
    import io

    import datasets
    from huggingface_hub import HfApi
    from PIL import Image

    rows = [{"image": Image.effect_noise((24 + number, 24), 90), "caption": f"picture {number}"} for number in numbers]
    content, api = io.BytesIO(), HfApi()
    datasets.Dataset.from_list(rows).to_parquet(content)
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    settings = {"path_in_repo": "train.parquet", "repo_id": repo_id, "repo_type": "dataset"}
    return api.upload_file(path_or_fileobj=content.getvalue(), **settings).oid


def build(repo_id: str, revision: str | None, model: str, bank: str, parts: int | None = None) -> list[str]:
    """Build a bank, or so many parts of eight rows of it, and return its captions."""
    from tinyalign_vlm import MemoryBank
    from tinyalign_vlm.training.bank import encode
    from tinyalign_vlm.training.bank.from_files import BuildSettings, build_from_files

    encode.PART_ROWS, save, done = 8, encode.save_file, []

    def save_some(*arguments):
        if len(done) == parts:
            raise KeyboardInterrupt
        done.append(save(*arguments))

    encode.save_file = save_some
    try:
        build_from_files(
            BuildSettings(repo_id, model=model, value_encoder=bank, dataset_revision=revision), "of_a_repository"
        )
    except KeyboardInterrupt:
        return []
    finally:
        encode.save_file = save
    return MemoryBank.from_pretrained("of_a_repository").captions


def test_a_repository_that_changes_while_a_bank_is_built_is_not_mixed(owner, saved):
    arguments = "owner/growing", saved["model"], saved["bank"]
    first = owner.run(upload_pairs, list(range(40)), arguments[0])
    assert owner.run(build, arguments[0], None, *arguments[1:], 2) == []
    owner.run(upload_pairs, list(range(10, 40)), arguments[0])
    with pytest.raises(RemoteError, match=f"unfinished work of other settings .*dataset_revision: '{first}' then"):
        owner.run(build, arguments[0], None, *arguments[1:])
    captions = owner.run(build, arguments[0], first, *arguments[1:])
    assert captions == [f"picture {number}" for number in range(40)]
