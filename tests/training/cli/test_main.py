"""`tinyalign`: its commands and their help, for which nothing heavy is imported, and nothing printed but results."""

import re
import subprocess
import sys

import pytest

from tinyalign_cli import main as cli
from tinyalign_cli.main import main
from tinyalign_vlm.processing.images import MAX_IMAGE_BYTES, MAX_SECONDS
from tinyalign_vlm.training.arguments.files import CONFIGS

WITHOUT_IMPORTS = """
import sys
from tinyalign_cli.main import COMMANDS, main

lines = ["--help", "--version", "bank --help", "bank build --wrong 3", "bank info b --wrong", "push", "train", "ban"]
for line in [*lines, *(f"{name} --help" for name in COMMANDS)]:
    try:
        main(line.split())
    except SystemExit as end:
        assert end.code is not None, line
    else:
        raise AssertionError(f"{line} does not end")
heavy = {"tinyalign_vlm", "torch", "transformers", "datasets", "numpy", "pyarrow", "PIL", "huggingface_hub", "yaml"}
print("imported:", *(heavy & set(sys.modules)))
"""
QUIET = """
from tinyalign_cli.main import main

main(["data", "check", "chats.json"])
main(["bank", "info", "bank"])
main(["bank", "verify", "bank", "--model", "model"])
main(["bank", "view", "bank", "--image", "0.png", "--model", "model"])
source = ["--dataset", "pairs.parquet", "--caption_column", "label", "--value_encoder", "bank"]
main(["bank", "build", "--model", "model", "--out", "new", *source])
"""


def run_python(code: str, folder) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=600)


def test_help_and_wrong_options_import_nothing_heavy(tmp_path):
    done = run_python(WITHOUT_IMPORTS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


def test_no_library_warns_and_no_progress_bar_goes_to_a_file(files):
    done = run_python(QUIET, files)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_says_what_it_does_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and f"tinyalign {name} " in printed
    assert max(map(len, cli.COMMANDS[name].HELP.splitlines())) < 120


def test_an_option_that_there_is_not_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bank", "info", "bank", "--rows", "3"])
    assert end.value.code == 2 and "tinyalign bank info: error: unknown arguments: --rows 3" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and re.fullmatch(r"tinyalign-vlm \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_of_train_teaches_and_names_the_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert str(CONFIGS) in printed and all(path.name in printed for path in CONFIGS.glob("*.yaml"))
    assert "stage1.yaml --learning_rate 5e-4" in printed and "--tune_language_model lora" in printed


def test_help_of_serve_has_the_limits_of_images(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert f"{MAX_SECONDS:g} seconds, {MAX_IMAGE_BYTES >> 20} MiB" in capsys.readouterr().out


def test_home_is_understood_wherever_a_path_stands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/bank", "--out=~/bank", "--prompt=~ 3?", "--prompt", "~", "a=~/b"]
    found = ["/home/me/bank", "--out=/home/me/bank", "--prompt=~ 3?", "--prompt", "~", "a=~/b"]
    assert [cli.expand_home(argument) for argument in given] == found
