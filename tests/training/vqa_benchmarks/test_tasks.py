"""The benchmarks' questions, scores and metrics beside lmms-eval's own, in a process of their own."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_in_a_process_of_its_own():
    """Importing lmms-eval changes a process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    file = Path(__file__).with_name("in_own_process.py")
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:]
