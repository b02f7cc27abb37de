"""Licences and commits of base models and data sets, for the card of what is trained from them."""


def upload(repo_id: str, repo_type: str, files: dict[str, str]) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type=repo_type)
    for name, content in files.items():
        commit = api.upload_file(
            path_or_fileobj=content.encode(), path_in_repo=name, repo_id=repo_id, repo_type=repo_type
        )
    return commit.oid


def part(name: str, hub_type: str) -> dict:
    from tinyalign_vlm.training.training_card import part_of

    return vars(part_of("a part", name, hub_type))


def test_parts_have_the_commit_and_the_licence_of_the_hub(owner, user):
    card = "---\nlicense: {}\n---\n"
    files = {"README.md": card.format("mit"), "config.json": "{}"}
    commit = owner.run(upload, "owner/tower", "model", files)
    found = {"role": "a part", "source": "owner/tower", "revision": commit, "license": "mit", "hub_type": "model"}
    assert user.run(part, "owner/tower", "model") == found

    commit = owner.run(upload, "owner/pairs", "dataset", {"README.md": card.format("[mit, cc-by-4.0]")})
    pairs = user.run(part, "owner/pairs", "dataset")
    assert (pairs["revision"], pairs["license"]) == (commit, "mit, cc-by-4.0")

    commit = owner.run(upload, "owner/bare", "model", {"config.json": "{}"})
    bare = user.run(part, "owner/bare", "model")
    assert (bare["revision"], bare["license"]) == (commit, "unknown")
    assert user.run(part, "owner/none", "model")["revision"] == "unknown"
