"""`tinyalign bank build --ray`: the rows of a memory bank, encoded by the actors of a Ray cluster."""

import copy
import json
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from glob import glob
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ...modeling_tinyalign.bank_builder import RowEncoder, evaluating
from ..data.chats import BadRow
from ..data.images import CaptionedImages
from . import encode
from .encode import DUPLICATE, Parts, chunks, encode_chunk, part_content, save_file

try:
    import ray
    import ray.data
except ImportError:
    ray = None


def encode_on_cluster(
    parts: Parts,
    actors: int,
    encoder: RowEncoder,
    source: CaptionedImages,
    seen: set[bytes] | None = None,
    wanted: int | None = None,
    seed: int = 0,
    total: int | None = None,
):
    """
    What [`Parts.encode`] does, by `actors` of a Ray cluster (0: one for each of its GPUs, or else of its CPUs): the
    same parts, of the same rows in the same batches.

    All images are read twice. First tasks name them, by their pixels, and find the bad ones; the names are kept beside
    the parts. Then it is known which rows are in which part, and the actors encode the parts, in any order.

    Raises:
        ImportError: Ray is not installed.
        ValueError, OSError: As [`Parts.encode`].
    """
    if ray is None:
        raise ImportError('--ray needs Ray: `pip install "tinyalign-vlm[ray]"`.')
    if actors < 0:
        raise ValueError(f"--ray is {actors}, expected a number of actors, 1 or more (0: one for each GPU, or CPU).")
    source, first_id = _anywhere(source), encoder.num_rows
    with _cluster():
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        rounds, plans = [], []
        for numbers in parts.rounds(wanted, seed, total):
            rounds.append(numbers)
            plans += _plan_round(parts, source, numbers, len(plans), first_id, seen, total)
        there = {number for number in range(len(plans)) if parts.path(number).exists()}
        if len(there) < len(plans):
            size = min(actors or gpus or int(resources["CPU"]), len(plans) - len(there))
            pool = {"compute": ray.data.ActorPoolStrategy(size=size), "fn_constructor_args": [_to_ray(encoder)]}
            pool |= {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
            with tqdm(total=parts.rows, desc="Encoding the bank", unit="row") as bar:
                bar.update(sum(plans[number]["rows"] for number in there))
                for number, content in _each_part(EncodePart, source, rounds, 0, there, plans, **pool):
                    save_file(parts.path(number), content)
                    bar.update(plans[number]["rows"])
    parts.rows, parts.left_out = 0, []
    for number in range(len(plans)):
        parts.take(number, None)
    encoder.num_rows = first_id + parts.rows


def _plan_round(
    parts: Parts,
    source: CaptionedImages,
    numbers: np.ndarray | None,
    first: int,
    first_id: int,
    seen: set[bytes] | None,
    total: int | None,
) -> list[dict]:
    """Of each part from `first` on: how many `rows` it has, the `id` of its first one, and what is `left_out`."""
    expected = total if numbers is None else len(numbers)
    count = None if expected is None else -(-expected // encode.PART_ROWS)
    there = {int(path.stem) for path in parts.folder.glob("[0-9]*.names")}
    if count is None or not there.issuperset(range(first, first + count)):
        with tqdm(total=expected, desc="Naming the images", unit="row") as bar:
            bar.update(sum(len(_names(parts, number)) for number in there if number >= first))
            for number, content in _each_part(name_images, source, [numbers], first, there, [], num_cpus=1):
                save_file(parts.path(number).with_suffix(".names"), content)
                bar.update(len(_names(parts, number)))
                there.add(number)
    plans = []
    for number in range(first, len(there) if count is None else first + count):
        left_out, rows = [], 0
        for row, name, problem in _names(parts, number):
            if name is not None and seen is not None and bytes.fromhex(name) in seen:
                problem = str(BadRow(*DUPLICATE))
            if problem is not None:
                left_out.append({"row": row, "reason": problem})
                continue
            rows += 1
            if seen is not None:
                seen.add(bytes.fromhex(name))
        plans.append({"rows": rows, "id": first_id + parts.rows, "left_out": left_out})
        parts.rows += rows
    return plans


def _names(parts: Parts, number: int) -> list[tuple[int, str | None, str | None]]:
    """Of the rows of a part: number, name of the image, and what is wrong with it; one of the two is None."""
    return json.loads(parts.path(number).with_suffix(".names").read_bytes())


def _each_part(
    worker, source: CaptionedImages, rounds: list, first: int, skip: set[int], plans: list[dict], **how
) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents that the `worker` makes of the parts from `first` on, in any order. `how` is Ray Data's."""
    task = ray.put((source, rounds, encode.PART_ROWS, first, skip, plans))
    data = ray.data.from_items([0]).map_batches(stored_parts, fn_args=[[task]], batch_size=None, num_cpus=0)
    data = data.map(worker, **how)
    data.context.target_max_block_size = 1  # a part is a block: all workers have something to do
    data.context.max_consecutive_actor_init_deaths = 3
    data.context.raise_original_map_exception = True
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    for row in data.iter_rows():
        yield row["number"], row["content"]


def stored_parts(_, task: list) -> Iterator[pa.Table]:
    """The parts as they are stored. One Ray task reads the data set from its beginning to its end."""
    source, rounds, size, first, skip, plans = ray.get(task[0])
    every = (chunk for numbers in rounds for chunk in chunks(source, numbers, size))
    for number, chunk in enumerate(every, first):
        if number not in skip:
            plan = plans[number] if plans else {"left_out": []}
            left_out = {row["row"] for row in plan["left_out"]}
            part = number, source, [row for row in chunk if row[0] not in left_out], plan
            yield pa.table({"part": pa.array([pickle.dumps(part)], pa.large_binary())})


def name_images(row: dict[str, bytes]) -> dict[str, Any]:
    """A Ray task: reads the rows of a part, see `_names`."""
    number, source, chunk, _ = pickle.loads(row["part"])
    found = []
    for line, stored in chunk:
        try:
            found.append((line, source.read(line, stored)["source_id"], None))
        except BadRow as error:
            found.append((line, None, str(error)))
    return {"number": number, "content": json.dumps(found).encode()}


class EncodePart:
    """A Ray actor, with model and encoders."""

    def __init__(self, encoder: list):
        encoder, *modules = ray.get(encoder[0])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder.model, encoder.value_encoder = (_unpacked(*module).to(device) for module in modules)
        self.encoder = encoder

    def __call__(self, row: dict[str, bytes]) -> dict[str, Any]:
        number, source, chunk, plan = pickle.loads(row["part"])
        self.encoder.num_rows, left_out = plan["id"], []
        with evaluating(self.encoder.model, self.encoder.value_encoder):
            batches = list(encode_chunk(chunk, self.encoder, source, None, left_out))
        if left_out:
            raise ValueError(
                f"Row {left_out[0]['row']} of the data set could be read, and now it cannot: {left_out[0]['reason']}"
            )
        return {
            "number": number,
            "content": part_content(batches, self.encoder.schema, plan["left_out"]).to_pybytes(),
        }


def _to_ray(encoder: RowEncoder) -> list:
    """A copy in Ray's object store, in a list, for Ray would hand on what a bare reference is of."""
    shell = replace(encoder, model=None, value_encoder=None, key_encoder=copy.deepcopy(encoder.key_encoder).cpu())
    return [ray.put((shell, _packed(encoder.model), _packed(encoder.value_encoder)))]


def _packed(model: PreTrainedModel) -> tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, torch.Tensor]]:
    """transformers hooks itself into models that have run, and those cannot be pickled."""
    return type(model), model.config, {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _unpacked(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, torch.Tensor]
) -> PreTrainedModel:
    model = model_class(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _anywhere(source: CaptionedImages) -> CaptionedImages:
    """With absolute paths: workers run in another folder."""
    config = copy.copy(source.config)
    if os.path.exists(config.dataset) or glob(config.dataset):
        config.dataset = os.path.abspath(config.dataset)
    if config.image_folder is not None:
        config.image_folder = os.path.abspath(config.image_folder)
    return replace(source, config=config)


@contextmanager
def _cluster() -> Iterator[None]:
    """The cluster this process is connected to, or that of RAY_ADDRESS, or a new one of this machine, ended after."""
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
