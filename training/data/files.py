"""The files people have, as rows: JSON, Parquet, WebDataset, folders, repositories."""

import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from glob import escape, glob
from gzip import BadGzipFile
from itertools import groupby
from pathlib import Path, PurePosixPath

import datasets

from ..arguments.names import check_name
from ..arguments.stage import StageArguments

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TAR_SUFFIXES = (".tar", ".gz", ".tgz")
SUFFIXES = (".json", ".jsonl", ".parquet", *TAR_SUFFIXES)
STORED_IMAGE = datasets.Image(decode=False)


def open_rows(config: StageArguments) -> datasets.Dataset | datasets.IterableDataset:
    """
    The rows of `config.dataset` as they are stored, images undecoded. Of JSON and WebDataset files the column `json`
    is the row's text: their rows need not have the same fields, nor the same types in them.

    Raises `ValueError` when they cannot be read.
    """
    if not config.dataset:
        raise ValueError("No data set: set `dataset` in the YAML file, or pass --dataset FILE_OR_REPOSITORY.")
    files = sorted(glob(os.path.join(escape(config.dataset), "*.tar"))) or sorted(
        glob(escape(config.dataset) if os.path.exists(config.dataset) else config.dataset)
    )
    suffix = Path(files[0]).suffix if files else ""
    if not files and Path(config.dataset).suffix in SUFFIXES:
        raise ValueError(f"{config.dataset} does not exist, expected a file, a folder or a dataset repository.")
    if files and suffix not in SUFFIXES and not os.path.isdir(files[0]):
        raise ValueError(f"{files[0]} is no data set, expected a file ending in {', '.join(SUFFIXES)}.")
    try:
        if suffix in (".json", ".jsonl"):
            return _from_generator(_read_json, files, {"json": datasets.Value("string")}, config)
        if suffix in TAR_SUFFIXES:
            features = {name: datasets.Value("string") for name in ("id", "json", "txt")}
            features["images"] = datasets.List(STORED_IMAGE)
            return _from_generator(_read_tar, files, features, config)
        if suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=config.streaming)
        else:
            check_name("dataset", config.dataset, "dataset")
            rows = datasets.load_dataset(
                config.dataset,
                config.dataset_config,
                split=config.dataset_split,
                revision=config.dataset_revision,
                streaming=config.streaming,
            )
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{config.dataset} has no rows, expected at least one.") from error
        raise ValueError(
            f"{config.dataset} cannot be read ({error.__cause__ or error}), expected JSON, JSON-lines, Parquet or "
            "WebDataset (.tar) files, a folder, or a dataset repository."
        ) from error
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, STORED_IMAGE)
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            rows = rows.cast_column(name, datasets.List(STORED_IMAGE))
    return rows


def _from_generator(read, files: list[str], features: dict, config: StageArguments):
    arguments = {"files": files, "versions": [(stat.st_mtime_ns, stat.st_size) for stat in map(os.stat, files)]}
    maker = datasets.IterableDataset if config.streaming else datasets.Dataset
    return maker.from_generator(read, features=datasets.Features(features), gen_kwargs=arguments)


def _read_json(files: list[str], versions: list) -> Iterator[dict]:
    """`versions` are of the files: of changed files no copy of the old ones is taken."""
    for name in files:
        try:
            with open(name, encoding="utf-8-sig") as file:
                first = next((line for line in file if line.strip()), "")
                file.seek(0)
                if first.lstrip().startswith("["):
                    yield from ({"json": json.dumps(row)} for row in json.load(file))
                else:
                    yield from ({"json": line} for line in file if line.strip())
        except ValueError as error:
            raise ValueError(
                f"{name} cannot be read ({error}), expected a list of rows in JSON, or a row a line, in UTF-8."
            ) from error


def _read_tar(files: list[str], versions: list) -> Iterator[dict]:
    """A WebDataset: files whose names are the same up to the first point of the last part are a row."""
    for name in files:
        try:
            with tarfile.open(name) as tar:
                yield from _samples(tar)
                _check_end(tar)
        except (tarfile.TarError, EOFError, BadGzipFile, zlib.error) as error:
            raise ValueError(f"{name} cannot be read ({error}), expected a whole WebDataset (.tar).") from error


def _samples(tar: tarfile.TarFile) -> Iterator[dict]:
    members = (member for member in tar if member.isfile())
    for key, parts in groupby(members, lambda member: str(_stem(member.name))):
        row, images = {"id": key, "json": "{}", "txt": None}, []
        for member in parts:
            suffix = PurePosixPath(member.name).suffix.lower()
            content = tar.extractfile(member).read()
            if suffix in IMAGE_SUFFIXES:
                images.append({"bytes": content, "path": member.name})
            elif suffix in (".json", ".txt"):
                row[suffix[1:]] = content.decode(errors="replace")
        yield {**row, "images": images}


def _check_end(tar: tarfile.TarFile):
    """tarfile takes a damaged header for the end, and gzip looks at its checksum at the end only."""
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a header is damaged or cut")
    while tar.fileobj.read(2**20):
        pass


def _stem(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    return path.with_name(path.name.partition(".")[0])
