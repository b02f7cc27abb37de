"""Pieces of the app's page that Gradio has no component for: cards of examples, and the view of a bank."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...modeling_tinyalign import MemoryBank
from ...modeling_tinyalign.row_encoder import thumbnail_bytes
from ..bank.view import data_url, page_data, render_page

VIEWED_ROWS = 300
CARD_PIXELS = 96
# A click on a card is an event of its component, with the card's row.
CARD_CLICK = """
element.addEventListener('click', event => {
  const card = event.target.closest('[data-row]');
  if (card) trigger('click', {row: card.dataset.row});
});
"""
CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .6rem }
.cards.small { grid-template-columns: repeat(4, 1fr); gap: .4rem }
.cards button, .cards div { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .4rem;
  background: var(--background-fill-primary); text-align: left; overflow-wrap: anywhere;
  font-size: .85rem; font-weight: 400; display: block; align-self: start }
.cards.small button { padding: .15rem }
.cards button { cursor: pointer } .cards button:hover { border-color: var(--color-accent) }
.cards img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border-radius: 4px }
.cards b { display: block; font-weight: 600 } .cards small { display: block; color: var(--body-text-color-subdued) }
.cards .unused { opacity: .5; border-style: dashed } .cards .yours { border-color: var(--color-accent) }
.view { width: 100%; height: 75vh; border: 0; background: #fff }
"""


@dataclass(frozen=True)
class Card:
    """A picture with a line and notes; `row` is what a click on it sends."""

    row: str
    caption: str
    picture: Image.Image | None
    notes: Sequence[str] = ()
    kind: str = ""


def render_cards(cards: list[Card], hint: str = "", heading: str = "", small: bool = False) -> str:
    """Return cards as HTML. `hint` is what a click does, without one they are none to click on."""
    tag = "button" if hint else "div"
    parts = []
    for card in cards:
        image = ""
        if card.picture:
            image = f'<img src="{data_url(thumbnail_bytes(card.picture, CARD_PIXELS))}" alt="">'
        caption = "" if small else f"<b>{escape(card.caption)}</b>"
        notes = "".join(f"<small>{escape(note)}</small>" for note in card.notes)
        title = escape(hint.format(card.caption) if hint else card.caption)
        row = f'data-row="{escape(card.row)}"' if hint else ""
        parts.append(f'<{tag} {row} class="{card.kind}" title="{title}">{image}{caption}{notes}</{tag}>')
    above = f"<p><b>{escape(heading)}</b></p>" if heading and cards else ""
    return f'{above}<div class="cards{" small" * small}">{"".join(parts)}</div>'


def escape(text: str) -> str:
    """Return text as HTML that is no template either: Gradio reads ${...} and {{...}} in values."""
    text = html.escape(text)
    for letter in "${}`\\":
        text = text.replace(letter, f"&#{ord(letter)};")
    return text


def render_view(bank: MemoryBank) -> str:
    """Return what `tinyalign bank view` writes, as a frame of the page, in which its scripts see nothing of ours."""
    chosen = np.random.default_rng(0).permutation(len(bank))[:VIEWED_ROWS]
    no_keys = np.empty((0, bank.config.key_dim), np.float32)
    data = page_data(bank, chosen, min(5, len(bank)), [], no_keys)
    facts = [["rows", f"{len(bank):,}"], ["in this view", f"{len(chosen):,}"]]
    page = render_page({"name": "of this model", "facts": facts, **data})
    return f'<iframe class="view" sandbox="allow-scripts" title="Bank" srcdoc="{escape(page)}"></iframe>'
