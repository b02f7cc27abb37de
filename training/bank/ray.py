"""`tinyalign bank build --ray`: the rows of a memory bank, encoded by the actors of a Ray cluster."""

import copy
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import glob
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ...modeling_tinyalign.key_encoder import evaluating
from ...modeling_tinyalign.row_encoder import DUPLICATE_REASON, BadRow, LeftOutRow, RowEncoder, is_duplicate
from ..data.images import CaptionedImages
from ..disk import save_file
from . import encode
from .encode import EncodedParts, chunks, part_content

try:
    import ray
    import ray.data
except ImportError:
    ray = None


def encode_on_cluster(parts: EncodedParts, actors: int, encoder: RowEncoder, source: CaptionedImages) -> None:
    """Do what `EncodedParts.encode` does, with actors of a Ray cluster: the same parts, in the same batches.

    All images are read twice. First tasks name them, by their pixels, and find the bad ones; the names are kept beside
    the parts. Then it is known which rows are in which part, and the actors encode the parts, in any order. No actors
    are one for each of the cluster's GPUs, or else of its CPUs.
    """
    if ray is None:
        raise ImportError('--ray needs Ray: `pip install "tinyalign-vlm[ray]"`.')
    if actors < 0:
        raise ValueError(f"--ray is {actors}, expected a number of actors, 1 or more (0: one for each GPU, or CPU).")
    source = _anywhere(source)
    with _cluster():
        rounds, plans = [], []
        for numbers in parts.rounds():
            rounds.append(numbers)
            plans += _plan_round(parts, source, numbers, len(plans), encoder)
        missing = [number for number in range(len(plans)) if not parts.path(number).exists()]
        if missing:
            with tqdm(total=parts.num_rows, desc="Encoding the bank", unit="row") as bar:
                task = ReadTask(source, rounds, set(missing), plans)
                for number, content in _each_part(EncodePart, task, **_actor_pool(encoder, actors, len(missing))):
                    save_file(parts.path(number), content)
                    bar.update(plans[number]["rows"])
    parts.num_rows, parts.left_out = 0, []
    for number in range(len(plans)):
        parts.count_part(number, None)


