"""Problems of a data set, found before the first step of a run, or by `tinyalign data check`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from transformers import ProcessorMixin
from transformers.utils import logging

from ...modeling_tinyalign.bank_arrays import cache_root
from ..arguments.alignment import AlignmentConfig
from ..arguments.files import parse_settings, read_config
from ..arguments.stage import StageArguments
from ..disk import keeping, save_file
from ..models import context_length, load_model, read_bank
from .files import STORED_IMAGE, open_rows
from .rows import FEATURES, RowReader

logger = logging.get_logger(__name__)
BAD_ROWS_NAME = "bad_rows.json"


@dataclass
class DataCheck:
    """Number of `rows` in a data set, and its bad rows: what is wrong with each, and its kind, by number."""

    rows: int
    problems: dict[int, str]
    kinds: dict[int, str]

    def __str__(self) -> str:
        """`12 rows: 10 good, 2 bad (1 missing image, 1 over-long)`"""
        good = f"{self.rows} rows: {self.rows - len(self.problems)} good"
        if not self.problems:
            return good
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(self.kinds.values()).most_common())
        return f"{good}, {len(self.problems)} bad ({kinds})"

    def lines(self) -> Iterator[str]:
        """`row 3: missing image: a.png is no file ...`, the first row is 0."""
        return (f"row {number}: {problem}" for number, problem in self.problems.items())


def check_rows(config: StageArguments, processor: ProcessorMixin | None = None) -> tuple[datasets.Dataset, DataCheck]:
    """
    Reads all rows of `config.dataset` -> the good ones, with `messages` and `images` or `image`, and what was found.

    Args:
        processor: Of the model to train; without it, lengths are not checked.

    Raises:
        ValueError: The data cannot be read, or has no rows.
    """
    raw = open_rows(config)
    if len(raw) == 0:
        raise ValueError(f"{config.dataset} has no rows, expected at least one.")
    reader = row_reader(config, processor)
    column = _column_with_images(raw, config)
    features = {**FEATURES} if column is not None else {**FEATURES, "images": datasets.List(datasets.Value("string"))}
    checked = raw.map(
        partial(_without_images, reader) if column is not None else reader,
        remove_columns=raw.column_names,
        features=datasets.Features(features),
        num_proc=config.num_proc,
        # images are files that may have been added since; the other processes take what the first has just found
        load_from_cache_file=column is not None or not PartialState().is_main_process,
        desc="Checking rows",
    )
    found = {number: problem for number, problem in enumerate(checked["problem"]) if problem is not None}
    kinds = {number: kind for number, kind in enumerate(checked["kind"]) if kind is not None}
    rows = checked.remove_columns(["kind", "problem"]).add_column("row", list(range(len(checked))))
    if column is not None:
        name = "images" if isinstance(raw.features[column], datasets.List) else "image"
        images = raw.select_columns([column])
        images = images if column == name else images.rename_column(column, name)
        rows = datasets.concatenate_datasets([images, rows], axis=1)
    if found:
        rows = rows.select([number for number in range(len(rows)) if number not in found])
    return rows, DataCheck(len(raw), found, kinds)


def training_data(
    config: StageArguments, processor: ProcessorMixin, name_images: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """
    The rows to train on. Bad ones are skipped, counted and written to `bad_rows.json` in `config.output_dir`; streamed
    ones are checked as they come.

    Args:
        name_images: Add the `source_ids` of the images to streamed rows, for a model that retrieves.

    Raises:
        ValueError: As [`check_rows`]; or `config.strict` and a row is bad, or none is good.
    """
    if config.streaming:
        rows = _stream(config, row_reader(config, processor, name_images))
        if next(iter(rows), None) is None:
            raise ValueError(f"{config.dataset} has no good row: none is left to train on.")
        return rows
    rows, check = check_rows(config, processor)
    if not check.problems:
        return rows
    message = "\n".join([f"{config.dataset} has {check}", *(f"  {line}" for line in islice(check.lines(), 10))])
    if len(check.problems) > 10:
        message += f"\n  ... `tinyalign data check` lists all {len(check.problems)}."
    if len(rows) == 0:
        raise ValueError(f"{message}\nNone is left to train on.")
    if config.strict:
        raise ValueError(f"{message}\nRepair or remove them, or train without --strict, which skips them.")
    if PartialState().is_main_process:
        path = Path(config.output_dir, BAD_ROWS_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(path, f"{json.dumps(check.problems, indent=1)}\n".encode())
        logger.warning(f"{message}\nThey are skipped; {path} names them.")
    return rows


def row_reader(config: StageArguments, processor: ProcessorMixin | None, name_images: bool = False) -> RowReader:
    """The reader of a config's rows."""
    path = Path(config.dataset)
    folder = config.image_folder or (path if path.is_dir() else path.parent)
    return RowReader(
        str(folder),
        config.image_column,
        config.messages_column,
        config.answer_column,
        config.prompt,
        processor,
        config.max_length,
        config.truncation,
        name_images,
    )


