"""Licences and commits of base models and data sets, for configs, banks and cards of what is made of them."""


def upload(repo_id: str, repo_type: str, files: dict[str, str]) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type=repo_type, exist_ok=True)
    for name, content in files.items():
        commit = api.upload_file(
            path_or_fileobj=content.encode(), path_in_repo=name, repo_id=repo_id, repo_type=repo_type
        )
    return commit.oid


def part(name: str, hub_type: str, revision: str | None = None) -> dict:
    from tinyalign_vlm.training.hub.parts import describe_part

    return vars(describe_part("a part", name, hub_type, revision))


def test_parts_have_the_commit_and_the_licence_of_the_hub(owner, user):
    card = "---\nlicense: {}\n---\n"
    files = {"README.md": card.format("mit"), "config.json": "{}"}
    first = owner.run(upload, "owner/tower", "model", files)
    found = {"role": "a part", "source": "owner/tower", "revision": first, "license": "mit", "hub_type": "model"}
    assert user.run(part, "owner/tower", "model") == found

    commit = owner.run(upload, "owner/pairs", "dataset", {"README.md": card.format("[mit, cc-by-4.0]")})
    pairs = user.run(part, "owner/pairs", "dataset")
    assert (pairs["revision"], pairs["license"]) == (commit, "mit, cc-by-4.0")

    commit = owner.run(upload, "owner/bare", "model", {"config.json": "{}"})
    bare = user.run(part, "owner/bare", "model")
    assert (bare["revision"], bare["license"]) == (commit, "unknown")
    assert user.run(part, "owner/none", "model")["revision"] == "unknown"

    # main went on
    newer = owner.run(upload, "owner/tower", "model", {"README.md": card.format("apache-2.0")})
    assert user.run(part, "owner/tower", "model", first) == found
    assert user.run(part, "owner/tower", "model")["revision"] == newer


def upload_folder(repo_id: str, folder: str) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id)
    return api.upload_folder(repo_id=repo_id, folder_path=folder).oid


def compose(tower: str, text: str, revision: str) -> dict:
    """What is known of the parts of a model that was composed, saved and loaded."""
    from tinyalign_vlm import TinyAlignForConditionalGeneration
    from tinyalign_vlm.training.bank.build import describe_tower

    composed = TinyAlignForConditionalGeneration.from_vision_text_pretrained(
        tower, text, vision_kwargs={"revision": revision}
    )
    composed.save_pretrained("composed")
    model = TinyAlignForConditionalGeneration.from_pretrained("composed")
    tower = describe_tower(model, [3, 32, 32])
    model.push_to_hub("owner/composed")
    return {
        "tower": [tower.name, tower.revision],
        "text": [model.config.text_config._name_or_path, model.config.language_model_revision],
    }


def test_a_composed_model_knows_its_commits(hub, owner, user, checkpoints):
    vision = owner.run(upload_folder, "owner/vision", checkpoints["siglip"])
    text = owner.run(upload_folder, "owner/text", checkpoints["llama"])
    owner.run(upload, "owner/vision", "model", {"README.md": "# newer"})
    found = owner.run(compose, "owner/vision", "owner/text", vision)
    assert found == {"tower": ["owner/vision", vision], "text": ["owner/text", text]}
    card = hub.files("owner/composed")["README.md"].decode()
    for name, commit in (("owner/vision", vision), ("owner/text", text)):
        assert f"[{name}](https://huggingface.co/{name}) | {commit} |" in card
