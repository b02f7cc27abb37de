"""Cards pass huggingface_hub's own validation, which asks the Hub; here it is a fake one with the documented rules."""

import dataclasses
from types import SimpleNamespace

import pytest
from card_rules import card_errors
from fake_hub import FakeHub
from huggingface_hub import DatasetCard, ModelCard, SpaceCard, constants, metadata_eval_result, repocard

from tinyalign_vlm.hub_cards.cards import bank_card, model_card, write_space


@pytest.fixture(scope="module")
def hub():
    with FakeHub(card_errors) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        session = repocard.get_session()

        def post(url, **kwargs):  # the oldest client asks huggingface.co, wherever the Hub is
            return session.post(url.replace("https://huggingface.co", hub.url), **kwargs)

        patch.setattr(repocard, "get_session", lambda: SimpleNamespace(post=post))
        yield hub


def test_cards_are_valid(hub, model_facts, bank_facts, tmp_path):
    before, space = len(hub.requests), write_space(tmp_path, "org/demo", model_facts, "0123")
    for card in (model_card(model_facts), bank_card(bank_facts), space):
        card.validate()
    assert hub.requests[before:] == ["POST /api/validate-yaml"] * 3


@pytest.mark.parametrize("change", [{"license": "Apache License"}, {"language": ["English"]}])
def test_the_hub_names_what_is_wrong(hub, model_facts, bank_facts, change):
    with pytest.raises(ValueError, match=f'"{next(iter(change))}"'):
        model_card(dataclasses.replace(model_facts, **change)).validate()
    with pytest.raises(ValueError, match='"license"'):
        bank_card(dataclasses.replace(bank_facts, license=["mit", "Apache License"])).validate()


def test_metadata_survive_the_client(model_facts, bank_facts, tmp_path):
    """What the Hub's client reads is what was written, and what it writes itself is the same."""
    for kind, card in (
        (ModelCard, model_card(model_facts)),
        (DatasetCard, bank_card(bank_facts)),
        (SpaceCard, write_space(tmp_path, "org/demo", model_facts, "0123")),
    ):
        assert str(kind(str(card))) == str(card)
    card = model_card(model_facts)
    result = card.data.eval_results[0]
    made = metadata_eval_result(
        model_pretty_name=card.data.model_name,
        task_pretty_name=result.task_name,
        task_id=result.task_type,
        metrics_pretty_name=result.metric_name,
        metrics_id=result.metric_type,
        metrics_value=result.metric_value,
        dataset_pretty_name=result.dataset_name,
        dataset_id=result.dataset_type,
        dataset_split=result.dataset_split,
    )
    (index,) = card.data.to_dict()["model-index"]
    (expected,) = made["model-index"]
    metric = {**index["results"][0]["metrics"][0], "verified": False}
    assert index["name"] == expected["name"]
    assert {**index["results"][0], "metrics": [metric]} == expected["results"][0]
