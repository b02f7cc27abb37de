"""docs/hub.md does what it says, with a tiny model in the place of the demo's."""

import re
import shutil
from pathlib import Path

from hub.documents import run_blocks

DOCUMENT = Path(__file__).parents[2] / "docs" / "hub.md"


def test_the_walk(hub, saved, tmp_path):
    shutil.copytree(saved["model"], tmp_path / "demo" / "checkpoint")
    shutil.copytree(saved["bank"], tmp_path / "demo" / "bank_with_heldout")
    shutil.copy(saved["query"], tmp_path / "demo" / "query.png")
    for name in ("checkpoint", "bank_with_heldout"):
        (tmp_path / "demo" / name / "README.md").write_text("A card.")
    blocks = run_blocks(DOCUMENT.read_text(), tmp_path, hub.environment(tmp_path / "home", "hf_owner"))
    assert len(blocks) > 10
    for block in blocks:  # the numbers are the demo's, the form is the same
        found, shown = (
            re.sub(r"[0-9a-f]{40}|^value .*\n", "SHA", text or "", flags=re.M).splitlines()
            for text in (block.output, block.shown)
        )
        assert len(found) == len(shown), f"{block.code}printed\n{block.output}\nthe page shows\n{block.shown}"
    assert "True" in blocks[1].output
    assert hub.files("me/tinyalign-emoji")["README.md"] == b"A card."
    assert {repository for _, repository in hub.repositories if repository.startswith("me/")} == {
        "me/tinyalign-emoji",
        "me/emoji-bank",
        "me/my-model",
        "me/my-bank",
    }
