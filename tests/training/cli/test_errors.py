"""What the user can mend ends with a line, and so does Ctrl-C; a fault of the package keeps its traceback."""

import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from tinyalign_cli.errors import INTERRUPTED, reported_errors


class SafetensorError(Exception):
    """As that of safetensors, which tells a full disk in its text only."""


def test_an_error_of_a_worker_process_is_told_without_its_traceback():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback ...\nValueError: row 3: no image"
    with pytest.raises(SystemExit, match="^tinyalign: row 3: no image$"), reported_errors():
        raise ValueError(text)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("No module named 'ray'"), "tinyalign: No module named 'ray'"),
        (OSError(28, "No space left on device", "bank"), r"tinyalign: .*No space left on device: 'bank'"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "tinyalign: .*No space left"),
        (yaml.YAMLError("while parsing"), "tinyalign: while parsing"),
    ],
)
def test_what_a_user_can_mend_is_told_in_a_line(error, message):
    with pytest.raises(SystemExit, match=message), reported_errors():
        raise error


def test_a_fault_of_the_package_keeps_its_traceback():
    with pytest.raises(KeyError), reported_errors():
        raise KeyError("memory_ids")


@pytest.mark.parametrize(
    ("interrupt", "resumable", "line"),
    [
        (KeyboardInterrupt(), False, "tinyalign: stopped\n"),
        (KeyboardInterrupt(), True, "tinyalign: stopped; the same command goes on from there\n"),
        (KeyboardInterrupt("stopped at step 12; ..."), True, "tinyalign: stopped at step 12; ...\n"),
    ],
)
def test_a_command_that_is_stopped_says_whether_it_can_go_on(interrupt, resumable, line, capsys):
    with pytest.raises(SystemExit) as end, reported_errors(resumable):
        raise interrupt
    assert end.value.code == INTERRUPTED and capsys.readouterr().err == line


def hear_interrupts():
    """Undo, in a new process, what it may have inherited: a shell lets its background jobs ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_in_training(files):
    """As a terminal does it: the workers that read the rows get it, too."""
    command = [sys.executable, "-m", "tinyalign_cli", "train", "stage1.yaml", "--max_steps", "100000"]
    process = subprocess.Popen(
        [*command, "--save_steps", "5", "--dataloader_num_workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=files,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    for line in process.stdout:
        if "loss" in line and list(files.glob("out1/checkpoint-*/trainer_state.json")):
            break
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == INTERRUPTED, "\n".join(errors)
    assert re.fullmatch(
        r"tinyalign: stopped at step \d+; the same command goes on from out1/checkpoint-\d+", errors[-1]
    )
    assert not any("Traceback" in line for line in errors)


SLOW_BUILD = """
import time
from tinyalign_vlm.training.bank import encode
from tinyalign_cli.main import main

encode.PART_ROWS = 4
save_file = encode.save_file

def slowly(path, content):
    save_file(path, content)
    print("a part", flush=True)
    time.sleep(2)

encode.save_file = slowly
main("bank build --model model --dataset chats.json --value_encoder bank --out new".split())
"""


def test_ctrl_c_in_bank_build(files):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=files,
        preexec_fn=hear_interrupts,
    )
    assert process.stdout.readline() == "a part\n"
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == INTERRUPTED
    last = "tinyalign: stopped; 4 rows are done, and the same command goes on with the others"
    assert errors.splitlines()[-1] == last and "Traceback" not in errors
    build = "from tinyalign_cli.main import main; main()"
    arguments = "bank build --model model --dataset chats.json --value_encoder bank --out new".split()
    again = subprocess.run([sys.executable, "-c", build, *arguments], capture_output=True, text=True, cwd=files)
    assert again.stdout.splitlines()[0] == "Encoding 12 rows, 4 of them are done already; --rows N takes fewer."
    assert (again.returncode, again.stderr) == (0, "")
