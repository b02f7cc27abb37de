"""Banks and configs damaged a few thousand times: always a clean error, never a crash, a hang or a wrong answer.

`TINYALIGN_FUZZ_CASES=100000 TINYALIGN_FUZZ_SEED=1 pytest tests/security/test_fuzz.py -s` looks further than CI does.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = os.environ.get("TINYALIGN_FUZZ_CASES", "1200")
KINDS = ("bank", "model", "processor")
SEED = os.environ.get("TINYALIGN_FUZZ_SEED", "0")
FUZZING = str(Path(__file__).with_name("fuzzing.py"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured as Linux does")
def test_damaged_files(victims, tmp_path):
    """In another process, which may crash."""
    folder = shutil.copytree(victims, tmp_path / "victims")
    command = [sys.executable, FUZZING, str(folder), *KINDS, "--count", CASES, "--seed", SEED]
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    environment = {**os.environ, **quiet, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w+") as log:
        code = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=600 + 2 * int(CASES)
        ).returncode
    lines = (tmp_path / "log").read_text().splitlines()
    telling = [line for line in lines if line and not line.startswith(("case ", "Loading weights"))]
    last = [line for line in lines if line.startswith("case ")][-1:]
    assert code == 0, f"ended with {code} after {last}:\n" + "\n".join(telling[-60:])
    reports = [line for line in telling if f", seed {SEED}, " in line]
    print("", *reports, sep="\n")
    assert [line.partition(",")[0] for line in reports] == list(KINDS)
