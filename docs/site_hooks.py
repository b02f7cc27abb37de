"""Additions of `make docs` to the pages of this folder: the help of all commands, and the files that pages link to."""

import ast
import configparser
import os
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tinyalign_cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = ROOT / ".cache" / "site_packages"
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")
# A field in transformers' style, of which the reference makes a list: "    name (`type`, *optional*): ...".
FIELD = re.compile(r"^(    )([a-z_, ]+)( \(`.*\):)", re.M)
# A class in transformers' style: [`~transformers.Trainer`].
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\()")
# Where the site has what lies outside docs/.
OUTSIDE = "repository"
PAGES = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".txt": "text"}


def on_startup(**_):
    """Make the folder that the reference is read from: mkdocstrings leaves out paths that are not there yet."""
    SITE_PACKAGES.mkdir(parents=True, exist_ok=True)


def on_config(config: MkDocsConfig):
    """Lay out the packages by their names, as an installation does, for the reference to be read from."""
    top = SITE_PACKAGES
    shutil.rmtree(top, ignore_errors=True)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line in setup["options"]["package_dir"].strip().splitlines():
        name, _, folder = line.partition(" = ")
        target = top / name.replace(".", "/")
        target.mkdir(parents=True)
        for file in (ROOT / folder).glob("*.py"):
            (target / file.name).write_text(readable(file.read_text(encoding="utf-8")), encoding="utf-8")


def readable(source: str) -> str:
    """Return a module with its settings and docstrings in the form that the reference reads: defaults, help, lists."""
    lines = source.splitlines()
    fields = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign)]
    for field in sorted(fields, key=lambda field: -field.lineno):
        if isinstance(field.value, ast.Call) and ast.unparse(field.value.func) == "setting":
            default, text = map(ast.unparse, field.value.args[:2])
            name = f"    {field.target.id}: {ast.unparse(field.annotation)} = {default}"
            lines[field.lineno - 1 : field.end_lineno] = [name, f"    {text}"]
    return REFERENCE.sub(r"`\1`", FIELD.sub(r"\1- **\2**\3", "\n".join(lines)))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the commands, and a page for each file outside docs/ that a page links to."""
    files.append(File.generated(config, "commands.md", content=commands_page()))
    waiting = [ROOT / name for name in PAGES]
    for file in files.documentation_pages():
        waiting += targets(file.content_string, source_path(file.src_uri))
    while waiting:
        path = waiting.pop()
        if path.is_relative_to(ROOT / "docs") or files.get_file_from_path(site_path(path)) or not path.exists():
            continue
        text = page_of(path)
        files.append(File.generated(config, site_path(path), content=text))
        waiting += targets(text, source_path(site_path(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to where the site has their files."""
    here = source_path(page.file.src_uri)

    def moved(match: re.Match) -> str:
        target = site_path(Path(os.path.normpath(here.parent / match[0])))
        return os.path.relpath(target, PurePosixPath(page.file.src_uri).parent)

    return LINK.sub(moved, markdown)


def commands_page() -> str:
    """Return the help of all commands."""
    os.environ["COLUMNS"] = "100"
    parts = ["# Commands\n\nEach of them prints this with `--help`."]
    for name in COMMANDS:
        printed = StringIO()
        try:
            with redirect_stdout(printed):
                main([*name.split(), "--help"])
        except SystemExit:
            text = printed.getvalue().replace(f"{ROOT}/", "")
            parts.append(f"## tinyalign {name}\n\n````text\n{text}````")
    return "\n\n".join(parts)


def targets(markdown: str, here: Path) -> list[Path]:
    return [Path(os.path.normpath(here.parent / target)) for target in LINK.findall(markdown)]


def site_path(path: Path) -> str:
    """Return the name of a file's page, relative to the site's pages."""
    if path.is_relative_to(ROOT / "docs"):
        first = {ROOT / "docs": "index.md", ROOT / "docs" / "demo": "README.md"}.get(path, "")
        return (path / first).relative_to(ROOT / "docs").as_posix()
    name = f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"
    if path.is_dir():
        return f"{name}/index.md"
    return name if path.suffix == ".md" else f"{name}.md"


def source_path(page: str) -> Path:
    """Return where a page of the site lies in the repository; of a file's page, a name beside that file."""
    if page.startswith(f"{OUTSIDE}/"):
        return ROOT / page.removeprefix(f"{OUTSIDE}/")
    return ROOT / "docs" / page


def page_of(path: Path) -> str:
    """Return a file or folder of the repository as a page; only documents are searched."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if (path / "README.md").is_file():
        return (path / "README.md").read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        rows = [f"| `{file.name}` | {subject(file)} |" for file in sorted(path.iterdir()) if file.name[0] not in "._"]
        content = "\n".join(["| | |", "|---|---|", *rows])
    else:
        content = f"`````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}`````"
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n{content}\n"


def subject(file: Path) -> str:
    """Return the first line of a module's docstring."""
    if file.suffix != ".py":
        return ""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
