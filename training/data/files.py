"""The files people have, as rows: JSON, CSV, Parquet, Arrow, WebDataset, folders, repositories."""

import hashlib
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from glob import escape, glob, has_magic
from gzip import BadGzipFile
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import datasets
import fsspec
from datasets.data_files import SPLIT_KEYWORDS
from huggingface_hub import HfApi, snapshot_download

from ...modeling_tinyalign.bank_arrays import cache_root
from ...modeling_tinyalign.files import scratch_folder
from ...modeling_tinyalign.row_encoder import readable
from ..arguments.names import check_name
from ..arguments.stage import StageArguments
from .text_rows import csv_rows, json_rows

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".avif", ".jp2")
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
ARROW_SUFFIXES = (".parquet", ".arrow")
TAR_SUFFIXES = (".tar", ".tgz")
SUFFIXES = (*TEXT_SUFFIXES, *ARROW_SUFFIXES, *TAR_SUFFIXES)
PACKED_SUFFIXES = (".gz", ".bz2", ".xz")
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "config.json")
LEFTOVERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini"}
STORED_IMAGE = datasets.Image(decode=False)
TEXT = datasets.Value("string")
Rows = datasets.Dataset | datasets.IterableDataset
FOLDER = "__folder__"  # the column with the folder of a row's file


class SourceError(ValueError):
    """The rows that are asked for are not there; the message says what is."""


def open_rows(config: StageArguments) -> Rows:
    """Return the rows of `config.dataset` as they are stored, images undecoded and classes by their names.

    Of text files and WebDatasets the column `json` is the row's text: rows need not have the same fields or types.

    Raises `ValueError` when they cannot be read.
    """
    if not config.dataset:
        raise ValueError("No data set: set `dataset` in the YAML file, or pass --dataset FILE_OR_REPOSITORY.")
    try:
        parts = [_open_part(config, part.strip()) for part in config.dataset_split.split("+")]
        rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, ValueError) as error:
        cause = error if isinstance(error, SourceError) else error.__cause__ or error
        if isinstance(cause, SourceError):
            raise SourceError(str(cause)) from error
        if "corresponds to no data" in str(error):
            raise SourceError(f"{config.dataset} has no rows, expected at least one.") from error
        raise SourceError(
            f"{config.dataset} cannot be read ({readable(str(cause))}), expected JSON, CSV, Parquet or WebDataset "
            "(.tar) files, a folder, or a dataset repository."
        ) from error
    return with_class_names(undecoded(rows))


def undecoded(rows: Rows) -> Rows:
    """Return the rows in plain Python, with images as they are stored."""
    rows = rows.with_format(None)
    for name, feature in rows.features.items():
        stored = _undecoded(feature)
        if stored != feature:
            rows = rows.cast_column(name, stored)
    return rows


def _undecoded(feature: Any) -> Any:
    """Return a feature with images as they are stored, in lists and dictionaries, too."""
    if isinstance(feature, datasets.Image):
        return STORED_IMAGE
    if isinstance(feature, dict):
        return {name: _undecoded(field) for name, field in feature.items()}
    item = item_of(feature)
    return feature if item is feature else replace(feature, feature=_undecoded(item))


def item_of(feature: Any) -> Any:
    """Return the feature of a list's items, and any other feature as it is."""
    return feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature


def _open_part(config: StageArguments, part: str) -> Rows:
    """Return the rows of a split, or of a part of it: "train[:100]"."""
    split, numbers = re.fullmatch(r"([^[]*)(.*)", part).groups()
    if not numbers:
        return _open_split(config, split)
    streamed = re.fullmatch(r"\[(\d*):(\d*)\]", numbers)
    if config.streaming and streamed is None:
        raise SourceError(
            f"dataset_split is {part!r}, but a stream is not counted: expected numbers of rows from its start, as in "
            f"{split}[100:200], or no streaming."
        )
    rows = _open_split(config, split)
    if config.streaming:
        workers = max(config.dataloader_num_workers, config.world_size)
        if rows.num_shards > 1 and workers > 1:
            raise SourceError(
                f"dataset_split is {part!r}, of a stream of {rows.num_shards} files that {workers} workers or "
                "processes share: each would count the rows of its own files, and train on those that are left out. "
                "Set dataloader_num_workers to 0 or 1, in one process, or streaming: false."
            )
        start, end = int(streamed[1] or 0), streamed[2]
        return rows.skip(start).take(max(int(end) - start, 0)) if end else rows.skip(start)
    try:
        (chosen,) = datasets.ReadInstruction.from_spec(part).to_absolute({split: len(rows)})
    except (ValueError, AssertionError) as error:
        expected = f"a part of {len(rows)} rows, as in {split}[:100] or {split}[:10%]"
        raise SourceError(f"dataset_split is {part!r}, expected {expected} ({readable(str(error))}).") from error
    return rows.select(range(chosen.from_, chosen.to))