def _actor_pool(encoder: RowEncoder, actors: int, num_parts: int) -> dict[str, Any]:
    """Return the arguments of Ray Data for actors that hold the encoder."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    size = min(actors or gpus or int(resources["CPU"]), num_parts)
    pool = {"compute": ray.data.ActorPoolStrategy(size=size), "fn_constructor_args": [_to_ray(encoder)]}
    return pool | {"num_gpus": int(gpus > 0), "num_cpus": int(gpus == 0)}


@dataclass
class ReadTask:
    """The parts to read: which rows each has, and where they are from."""

    source: CaptionedImages
    rounds: list[np.ndarray | None]  # of `EncodedParts.rounds`
    missing: set[int] | None  # numbers of the parts to read; None: all of them
    plans: list[dict]  # if they are known, how many `rows` a part has, the `id` of the first and what is `left_out`
    first: int = 0  # number of the first part
    part_rows: int = field(default_factory=lambda: encode.PART_ROWS)


def _plan_round(
    parts: EncodedParts,
    source: CaptionedImages,
    numbers: np.ndarray | None,
    first: int,
    encoder: RowEncoder,
) -> list[dict]:
    """Return the plan of each part from `first` on, see `ReadTask`, and count their rows in `parts`."""
    expected = parts.total if numbers is None else len(numbers)
    count = None if expected is None else -(-expected // encode.PART_ROWS)
    there = {int(path.stem) for path in parts.folder.glob("[0-9]*.names")}
    missing = None if count is None else set(range(first, first + count)) - there
    if missing is None or missing:
        with tqdm(total=expected, desc="Naming the images", unit="row") as bar:
            task = ReadTask(source, [numbers], missing, [], first)
            for number, content in _each_part(name_images, task, num_cpus=1):
                save_file(parts.path(number).with_suffix(".names"), content)
                bar.update(len(_names(parts, number)))
                there.add(number)
    plans = []
    for number in range(first, len(there) if count is None else first + count):
        names, left_out = _names(parts, number), []
        for row, name, problem in names:
            if problem is None and is_duplicate(name, encoder.seen):
                problem = DUPLICATE_REASON
            if problem is not None:
                left_out.append(LeftOutRow(row, problem))
        rows = len(names) - len(left_out)
        plans.append({"rows": rows, "id": encoder.next_id + parts.num_rows, "left_out": left_out})
        parts.num_rows += rows
    return plans


def _names(parts: EncodedParts, number: int) -> list[tuple[int, str | None, str | None]]:
    """Return of the rows of a part: number, name of the image, and what is wrong with it; one of the two is None."""
    return json.loads(parts.path(number).with_suffix(".names").read_bytes())


def _each_part(worker: Callable, task: ReadTask, **pool) -> Iterator[tuple[int, bytes]]:
    """Yield numbers and contents that the worker makes of the parts of a task, in any order."""
    data = ray.data.from_items([0]).map_batches(stored_parts, fn_args=[[ray.put(task)]], batch_size=None, num_cpus=0)
    data = data.map(worker, **pool)
    data.context.target_max_block_size = 1  # byte: a part is a block, so all workers have something to do
    data.context.max_consecutive_actor_init_deaths = 3
    data.context.raise_original_map_exception = True
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    for row in data.iter_rows():
        yield row["number"], row["content"]


def stored_parts(_, task: list) -> Iterator[pa.Table]:
    """Yield the parts as they are stored. One Ray task reads the data set from its beginning to its end."""
    task = ray.get(task[0])
    for number, chunk in enumerate(chunks(task.source, task.rounds, task.part_rows), task.first):
        if task.missing is None or number in task.missing:
            plan = task.plans[number] if task.plans else {"left_out": []}
            left_out = {row.row for row in plan["left_out"]}
            part = number, task.source, [row for row in chunk if row[0] not in left_out], plan
            yield pa.table({"part": pa.array([pickle.dumps(part)], pa.large_binary())})


def name_images(row: dict[str, bytes]) -> dict[str, Any]:
    """Read the rows of a part, as a Ray task; see `_names`."""
    number, source, chunk, _ = pickle.loads(row["part"])
    found = []
    for line, stored in chunk:
        try:
            found.append((line, source.read(line, stored).source_id, None))
        except BadRow as error:
            found.append((line, None, str(error)))
    return {"number": number, "content": json.dumps(found).encode()}


class EncodePart:
    """A Ray actor, with model and encoders."""

    def __init__(self, encoder: list):
        self.encoder, modules = ray.get(encoder[0])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, (model_class, config, state) in modules.items():
            model = model_class(config)
            model.load_state_dict(state, assign=True)
            setattr(self.encoder, name, model.eval().to(device))

    def __call__(self, row: dict[str, bytes]) -> dict[str, Any]:
        number, source, chunk, plan = pickle.loads(row["part"])
        encoder = self.encoder
        encoder.read_row, encoder.next_id, encoder.seen, encoder.left_out = source.read, plan["id"], None, []
        with evaluating(encoder.model, encoder.value_encoder):
            batches = list(encoder.batches(chunk))
        if encoder.left_out:
            changed = encoder.left_out[0]
            raise ValueError(f"Row {changed.row} of the data set could be read, and now it cannot: {changed.reason}")
        return {"number": number, "content": part_content(batches, encoder.schema, plan["left_out"]).to_pybytes()}


def _to_ray(encoder: RowEncoder) -> list:
    """Put a copy into Ray's object store; it is in a list, for Ray would replace a bare reference by its object."""
    shell = copy.copy(encoder)
    shell.model = shell.value_encoder = shell.read_row = shell.seen = None
    shell.key_encoder = copy.deepcopy(encoder.key_encoder).cpu()
    modules = {}  # class, config and weights: transformers hooks itself into models that have run, which can't be sent
    for name, model in (("model", encoder.model), ("value_encoder", encoder.value_encoder)):
        if model is not None:
            state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
            modules[name] = type(model), model.config, state
    return [ray.put((shell, modules))]


def _anywhere(source: CaptionedImages) -> CaptionedImages:
    """Return the same rows with absolute paths: workers run in another folder."""
    config = copy.copy(source.config)
    if os.path.exists(config.dataset) or glob(config.dataset):
        config.dataset = os.path.abspath(config.dataset)
    if config.image_folder is not None:
        config.image_folder = os.path.abspath(config.image_folder)
    return replace(source, config=config)


@contextmanager
def _cluster() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine and end it, unless one is connected to."""
    connected = ray.is_initialized()
    if not connected:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        if not connected:
            ray.shutdown()
