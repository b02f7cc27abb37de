"""The chats of the demo."""

from tinyalign_vlm.training.demo.systems import chats


def texts(messages):
    return [[part["text"] for part in turn["content"]] for turn in messages]


def test_keywords_are_asked_for_before_the_name():
    rows = chats(["wave", "nine"], ["sea, water", ""])
    first, second = (texts(row["messages"]) for row in rows)
    assert first == [[None, "Which words go with it?"], ["sea, water"], ["What is this?"], ["wave"]]
    assert second == [[None, "What is this?"], ["nine"]]


def test_captions_stand_in_the_first_question():
    rows = chats(["wave"], ["sea"], [["tide", "surf"]])
    assert texts(rows[0]["messages"])[0] == [None, "Similar: tide; surf\n", "Which words go with it?"]
    assert texts(rows[0]["messages"])[2] == ["What is this?"]