def _open_split(config: StageArguments, split: str) -> Rows:
    name = unpacked(config.dataset)
    if any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
        rows = datasets.load_from_disk(name)
        if isinstance(rows, datasets.DatasetDict):
            if split not in rows:
                raise _no_split(config, split, rows)
            rows = rows[split]
        return rows.to_iterable_dataset() if config.streaming else rows
    files = find_files(config, name, split)
    kind = kind_of(files[0]) if files else None
    if kind in TEXT_SUFFIXES:
        return _from_generator(_read_text, files, {"json": TEXT, FOLDER: TEXT}, config)
    if kind in TAR_SUFFIXES:
        features = {"id": TEXT, "json": TEXT, "txt": TEXT, "images": datasets.List(STORED_IMAGE)}
        return _from_generator(_read_tar, files, features, config)
    if files and is_image(files[0]):
        classes = len({os.path.dirname(file) for file in files}) > 1
        return _from_generator(partial(_read_images, classes), files, {"image": STORED_IMAGE, "label": TEXT}, config)
    source = {"path": name, "name": config.dataset_config, "revision": config.dataset_revision}
    if files:
        source = {"path": kind[1:], "data_files": {split: [escape(name) for name in files]}}
    if kind == ".parquet":
        source["batch_size"] = 100  # by default the number of rows of a file's first group, which may be none
    return datasets.load_dataset(**source, split=split, streaming=config.streaming)


def unpacked(name: str) -> str:
    """Return the folder of what is in a zip file, or in the only one of a folder; any other name as it is."""
    only = name
    if os.path.isdir(name):
        names = [entry for entry in os.listdir(name) if not is_leftover(entry)]
        only = os.path.join(name, names[0]) if len(names) == 1 else ""
    if not only.lower().endswith(".zip") or not os.path.isfile(only):
        return name
    stat = os.stat(only)
    # `datasets.DownloadManager.extract` would take a changed file of the same name for the old one
    version = f"{os.path.abspath(only)} {stat.st_size} {stat.st_mtime_ns}"
    folder = cache_root() / "zip" / hashlib.sha256(version.encode()).hexdigest()[:32]
    if not folder.exists():
        try:
            with scratch_folder(folder.parent, f".{folder.name}-") as fresh, zipfile.ZipFile(only) as archive:
                archive.extractall(fresh)
                if not folder.exists():  # another process may have been faster
                    fresh.rename(folder)
        except Exception as error:  # zipfile's own, and those of its codecs: zlib.error, LZMAError, EOFError, ...
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            raise SourceError(f"{only} cannot be read ({error}), expected a whole .zip without a password.") from error
    return str(folder)


def find_files(config: StageArguments, name: str, split: str) -> list[str]:
    """Return the paths of the files that have the rows of a split, images where folders have nothing else, or in a
    repository URLs but of text files; none where `datasets` finds them: others that a repository's card names.

    Raises `ValueError` if there is no such file, or none of the split.
    """
    if os.path.isdir(name):
        found = [file for file in glob("**/*", root_dir=name, recursive=True) if not is_leftover(file)]
        found = [file for file in found if is_image(file) or os.path.isfile(os.path.join(name, file))]
        names = _data_files(found, config, split) or _images_of_split(found, config, split)
        if not names:
            raise SourceError(f"{name} has no images, rows or .zip in it, expected {', '.join(SUFFIXES)}.")
        return [os.path.join(name, file) for file in names]
    files = [name] if os.path.exists(name) else glob(name, recursive=True)
    if not files and kind_of(name) is None and not has_magic(name):
        return _files_of_repository(config, split)
    if not files:
        raise SourceError(f"{name} does not exist, expected a file, a folder or a dataset repository.")
    files = sorted(file for file in files if os.path.isfile(file)) or files
    chosen = [file for file in files if kind_of(file)]
    images = [file for file in files if is_image(file)]
    if not chosen and not images:
        raise SourceError(f"{files[0]} is no data set, expected a file ending in {', '.join(SUFFIXES)}.")
    return _of_one_kind(chosen, config) if chosen else images


