"""The fake Hub does for huggingface_hub what the Hub does."""

import pytest
from hub.machines import RemoteError


def use_it() -> dict:
    import os

    from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, hf_hub_download, snapshot_download

    api, large = HfApi(), os.urandom(100_000)
    api.create_repo("org/tools", private=True)
    adds = [CommitOperationAdd("sub/large.bin", large), CommitOperationAdd("small.json", b"{}")]
    first = api.create_commit("org/tools", adds, commit_message="first")
    api.create_tag("org/tools", tag="v1")
    api.create_branch("org/tools", branch="dev")
    on_dev = api.upload_file(
        path_or_fileobj=b"[]", path_in_repo="small.json", repo_id="org/tools", revision="dev", commit_message="on dev"
    )
    request = api.upload_file(path_or_fileobj=b"1", path_in_repo="pr.json", repo_id="org/tools", create_pr=True)
    unchanged = api.create_commit("org/tools", [CommitOperationAdd("sub/large.bin", large)], commit_message="again")
    with HfFileSystem().open("org/tools/sub/large.bin", block_size=1000) as file:
        file.seek(50_000)
        part = file.read(10)
    snapshot = snapshot_download("org/tools", revision="v1")
    refs = api.list_repo_refs("org/tools", include_pull_requests=True)
    return {
        "snapshot": open(f"{snapshot}/sub/large.bin", "rb").read() == large,
        "part": part == large[50_000:50_010],
        "small": [open(hf_hub_download("org/tools", "small.json", revision=r)).read() for r in ("v1", "dev")],
        "unchanged": unchanged.oid == first.oid,
        "refs": [ref.name for ref in refs.branches + refs.tags + refs.pull_requests],
        "pull request": api.list_repo_files("org/tools", revision="refs/pr/1"),
        "number": request.pr_num,
        "titles": [commit.title for commit in api.list_repo_commits("org/tools", revision="dev")],
        "info": [api.model_info("org/tools", revision="dev").sha == on_dev.oid, api.model_info("org/tools").private],
        "lfs": [file.lfs is not None for file in api.get_paths_info("org/tools", ["sub/large.bin", "small.json"])],
        "tree": sorted(entry.path for entry in api.list_repo_tree("org/tools")),
    }


def test_what_huggingface_hub_does(hub, owner):
    found = owner.run(use_it)
    assert found == {
        "snapshot": True,
        "part": True,
        "small": ["{}", "[]"],
        "unchanged": True,
        "refs": ["main", "dev", "v1", "1"],
        "pull request": [".gitattributes", "pr.json", "small.json", "sub/large.bin"],
        "number": 1,
        "titles": ["on dev", "first", "initial commit"],
        "info": [True, True],
        "lfs": [True, False],
        "tree": [".gitattributes", "small.json", "sub"],
    }


def refused(what: str, token: str | bool):
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    if what == "read":
        api.model_info("org/locked")
    elif what == "create":
        api.create_repo("org/another")
    else:
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="org/open")


@pytest.mark.parametrize(
    ("what", "token", "error"),
    [
        ("read", False, "RepositoryNotFoundError: 401"),
        ("read", "hf_other", "RepositoryNotFoundError: 404"),
        ("read", "hf_wrong", "Invalid credentials"),
        ("create", False, "401 Unauthorized"),
        ("write", False, "401"),
        ("write", "hf_other", "403 Forbidden: You don't have the rights to write to org/open"),
    ],
)
def test_who_may_do_what(hub, owner, what, token, error):
    for name, private in (("org/open", False), ("org/locked", True)):
        hub.repositories.pop(("model", name), None)
        hub.create("owner", {"name": name.split("/")[1], "organization": "org", "private": private})
    with pytest.raises(RemoteError, match=error):
        owner.run(refused, what, token)
