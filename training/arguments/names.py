"""Names of models, banks and data sets: a folder, or a repository of the Hub. A mistyped one is told at once."""

import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

HUB_SECONDS = 10  # to wait for the Hub


def check_name(setting: str, name: str | os.PathLike, repo_type: str = "model") -> None:
    """Ask for a folder or file, or else once for a repository of the Hub.

    Args:
        setting: What the user calls it: `memory_bank`, `--like`.
        repo_type: `"model"` or `"dataset"`, as banks are.

    Raises:
        OSError: There is neither, or the Hub cannot be asked and the repository is not in the cache.
    """
    path = Path(name).expanduser()
    if path.exists():
        return
    missing = f"{setting} is {str(name)!r}: there is no {path.absolute()}, and "
    repo_id = str(name)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OSError(f"{missing}a repository of the Hub would be called OWNER/NAME.") from error
    if constants.HF_HUB_OFFLINE:
        unreachable = "is not asked (HF_HUB_OFFLINE)"
    else:
        try:
            HfApi().repo_info(repo_id, repo_type=repo_type, timeout=HUB_SECONDS)
            return
        except RepositoryNotFoundError as error:
            raise OSError(
                f"{missing}the Hub ({constants.ENDPOINT}) has no {repo_type} repository of that name, or it is "
                "private and you are not logged in (hf auth login)."
            ) from error
        except Exception as error:  # of an HTTP library that changes from version to version
            unreachable = f"cannot be reached ({type(error).__name__})"
    if not Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type=repo_type)).is_dir():
        raise OSError(
            f"{missing}the Hub ({constants.ENDPOINT}), where a {repo_type} repository of that name might be, "
            f"{unreachable}. Check the name, or the connection."
        )