def is_image(name: str) -> bool:
    """Tell files of images by the ends of their names."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _images_of_split(names: list[str], config: StageArguments, split: str) -> list[str]:
    """Return a folder's images. Folders in it are classes, also one called test, unless all are called as splits."""
    images = sorted(filter(is_image, names))
    splits = {name: _split_of(name.rpartition("/")[0].partition("/")[0]) for name in images}
    if not images or not all(splits.values()):
        return images
    chosen = [name for name in images if splits[name] in (split, _split_of(split))]
    if not chosen:
        raise _no_split(config, split, set(splits.values()))
    return chosen


def _files_of_repository(config: StageArguments, split: str) -> list[str]:
    check_name("dataset", config.dataset, "dataset")
    try:
        info = HfApi().dataset_info(config.dataset, revision=config.dataset_revision)
    except Exception:  # of an HTTP library that changes from version to version
        return []  # `datasets` has the rows in its cache, or says what is wrong
    start = f"hf://datasets/{info.id}@{info.sha}/"
    if config.dataset_config is not None or (info.card_data or {}).get("configs"):  # the card says which files
        builder = datasets.load_dataset_builder(info.id, name=config.dataset_config, revision=info.sha)
        named = list(map(str, (builder.config.data_files or {}).get(split, [])))
        said = {key for entry in (info.card_data or {}).get("configs") or [] for key in entry}
        plain = said <= {"config_name", "data_files", "default"} and not builder.info.features
        lists = config.streaming and all(kind_of(name) == ".json" for name in named)  # `datasets` does not stream them
        if not all(name.startswith(start) and kind_of(name) in TEXT_SUFFIXES for name in named) or not plain | lists:
            return []
        names = [name.removeprefix(start) for name in named]
    else:
        names = _data_files([file.rfilename for file in info.siblings], config, split)
    if not names or kind_of(names[0]) not in TEXT_SUFFIXES:
        return [start + name for name in names]
    suffixes = IMAGE_SUFFIXES if config.image_folder is None else ()
    patterns = [*map(escape, names), *(f"*{end}" for suffix in suffixes for end in (suffix, suffix.upper()))]
    folder = snapshot_download(info.id, repo_type="dataset", revision=info.sha, allow_patterns=patterns)
    return [os.path.join(folder, name) for name in names]


def _data_files(names: list[str], config: StageArguments, split: str) -> list[str]:
    """Return the files of a folder that have the rows of the split: those that are in the fewest folders."""
    found = [name for name in names if kind_of(name) and PurePosixPath(name).name not in NO_ROWS]
    found = [name for name in found if not is_leftover(name)]
    least = min((name.count("/") for name in found), default=0)
    found = sorted(name for name in found if name.count("/") == least)
    splits = {name: _split_of(name) for name in found}
    if any(splits.values()):
        found = [name for name in found if splits[name] in (split, _split_of(split))]
        if not found:
            raise _no_split(config, split, set(splits.values()) - {None})
    return _of_one_kind(found, config)


def _of_one_kind(files: list[str], config: StageArguments) -> list[str]:
    """Return the tars, beside which img2dataset writes Parquet and JSON, or all files if they are of one kind."""
    for suffixes in (TAR_SUFFIXES, TEXT_SUFFIXES, ARROW_SUFFIXES):
        chosen = [name for name in files if kind_of(name) in suffixes]
        if len(chosen) == len(files) or (chosen and suffixes == TAR_SUFFIXES):
            return chosen
    raise SourceError(
        f"{config.dataset} has files of several kinds, {files[0]} and {files[-1]}: expected one kind, name the files "
        f"with a pattern such as {config.dataset}/*{kind_of(files[0])}."
    )


def kind_of(name: str) -> str | None:
    """Return the ending that says how a file is read, `.json` of `a.json.gz`; None for what has no rows."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _split_of(name: str) -> str | None:
    """Return the split that a file's name or folder has in it, as `datasets` finds it."""
    sharded = re.search(r"(\w[\w.]*)-\d+-of-\d+", name)
    if sharded:
        return sharded[1]
    for part in reversed(PurePosixPath(name).parts):
        words = re.split(r"[-._= 0-9]+", part.lower())
        for split, keywords in SPLIT_KEYWORDS.items():
            if not set(words).isdisjoint(keywords):
                return str(split)
    return None


def _no_split(config: StageArguments, split: str, splits: Iterable[str]) -> SourceError:
    found = ", ".join(sorted(splits))
    return SourceError(f"{config.dataset} has no split {split!r}, found {found}: set dataset_split, or eval_split.")


