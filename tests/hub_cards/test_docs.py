"""docs/cards.md shows facts of a bank that make a card."""

import json
import re
from pathlib import Path

from tinyalign_vlm.hub_cards.cards import write_card

PAGE = Path(__file__).parents[2] / "docs" / "cards.md"


def test_facts_of_a_bank(bank_facts, tmp_path):
    (facts,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "card_facts.json").write_text(facts)
    (tmp_path / "bank_config.json").write_text(json.dumps(bank_facts.config))
    card = write_card(tmp_path)
    assert "North American birds only." in card.text and 'from_pretrained("../checkpoint"' in card.text
    assert card.data.license == ["cc-by-4.0"]
