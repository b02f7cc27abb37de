"""The rules of CONTRIBUTING.md that a program can check: who imports whom, sizes, docstrings, mirrored tests."""

import ast
import configparser
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAVELS = ("modeling_tinyalign", "processing")
PRODUCT = ("modeling_tinyalign", "processing", "training", "hub_cards", "tinyalign_vlm")
FILES = sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}
# A room may import those below it, and itself.
LEVELS = [
    {"cli"},
    {"demo", "inference"},
    {"stages"},
    {"vqa_benchmarks"},
    {"bank"},
    {"evaluation"},
    {"data"},
    {"models", "composition", "hub"},
    {"arguments"},
]
BELOW_ALL = {"modeling_tinyalign", "processing", "hub_cards", "disk", ""}
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
MOST_TRAVELLING_FILES = 18
# They may only go down, 13,500 and 4,400 are the goals; refusing bad inputs once put them up.
MOST_PRODUCT_LINES, MOST_TRAVELLING_LINES = 20_976, 5_350
# Methods and attributes of transformers that its own classes use from outside.
OF_TRANSFORMERS = {"_init_weights", "_name_or_path"}
# Test files about several modules of their folder, or about running them elsewhere.
ABOUT_SEVERAL = {
    "hub_cards/test_docs.py",
    "hub_cards/test_validation.py",
    "modeling_tinyalign/test_adaptive_retrieval.py",
    "modeling_tinyalign/test_captions_as_memory.py",
    "modeling_tinyalign/test_remote_code.py",
    "processing/test_chat_text.py",
    "training/bank/test_docs.py",
    "training/cli/test_train_with_memory.py",
    "training/stages/test_distributed.py",
    "training/stages/test_recipes.py",
    "training/data/test_worker_memory.py",
    "training/stages/test_trackers.py",
    "training/stages/test_trainers_as_usual.py",
    "training/stages/test_trainers_with_memory.py",
}
NO_START = re.compile(r"(What|Whether|Of|As|With|How|That|Whose|Which)\b")
# The third person: a verb with an s and its object. The nouns look like it.
NOUNS = "Captions|Facts|Files|Images|Metrics|Names|Neighbours|Options|Rows|Settings|Texts|Tokens|Weights|Words"
THIRD_PERSON = re.compile(
    rf"(?!(?:{NOUNS})\b)[A-Z][a-z]*[^s\W]s (the|a|an|all|each|what|whether|how|it|them|this|that)\b"
)


def line_count(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


def imported(path: Path, tree: ast.Module) -> list[str]:
    """Return the dotted names of the project's modules that a file imports, from its folder `tinyalign_vlm` on."""
    package = ["tinyalign_vlm", *path.parts[:-1]]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names.append(".".join([*base, *([node.module] if node.module else [])]))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinyalign_vlm"):
            names.append(node.module)
    return names


def room(module: str) -> str:
    """Return the room of a module: a folder of training/, or else the top folder."""
    parts = module.split(".")[1:]
    if parts[:1] == ["training"]:
        return parts[1] if len(parts) > 1 else ""
    return parts[0] if parts else ""


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_imports_go_one_way():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    wrong = []
    for path, tree in TREES.items():
        here = room(".".join(["tinyalign_vlm", *path.with_suffix("").parts]))
        if here not in level:
            continue
        for module in imported(path, tree):
            there = room(module)
            if there != here and there not in BELOW_ALL and level[there] <= level[here]:
                wrong.append(f"{path} imports {module}")
    assert not wrong


@pytest.mark.parametrize("folder", [*TRAVELS, "hub_cards"])
def test_what_stands_alone_imports_nothing_of_ours(folder):
    """`try:` excepted: what travels asks the installed package to build banks and to write cards."""
    wrong = []
    for path, tree in TREES.items():
        if path.parts[0] != folder or path.name == "space_app.py":  # it runs in a Space, beside the package
            continue
        tried = {id(node) for part in ast.walk(tree) if isinstance(part, ast.Try) for node in ast.walk(part)}
        for node in ast.walk(tree):
            outside = isinstance(node, ast.ImportFrom) and (node.level > 1 or "tinyalign" in (node.module or ""))
            if outside and not node.level == 1 and id(node) not in tried:
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong


def test_what_travels_is_small():
    files = [path for path in TREES if path.parts[0] in TRAVELS and path.name != "__init__.py"]
    assert len(files) <= MOST_TRAVELLING_FILES
    assert sum(map(line_count, files)) <= MOST_TRAVELLING_LINES


def test_sizes():
    counts = {path: line_count(path) for path in TREES}
    assert sum(counts.values()) <= MOST_PRODUCT_LINES
    assert {str(path): count for path, count in counts.items() if count > MOST_LINES} == {}
    long = set()
    for path, tree in TREES.items():
        for function in functions(tree):
            if function.end_lineno - function.lineno + 1 > MOST_FUNCTION_LINES:
                long.add(f"{path}:{function.name}")
    assert not long


def test_docstrings_start_with_a_verb_or_a_noun():
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                if NO_START.match(text) or THIRD_PERSON.match(text):
                    wrong.append(f"{path}: {text.splitlines()[0]}")
    assert not wrong


def test_a_line_has_one_condition_at_most():
    crowded = []
    for path, tree in TREES.items():
        lines = Counter(node.lineno for node in ast.walk(tree) if isinstance(node, ast.IfExp))
        crowded += [f"{path}:{line}" for line, count in lines.items() if count > 1]
    assert not crowded


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def test_private_members_stay_in_their_module():
    """`self._name` and `cls._name` are one's own or one's base class's; `other._name` is another module's."""
    defined = defaultdict(set)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined[node.name].add(path)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
                defined[node.attr].add(path)
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or "tinyalign" in (node.module or "")):
                wrong += [f"{path}: {name.name}" for name in node.names if re.match(r"_[a-z]", name.name)]
            elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                if (
                    not is_own(node)
                    and node.attr not in OF_TRANSFORMERS
                    and defined[node.attr]
                    and path not in defined[node.attr]
                ):
                    wrong.append(f"{path}:{node.lineno}: {node.attr}")
    assert not wrong


def test_tests_mirror_the_product():
    """A test file in a folder of the product's is named after a module there."""
    modules = {path.with_name(f"test_{path.name}") for path in TREES if path.parts[0] != "tinyalign_vlm"}
    folders = {path.parent for path in modules}
    tests = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    strangers = {str(path) for path in tests if path.parent in folders and path not in modules}
    assert strangers == ABOUT_SEVERAL


def test_files_that_are_no_python_are_in_the_package():
    config, listed = configparser.ConfigParser(), set()
    config.read(ROOT / "setup.cfg")
    for package, patterns in config["options.package_data"].items():
        folder = ROOT / package.removeprefix("tinyalign_vlm.").replace(".", "/")
        for pattern in patterns.split(","):
            listed |= set(folder.glob(pattern.strip()))
    found = {path for folder in PRODUCT for path in (ROOT / folder).rglob("*.*") if path.is_file()}
    assert {path for path in found if path.suffix not in (".py", ".pyc")} == listed