def with_class_names(rows: Rows) -> Rows:
    """Return the rows with names in place of the numbers of their classes; a number without a name is None."""
    for column, feature in rows.features.items():
        label = item_of(feature)
        if not isinstance(label, datasets.ClassLabel):
            continue
        named = TEXT if label is feature else datasets.List(TEXT)
        name = partial(_name_classes, dict(enumerate(label.names)), column)
        if isinstance(rows, datasets.Dataset):  # `map` would write a copy of the images
            values = [name({column: value})[column] for value in rows[column]]
            rows = rows.remove_columns(column).add_column(column, values, feature=named)
        else:
            rows = rows.map(name, features=datasets.Features({**rows.features, column: named}))
    return rows


def _name_classes(names: dict[int, str], column: str, row: dict) -> dict:
    value = row[column]
    return {column: [names.get(item) for item in value] if isinstance(value, list) else names.get(value)}


def _from_generator(read, files: list[str], features: dict, config: StageArguments):
    # URLs have a commit in them
    versions = [os.path.exists(name) and (os.path.getmtime(name), os.path.getsize(name)) for name in files]
    maker = datasets.IterableDataset if config.streaming else datasets.Dataset
    return maker.from_generator(
        read, features=datasets.Features(features), gen_kwargs={"files": files, "versions": versions}
    )


def _read_images(classes: bool, files: list[str], versions: list) -> Iterator[dict]:
    """The folder that an image lies in is its class, if there are `classes`: not all lie in one."""
    for name in files:
        path = os.path.abspath(name)  # a relative one is looked for in the folder of the data set
        folder = os.path.basename(os.path.dirname(path))
        yield {"image": {"path": path, "bytes": None}, "label": folder if classes else None}


def _read_text(files: list[str], versions: list) -> Iterator[dict]:
    """`versions` are of the files: of changed files no copy of the old ones is taken."""
    for name in files:
        read = csv_rows if kind_of(name) in (".csv", ".tsv") else json_rows
        try:
            with fsspec.open(name, "rt", encoding="utf-8-sig", newline="", compression="infer") as file:
                for row in read(file):
                    yield {"json": row, FOLDER: os.path.dirname(name)}
        except (ValueError, EOFError, BadGzipFile, RecursionError, lzma.LZMAError, zlib.error) as error:
            raise SourceError(
                f"{name} cannot be read ({readable(str(error))}), expected a list of rows in JSON, or a row a line, "
                "in UTF-8."
            ) from error


def _read_tar(files: list[str], versions: list) -> Iterator[dict]:
    """A WebDataset: files whose names are the same up to the first point of the last part are a row."""
    for name in files:
        try:
            with fsspec.open(name, "rb") as file, tarfile.open(fileobj=file) as tar:
                yield from _samples(name, tar)
                _check_end(tar)
        except (tarfile.TarError, EOFError, BadGzipFile, lzma.LZMAError, zlib.error) as error:
            reason = readable(str(error).partition(":")[0])
            raise SourceError(f"{name} cannot be read ({reason}), expected a whole .tar.") from error


def _samples(name: str, tar: tarfile.TarFile) -> Iterator[dict]:
    # an image that is in an archive twice is a link the second time
    members = (member for member in tar if (member.isfile() or member.islnk()) and not is_leftover(member.name))
    for key, parts in groupby(members, lambda member: re.match("(.*/)?[^./]*", str(PurePosixPath(member.name)))[0]):
        row, images = {"id": key, "json": "{}", "txt": None}, []
        for member in parts:
            suffix = PurePosixPath(member.name).suffix.lower()
            if kind_of(member.name) not in (None, ".json"):
                raise SourceError(
                    f"{name} has {member.name} in it, a file of rows and no part of a WebDataset: unpack the tar, and "
                    "name its folder."
                )
            content = tar.extractfile(member).read()
            if suffix in IMAGE_SUFFIXES:
                images.append({"bytes": content, "path": None})  # a path would be taken for a file of this folder
            elif suffix in (".json", ".txt"):
                row[suffix[1:]] = content.decode(errors="replace")
        if images or row["txt"] is not None or row["json"] != "{}":
            yield {**row, "images": images}


def is_leftover(name: str) -> bool:
    """Return True for what operating systems and tools leave behind; `name` is the path in a data set's folder."""
    parts = PurePosixPath(name).parts
    return any(part.lower() in LEFTOVERS or part.startswith(".") and part != ".." for part in parts)


def _check_end(tar: tarfile.TarFile):
    """tarfile takes a damaged header for the end, and gzip looks at its checksum at the end only."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a header is damaged or cut")
    while tar.fileobj.read(2**20):
        pass
