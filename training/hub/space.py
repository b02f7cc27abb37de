"""A demo Space for a checkpoint on the Hub."""

import tempfile

from huggingface_hub import CommitInfo, HfApi

from ...hub_cards.cards import write_space
from ...hub_cards.facts import ModelFacts, SpaceFacts

SUMMARY = "Ask about an image, and see which examples it looked at"
BASELINE_SUMMARY = "Ask about an image"


def push_space(
    repo_id: str, facts: ModelFacts, model_revision: str, private: bool | None = None, revision: str | None = None
) -> CommitInfo:
    """
    Puts a chat with a model into a Space, which is created if it does not exist.

    Args:
        facts: Of the model as it is on the Hub, see [`~tinyalign_vlm.hub_cards.facts.on_hub`].
        model_revision: The commit whose weights and code the Space runs.

    Raises:
        ValueError: A fact is missing.
        OSError: The Hub refused, or can't be reached.
    """
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    space = SpaceFacts(
        repo_id=url.repo_id,
        summary=SUMMARY if facts.bank else BASELINE_SUMMARY,
        license=facts.license,
        model=facts.repo_id,
        model_revision=model_revision,
        bank=facts.bank and facts.bank.source,
        prompt=facts.example.prompt,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_space(folder, space)
        return api.upload_folder(
            repo_id=url.repo_id,
            repo_type="space",
            folder_path=folder,
            commit_message=f"A chat with {facts.repo_id}",
            revision=revision,
        )
