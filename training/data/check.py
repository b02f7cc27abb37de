"""Problems of a data set, found before the first step of a run, or by `tinyalign data check`."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from transformers import ProcessorMixin
from transformers.utils import logging

from ...modeling_tinyalign.bank_arrays import cache_root
from ..arguments.alignment import AlignmentConfig
from ..arguments.files import NO_OUTPUT_DIR, parse_settings, read_config
from ..arguments.stage import StageArguments
from ..disk import full_disk_advice, save_file
from ..models import context_length, load_model
from .files import Rows, item_of, open_rows, unpacked
from .rows import FEATURES, IMAGE_COLUMNS, RowReader

logger = logging.get_logger(__name__)
BYTES = [datasets.Value(name) for name in ("binary", "large_binary", "binary_view")]
BAD_ROWS_NAME = "bad_rows.json"


@dataclass
class DataCheck:
    """Number of `rows` in a data set, and what is wrong with each bad one, `kind: text`, by its number."""

    rows: int
    problems: dict[int, str]

    def __str__(self) -> str:
        """`12 rows: 10 good, 2 bad (1 missing image, 1 over-long)`"""
        good = f"{self.rows} rows: {self.rows - len(self.problems)} good"
        if not self.problems:
            return good
        return f"{good}, {len(self.problems)} bad ({count_kinds(self.problems.values())})"

    def lines(self) -> Iterator[str]:
        """Yield `row 3: missing image: a.png is no file ...; and 2 more: 7, 8` for each kind; the first is 0."""
        by_kind = defaultdict(list)
        for number, problem in self.problems.items():
            by_kind[kind_of_problem(problem)].append(number)
        for first, *others in by_kind.values():
            more = f"; and {len(others)} more: {', '.join(map(str, others[:5]))}" if others else ""
            if len(others) > 5:
                more += ", ..."
            yield f"row {first}: {self.problems[first]}{more}"

    def save(self, folder: str) -> Path:
        """Write what is wrong with each bad row to a file in a folder, and return its path."""
        path = Path(folder, BAD_ROWS_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(path, f"{json.dumps(self.problems, indent=1)}\n".encode())
        return path


def kind_of_problem(problem: str) -> str:
    """Return the first words of what is wrong with a row, by which such rows are counted."""
    return problem.partition(":")[0]


def count_kinds(problems: Iterable[str]) -> str:
    """Return `2 broken image, 1 duplicate`, the most frequent first."""
    kinds = Counter(map(kind_of_problem, problems))
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def check_rows(config: StageArguments, processor: ProcessorMixin | None = None) -> tuple[datasets.Dataset, DataCheck]:
    """Read all rows of `config.dataset` -> the good ones, with `messages` and `images` or `image`, and what was found.

    Without the `processor` of a model, lengths are not checked. Raises `ValueError` if no rows can be read.
    """
    raw = open_rows(config)
    if len(raw) == 0:
        raise ValueError(f"{config.dataset} has no rows, expected at least one.")
    reader, column = row_reader(config, processor), _column_with_images(raw, config)
    checked = raw.map(
        reader if column is None else partial(_without_images, reader, column),
        with_indices=True,
        remove_columns=raw.column_names,
        features=FEATURES.copy(),
        num_proc=config.num_proc,
        # files may have been added since, unless images are in the data; other processes take what the first has found
        load_from_cache_file=column is not None or not PartialState().is_main_process,
        desc="Checking rows",
    )
    found = {number: problem for number, problem in enumerate(checked["problem"]) if problem is not None}
    rows = checked.remove_columns("problem")
    if column is None and not found and pc.sum(pc.list_value_length(checked.data.column("images"))).as_py() == 0:
        logger.warning(
            f"No row of {config.dataset} has an image; the columns are {raw.column_names}. If one of them has images, "
            "set image_column."
        )
    if column is not None:
        feature = raw.features[column]
        name = "image" if item_of(feature) is feature else "images"
        images = raw.select_columns([column]).rename_columns({column: name})
        rows = datasets.concatenate_datasets([images, rows.remove_columns("images")], axis=1)
    if found:
        rows = rows.select([number for number in range(len(rows)) if number not in found])
    return rows, DataCheck(len(raw), found)


def training_data(config: StageArguments, processor: ProcessorMixin, name_images: bool = False) -> Rows:
    """The rows to train on. Bad ones are skipped, counted and written to `bad_rows.json` in `config.output_dir`;
    streamed ones are checked as they come, and have the `source_ids` of their images with `name_images`.

    Raises `ValueError` as [`check_rows`], and if none is good or, with `config.strict`, one is bad.
    """
    if config.streaming:
        raw, keep = open_rows(config), _SkipBadRows(config)
        features = FEATURES.copy()
        if name_images:
            features["source_ids"] = datasets.List(datasets.Value("string"))
        reader = row_reader(config, processor, name_images)
        counted = raw.num_shards == 1  # of several files, whose order is drawn, each would be counted from 0
        reader = reader if counted else partial(reader, number=None)
        rows = raw.map(reader, with_indices=counted, remove_columns=list(raw.features), features=features)
        rows = rows.filter(keep).remove_columns("problem")
        if next(iter(rows), None) is None:
            raise ValueError(f"{config.dataset} has no good row: none is left to train on.")
        keep.skipped.zero_()  # these rows come again
        return rows
    rows, check = check_rows(config, processor)
    if not check.problems:
        return rows
    message = "\n".join([f"{config.dataset} has {check}", *(f"  {line}" for line in check.lines())])
    if len(rows) == 0:
        raise ValueError(f"{message}\nNone is left to train on.")
    if config.strict:
        raise ValueError(f"{message}\nRepair or remove them, or train without --strict, which skips them.")
    if PartialState().is_main_process:
        logger.warning(f"{message}\nThey are skipped; {check.save(config.output_dir)} names them.")
    return rows


def row_reader(config: StageArguments, processor: ProcessorMixin | None, name_images: bool = False) -> RowReader:
    """The reader of a config's rows."""
    path = Path(unpacked(config.dataset))
    folder = str(path if path.is_dir() else path.parent)
    shared = RowReader.__dataclass_fields__.keys() & StageArguments.__dataclass_fields__.keys()
    settings = {name: vars(config)[name] for name in shared}
    return RowReader(folder=folder, processor=processor, name_images=name_images, **settings)


