"""
Runs transformers' own model and processor tests on TinyAlign: `make test-transformers`.

They come from the source distribution of the installed transformers, as pip's package index has it; it is kept in
`.cache/`. What the tests import that is not in it is stubbed. docs/transformers_tests.md lists the skips and failures;
the run fails where it and that list disagree.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LISTED = ROOT / "docs" / "transformers_tests.md"
# Test files and how many of each must pass.
SUITES = {"model_suite.py": 440, "processor_suite.py": 65}
SHA256 = {
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
    "5.24.0": "906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3",
}
# Imported by the tests, but not in the distribution. What is compiled, exported or generated is not tested here.
STUBS = {
    "transformers_tests/__init__.py": "",
    "transformers_tests/exporters/test_export.py": "class ExportTesterMixin: ...",
    "transformers_tests/generation/test_utils.py": "class GenerationTesterMixin: ...",
    "transformers_tests/utils/test_configuration_utils.py": "config_common_kwargs = {}",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return __file__.replace('.py', '.png')",
}
ORDER = ("passed", "skipped", "failed")


def download(cache: Path) -> Path:
    """The source distribution of the installed transformers. Raises `ValueError` if it is not the one we know."""
    version = metadata.version("transformers")  # importing it here would be too early for tests/isolation.py
    if version not in SHA256:
        raise ValueError(
            f"The tests of transformers {version} are not known, only those of {', '.join(SHA256)}: add the sha256 of "
            f"its source distribution to {Path(__file__).name}, or install constraints.txt."
        )
    path = cache / f"transformers-{version}.tar.gz"
    if not path.exists():
        cache.mkdir(exist_ok=True)
        requirements = cache / "requirements.txt"
        requirements.write_text(f"transformers=={version} --hash=sha256:{SHA256[version]}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "--require-hashes", "-r", requirements, "-d", cache], check=True)
    found = sha256(path.read_bytes()).hexdigest()
    if found != SHA256[version]:
        raise ValueError(f"{path} has sha256 {found}, expected {SHA256[version]}: delete it and run again.")
    return path


def unpack(archive: Path, folder: Path):
    """The distribution's tests as the package `transformers_tests`, and the stubs."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            head, _, name = member.name.partition("/tests/")
            if name and member.isfile() and "/" not in head:
                member.name = f"transformers_tests/{name}"
                tar.extract(member, folder, filter="data")
    for name, text in STUBS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    Image.new("RGB", (40, 30), "red").save(folder / "utils" / "fetch_hub_objects_for_ci.png")


@dataclass(eq=False)
class Recorder:
    """A pytest plugin: the worst outcome of each test and its subtests, and why."""

    outcomes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport):
        test = report.nodeid.rpartition("/")[2]
        if ORDER.index(report.outcome) >= ORDER.index(self.outcomes.get(test, "passed")):
            self.outcomes[test] = report.outcome
            if report.skipped:
                self.reasons[test] = report.longrepr[2].removeprefix("Skipped: ")
            elif report.failed:
                self.reasons[test] = report.longreprtext

    def pytest_collectreport(self, report: pytest.CollectReport):
        if report.failed:
            raise RuntimeError(f"{report.nodeid} cannot be imported: {report.longreprtext}")


def read_list(text: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """The tables of the document: outcome and reason by pattern of test names, and patterns of skip messages."""
    ours, _, others = text.partition("## Not ours")
    rows = re.findall(r"^\| `([^`]+)` +\| (\w+) +\| (.+?) +\|$", ours, re.MULTILINE)
    others = re.findall(r"^\| `([^`]+)`", others, re.MULTILINE)
    return {test: (outcome, reason) for test, outcome, reason in rows}, others


def disagreements(
    outcomes: dict[str, str], reasons: dict[str, str], ours: dict[str, tuple[str, str]], others: list[str]
) -> list[str]:
    """What of a run is not as listed: unlisted skips and failures, and lines that no test needs (any more)."""
    problems, used = [], set()
    for test, outcome in outcomes.items():
        name = test.partition("::")[2]
        line = next((pattern for pattern in ours if fnmatchcase(name, pattern)), None)
        used.add(line)
        if line is not None and ours[line][0] != outcome:
            problems.append(f"{name} is listed as {ours[line][0]}, but {outcome}.")
        elif line is None and outcome == "failed":
            problems.append(f"{name} failed, and is not listed:\n{reasons[test]}")
        elif line is None and outcome == "skipped" and not any(fnmatchcase(reasons[test], other) for other in others):
            problems.append(f"{name} was skipped, and is not listed: {reasons[test]}")
    return problems + [f"{line} is listed, but no such test ran." for line in ours.keys() - used]


def main(arguments: list[str]) -> int:
    """`arguments` go to pytest. Returns the exit status."""
    archive = download(ROOT / ".cache")
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        unpack(archive, Path(folder))
        os.environ["HF_HUB_OFFLINE"] = "1"
        settings = ["addopts=--import-mode=importlib", "verbosity_subtests=0", f"pythonpath={ROOT / 'tests'} {folder}"]
        options = ["-q", "--tb=no", "-rN", "-W", "ignore", "-p", "no:cacheprovider", *(f"-o{s}" for s in settings)]
        pytest.main([*(str(HERE / name) for name in SUITES), *options, *arguments], plugins=[recorder])
    ours, others = read_list(LISTED.read_text())
    problems = disagreements(recorder.outcomes, recorder.reasons, ours, others)
    print(f"\ntransformers {metadata.version('transformers')}")
    for name, minimum in SUITES.items():
        counts = Counter(outcome for test, outcome in recorder.outcomes.items() if test.startswith(name))
        print(f"{name}: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in ORDER))
        if counts["passed"] < minimum:
            problems.append(f"{counts['passed']} tests of {name} passed, expected at least {minimum}")
    print("Of these, ours:")
    for line, (outcome, reason) in ours.items():
        count = sum(fnmatchcase(test.partition("::")[2], line) for test in recorder.outcomes)
        print(f"  {count} {outcome}: {line} ({reason})")
    if problems:
        print("docs/transformers_tests.md and the run disagree:", *problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
