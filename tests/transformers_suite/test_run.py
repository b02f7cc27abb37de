"""How transformers' tests are fetched, and how a run is held against the list in docs/transformers_tests.md."""

import pytest
from transformers_suite import run
from transformers_suite.run import LISTED, disagreements, download, read_list

TEXT = """
## Ours

| test | outcome | why |
|---|---|---|
| `*::test_a*` | failed | the tower is frozen |
| `BTest::test_b` | skipped | there is none |

## Not ours

| message | why |
|---|---|
| `test requires *` | no such machine |
"""
OURS, OTHERS = read_list(TEXT)
OUTCOMES = {
    "model.py::ATest::test_a_1": "failed",
    "model.py::BTest::test_a": "failed",
    "model.py::BTest::test_b": "skipped",
    "model.py::BTest::test_c": "passed",
    "model.py::BTest::test_d": "skipped",
}
REASONS = {"model.py::BTest::test_b": "none", "model.py::BTest::test_d": "test requires accelerator"}


def test_list_is_read():
    assert OURS == {"*::test_a*": ("failed", "the tower is frozen"), "BTest::test_b": ("skipped", "there is none")}
    assert OTHERS == ["test requires *"]
    ours, others = read_list(LISTED.read_text())
    assert ours and others and all(outcome in ("failed", "skipped") and reason for outcome, reason in ours.values())


def test_what_is_listed_is_no_problem():
    assert disagreements(OUTCOMES, REASONS, OURS, OTHERS) == []


def test_what_is_not_listed_is():
    def problems(test, outcome, reason="something"):
        return disagreements({**OUTCOMES, test: outcome}, {**REASONS, test: reason}, OURS, OTHERS)

    assert problems("model.py::BTest::test_c", "failed") == ["BTest::test_c failed, and is not listed:\nsomething"]
    assert problems("model.py::BTest::test_d", "skipped") == [
        "BTest::test_d was skipped, and is not listed: something"
    ]
    assert problems("model.py::BTest::test_d", "passed") == []


def test_what_is_listed_in_vain_is():
    outcomes = {**OUTCOMES, "model.py::BTest::test_a": "passed"}
    assert disagreements(outcomes, REASONS, OURS, OTHERS) == ["BTest::test_a is listed as failed, but passed."]
    del outcomes["model.py::BTest::test_a"], outcomes["model.py::BTest::test_b"]
    assert disagreements(outcomes, REASONS, OURS, OTHERS) == ["BTest::test_b is listed, but no such test ran."]


def test_only_known_distributions_are_used(tmp_path, monkeypatch):
    version = next(iter(run.SHA256))
    monkeypatch.setattr(run.metadata, "version", lambda name: version)
    (tmp_path / f"transformers-{version}.tar.gz").write_bytes(b"another")
    with pytest.raises(ValueError, match="has sha256 .*, expected .*: delete it"):
        download(tmp_path)
    monkeypatch.setattr(run.metadata, "version", lambda name: "5.99.0")
    with pytest.raises(ValueError, match="tests of transformers 5.99.0 are not known"):
        download(tmp_path)