def _column_with_images(raw: datasets.Dataset, config: StageArguments) -> str | None:
    """Return the column that holds the images themselves, None where there are paths or text."""
    names, found = IMAGE_COLUMNS if config.image_column is None else [config.image_column], {}
    for name in names:
        stored = item_of(raw.features.get(name))
        if isinstance(stored, (datasets.Image, dict)) or stored in BYTES:
            found[name] = _stored_places(raw.data.column(name))
    found = {name: places for name, places in found.items() if places}
    return next(iter(found)) if list(found.values()) == [{"bytes"}] else None


def _stored_places(column: pa.ChunkedArray) -> set[str]:
    """Return where the images of a column are, in `bytes` or at a `path`, without reading them."""
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    if not pa.types.is_struct(column.type):
        return {"bytes"} if column.null_count < len(column) else set()
    names = [field.name for field in column.type]
    stored = pc.struct_field(column, "bytes").is_valid() if "bytes" in names else pa.scalar(False)
    places = {"bytes"} if pc.any(stored).as_py() else set()
    others = [pc.struct_field(column, name).is_valid() for name in names if name != "bytes"]
    return places | {"path" for other in others if pc.any(pc.and_not(other, stored)).as_py()}


def _without_images(reader: RowReader, column: str, row: dict, number: int) -> dict:
    """They stay in their column, the only one that is looked at: no second copy of a data set's images is written."""
    row = {name: value for name, value in row.items() if name == column or name not in IMAGE_COLUMNS}
    return {**reader(row, number), "images": []}


class _SkipBadRows:
    """Return True for a good streamed row; print the first bad one of each kind, and how many all workers skipped."""

    def __init__(self, config: StageArguments):
        self.dataset, self.strict, self.kinds = config.dataset, config.strict, set()
        self.skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, row: dict) -> bool:
        if row["problem"] is None:
            return True
        name = "a row" if row["row"] is None else f"row {row['row']}"
        message = f"{name} of {self.dataset}: {row['problem']}"
        if self.strict:
            raise ValueError(f"{message}. Repair or remove it, or train without --strict, which skips it.")
        self.skipped += 1
        count = int(self.skipped)
        kind = kind_of_problem(row["problem"])
        if kind not in self.kinds or str(count).rstrip("0") == "1":  # 10, 100, 1000, ...
            logger.warning(f"Skipped {message} ({count} skipped so far)")
        self.kinds.add(kind)
        return False


def check_data(names: Sequence[str], fields: list[str]) -> DataCheck:
    """Return the problems of a data set, named itself or by YAML files. The length of rows is checked if there is a
    model. A data set that would be streamed is read as others are. With `output_dir`, bad rows are written there.

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
        model, processor = load_model(config)
        config.max_length = config.max_length or context_length(model)
    elif config.max_length is not None:
        raise ValueError(
            f"max_length is {config.max_length}, but no model says what a token is: add --model, or "
            "--vision_model and --language_model."
        )
    with full_disk_advice(cache_root(), "what was read"):
        check = check_rows(config, processor)[1]
    if check.problems and config.output_dir not in NO_OUTPUT_DIR:
        check.save(config.output_dir)
    return check
