"""Files on the Hub: a bank's are fetched one by one, and all are pushed in one commit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

CARD_NAME = "README.md"
SHARDS = "data/train-*.parquet"
WEIGHTS = "model*.safetensors*"


def fetch(repo_id: str, filename: str, revision: str | None, token: str | bool | None) -> Path:
    """A file of a bank in the local cache, downloaded if it is not there; its folder is named after the commit.

    Raises:
        OSError: it could not be had. The cache is as it was.
    """
    try:
        return Path(hf_hub_download(repo_id, filename, repo_type="dataset", revision=revision, token=token))
    # huggingface_hub raises errors of its own, and those of an HTTP library that changes from version to version
    except Exception as error:
        raise OSError(
            f"{filename} of the memory bank {repo_id!r} at revision {revision or 'main'} could not be downloaded from "
            f"the Hub ({type(error).__name__}: {error}). Check the name (it is no local folder, or a revision was "
            "given), the revision, the connection and the token."
        ) from error


@contextlib.contextmanager
def forgetting(downloaded: list[Path]) -> Iterator[None]:
    """On a ValueError, take these files out of the cache, links and all, so that they are downloaded anew."""
    try:
        yield
    except ValueError:
        for path in downloaded:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise


def hub_origin(dataset: Iterable[dict]) -> tuple[str, str]:
    """Repository and commit that a `datasets.Dataset` was loaded from, which `datasets` puts into its files' names.

    Raises `ValueError`: it was not loaded from the Hub, or is streamed.
    """
    try:
        from datasets import Dataset
    except ImportError:
        Dataset = ()
    files = [file["filename"] for file in dataset.cache_files] if isinstance(dataset, Dataset) else []
    pattern = r"/([^/]+?)___([^/]+)/[^/]+/[^/]+/([0-9a-f]{40})/[^/]+$"
    origins = {match.groups() for file in files if (match := re.search(pattern, Path(file).as_posix()))}
    if len(origins) != 1:
        raise ValueError(
            f"The dataset was loaded from {len(origins)} repositories of the Hub as far as its files tell, expected "
            "one. Pass like=, the bank (or its repository or folder) whose encoders made the rows."
        )
    ((namespace, name, commit),) = origins
    return f"{namespace}/{name}", commit


def resolve_commit(repo_id: str, revision: str | None, token: str | bool | None = None) -> str:
    """The commit hash of a bank's revision. Raises `OSError`: the Hub has no such dataset or revision, or is away."""
    try:
        return HfApi().dataset_info(repo_id, revision=revision, token=token).sha
    except Exception as error:  # as in fetch
        raise OSError(
            f"The commit of the memory bank {repo_id!r} at revision {revision or 'main'} could not be found "
            f"({error}). Push the bank first (bank.push_to_hub), or detach it (model.detach_memory_bank)."
        ) from error


def push_files(
    files: dict[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    *,
    replaced: str,
    plain_card: Callable[[str], str],
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> tuple[str, CommitInfo]:
    """Put files into a repository in one commit; repository and branch are created if they do not exist.

    `HfApi.upload_folder` would do it in several commits, and between them the repository would be of two versions.

    Args:
        files: what to upload, by name in the repository.
        replaced: pattern of files that are deleted unless they are in `files`: shards of an earlier version.
        plain_card: makes README.md from the repository's name, where neither `files` nor the repository has one.

    Returns:
        the full name of the repository, and the commit.
    """
    api, where = HfApi(token=token), {"repo_type": repo_type, "revision": revision}
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    present = set(api.list_repo_files(repo_id, **where))
    if CARD_NAME not in present | files.keys():
        files = {**files, CARD_NAME: plain_card(repo_id).encode()}
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    stale = sorted(name for name in present - files.keys() if fnmatch(name, replaced))
    operations += [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        create_pr=create_pr,
        **where,
    )
    return repo_id, commit