def _column_with_images(raw: datasets.Dataset, config: StageArguments) -> str | None:
    """The column that holds the images themselves; None where there are paths."""
    names = ("images", "image", "jpg", "jpeg", "png", "webp") if config.image_column is None else [config.image_column]
    for name in names:
        feature = raw.features.get(name)
        stored = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(stored, (datasets.Image, dict)) or stored == datasets.Value("binary"):
            return name
    return None


def _without_images(reader: RowReader, row: dict) -> dict:
    """They stay where they are: no second copy of a data set's images is written."""
    return {name: value for name, value in reader(row).items() if name != "images"}


def _stream(config: StageArguments, reader: RowReader) -> datasets.IterableDataset:
    raw = open_rows(config)
    features = {**FEATURES, "images": datasets.List(STORED_IMAGE), "row": datasets.Value("int64")}
    if reader.name_images:
        features["source_ids"] = datasets.List(datasets.Value("string"))
    rows = raw.map(
        partial(_numbered, reader),
        with_indices=True,
        remove_columns=list(raw.features),
        features=datasets.Features(features),
    )
    rows = rows.filter(_Keep(config), with_indices=True)
    return rows.remove_columns(["kind", "problem"])


def _numbered(reader: RowReader, row: dict, number: int) -> dict:
    return {**reader(row), "row": number}


class _Keep:
    """Return True for a good streamed row; print the bad ones, and how many all workers have skipped."""

    def __init__(self, config: StageArguments):
        self.dataset, self.strict = config.dataset, config.strict
        self.skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, row: dict, number: int) -> bool:
        if row["problem"] is None:
            return True
        message = f"row {number} of {self.dataset}: {row['problem']}"
        if self.strict:
            raise ValueError(f"{message}. Repair or remove it, or train without --strict, which skips it.")
        self.skipped += 1
        logger.warning(f"Skipped {message} ({int(self.skipped)} skipped so far)")
        return False


def check_data(names: Sequence[str], fields: list[str]) -> DataCheck:
    """
    Return the problems of a data set, named itself or by YAML files. The length of rows is checked if there is a
    model. A data set that would be streamed is read as others are.

    Raises `ValueError` or `OSError` when the files, the model or the data cannot be read.
    """
    if all(Path(name).suffix in (".yaml", ".yml") for name in names):
        config = read_config(names, fields)
    elif len(names) == 1:
        config = parse_settings(AlignmentConfig, {"dataset": names[0]}, fields, "tinyalign data check")
    else:
        raise ValueError(f"Found {', '.join(names)}, expected one data set, or YAML files.")
    config.streaming, processor = False, None
    if config.model is not None or config.language_model is not None:
        model, processor = load_model(config, read_bank(config))
        config.max_length = config.max_length or context_length(model)
    elif config.max_length is not None:
        raise ValueError(
            f"max_length is {config.max_length}, but no model says what a token is: add --model, or "
            "--vision_model and --language_model."
        )
    with keeping(cache_root(), "what was read"):
        return check_rows(config, processor)[1]
