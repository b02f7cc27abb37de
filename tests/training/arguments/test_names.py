"""Names that are nowhere are told in one line, at once."""

import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from isolation import set_hf_home

from tinyalign_cli.main import main
from tinyalign_vlm.training.arguments.names import check_name

COMMANDS = [
    ("train stage1.yaml --model {}", "model"),
    ("train stage1.yaml --memory_bank {}", "memory_bank"),
    ("train stage1.yaml --dataset {}", "dataset"),
    ("train baseline.yaml --vision_model {}", "vision_model"),
    ("train baseline.yaml --language_model {}", "language_model"),
    ("data check {}", "dataset"),
    ("bank info {}", "bank"),
    ("bank verify {}", "bank"),
    ("bank view {}", "bank"),
    ("bank verify bank --model {}", "model"),
    ("bank merge bank {} --out all", "banks"),
    ("bank remove {} --out less --image 0.png", "bank"),
    ("bank add {} --model model --dataset chats.json --out more", "bank"),
    ("bank build --model {} --dataset chats.json --out new", "model"),
    ("bank build --model model --dataset {} --out new", "dataset"),
    ("bank build --model model --dataset chats.json --like {} --out new", "like"),
    ("serve {}", "model"),
]


@pytest.fixture
def no_hub(files, monkeypatch):
    """A machine without a network: nothing listens at that address."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(files / "home" / "hub"))
    set_hf_home(monkeypatch, files / "home")
    return files


@pytest.mark.parametrize("name", ["nowhere", "out/stage9", "../nowhere", "/nowhere/at all", "a/b/c"])
@pytest.mark.parametrize(("command", "setting"), [COMMANDS[index] for index in (0, 1, 2, 6)])
def test_a_name_that_is_nowhere(name, command, setting, no_hub):
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main([part.replace("{}", name) for part in command.split()])
    assert time.monotonic() - began < 10
    assert str(end.value).startswith(f"tinyalign: {setting} is '{name}': there is no /")
    assert len(str(end.value).splitlines()) == 1 and ("OWNER/NAME" in str(end.value)) != ("Check" in str(end.value))


@pytest.mark.parametrize(("command", "setting"), COMMANDS)
def test_every_command_says_so(command, setting, no_hub):
    with pytest.raises(SystemExit, match=rf"^tinyalign: {setting} is 'no/where': there is no /.*, and the Hub"):
        main([part.replace("{}", "no/where") for part in command.split()])
    assert not any((no_hub / folder).exists() for folder in ("new", "more", "less", "all", ".new.build"))


def test_a_hub_that_has_no_such_repository(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for repo_type in ("model", "dataset"):
        with pytest.raises(OSError, match=f"has no {repo_type} repository of that name, or it is private"):
            check_name("model", "me/nothing", repo_type)


def test_what_is_there_or_in_the_cache_is_not_told(no_hub):
    check_name("model", "model")
    check_name("model", no_hub / "chats.json")
    Path(constants.HF_HUB_CACHE, "datasets--me--bank").mkdir(parents=True)
    check_name("memory_bank", "me/bank", "dataset")
    with pytest.raises(OSError, match="cannot be reached"):
        check_name("model", "me/bank")
