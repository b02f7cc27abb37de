"""The rows of a memory bank, without its encoders: searched by key, their values gathered, their captions read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .bank_arrays import CODES, EXPONENTS, KEYS, ROWS, VALUES, Values, local_folder, map_array, map_table
from .bank_format import BATCH_ROWS, BankConfig, config_schema, list_column, pa
from .bank_index import KeyIndex, open_index
from .row_encoder import read_thumbnail

Ids = torch.Tensor | np.ndarray | Sequence
Excluded = int | str | Sequence[int | str] | None

NO_IDS = np.empty(0, np.int64)
# What a process opens for itself, and does not pass on to others.
OPENED = ("captions", "key_array", "key_index", "source_order", "table", "values")


class BankRows:
    """The rows of a bank, as files that are memory-mapped from `HF_HOME/tinyalign`: processes share one copy.

    Attributes:
        config: the content of bank_config.json.
        index: how to search: "exact", a faiss factory string, or None, which leaves it to the bank.
    """

    def __init__(self, config: BankConfig, index: str | None = None):
        self.config = config
        self.index = index

    def __len__(self) -> int:
        return self.config.num_rows

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in OPENED}

    def __deepcopy__(self, memo: dict) -> BankRows:
        return copy.copy(self)

    def rows_only(self) -> BankRows:
        """Return the rows without encoders: small to pass to worker processes that only read rows."""
        return BankRows(self.config, self.index)

    @property
    def folder(self) -> Path:
        """The folder of the local files."""
        return local_folder(self.config)

    @cached_property
    def key_array(self) -> np.ndarray:
        """`(num_rows, key_dim)`, float32, or float16 in a quantized bank."""
        dtype = np.float16 if self.config.quantized else np.float32
        return map_array(self.folder / KEYS, dtype, (len(self), self.config.key_dim))

    @cached_property
    def values(self) -> Values:
        if self.config.value_size == 0:
            raise ValueError(
                "The memory bank has no values, expected one for a model that reads latents: build it with a model "
                'whose memory_input is "latents" or "both".'
            )
        shape = (len(self), *self.config.value_shape)
        if not self.config.quantized:
            return Values(map_array(self.folder / VALUES, np.float16, shape))
        exponents = map_array(self.folder / EXPONENTS, np.int8, shape[:2])
        return Values(map_array(self.folder / CODES, np.int8, shape), exponents)

    @cached_property
    def table(self) -> pa.Table:
        """Every column but key and value."""
        return map_table(self.folder / ROWS)

    @cached_property
    def key_index(self) -> KeyIndex:
        return open_index(self.key_array, self.folder, self.index)

    @property
    def index_facts(self) -> dict:
        """Facts of the index that searches the bank: `{"index", "k_factor", "recall_at_5"}`, measured when made."""
        return self.key_index.facts

    @cached_property
    def captions(self) -> list[str]:
        return self.table["caption"].to_pylist()

    @cached_property
    def source_order(self) -> tuple[np.ndarray, np.ndarray]:
        """The source ids, sorted, and the rows they belong to."""
        # 32 hex digits each lie in one buffer: sorted there, without a Python object for each row
        column = self.table["source_id"].combine_chunks().cast(pa.binary()).cast(pa.binary(32))
        names = np.frombuffer(column.buffers()[1], "S32", len(self))
        order = np.argsort(names, kind="stable")
        return names[order], order

    def search(
        self, queries: torch.Tensor | np.ndarray, top_k: int, exclude: Sequence[Excluded] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[np.ndarray, np.ndarray]:
        """Find the rows with the largest inner products, exactly or through a fast index; equal ones ordered by id.

        Args:
            queries: `(n, key_dim)`, a tensor or an array.
            top_k: number of neighbours, at most the size of the bank.
            exclude: for each query None, or a `source_id`, a row id (-1 is ignored) or several of them to leave out.

        Returns:
            scores `(n, top_k)` float32, best first, and row ids `(n, top_k)` int64, as tensors on the queries' device
            or as arrays, like the queries. Where exclusion leaves fewer than `top_k` rows: id -1 and score -inf.

        Raises:
            ValueError: the shape, `top_k` or `exclude` does not fit, or a query is not finite.
            RuntimeError: in a DataLoader worker or another forked process, where faiss would hang.
        """
        as_array = queries.detach().float().cpu().numpy() if isinstance(queries, torch.Tensor) else np.asarray(queries)
        if as_array.dtype.kind not in "fiu":
            raise TypeError(f"The queries are a {type(queries).__name__}, expected a tensor or an array of floats.")
        vectors = np.ascontiguousarray(as_array, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.config.key_dim:
            raise ValueError(f"The queries have shape {vectors.shape}, expected (n, {self.config.key_dim}).")
        if not np.isfinite(vectors).all():
            raise ValueError("The queries hold NaN or infinity, expected finite numbers: check the vision features.")
        if not (isinstance(top_k, (int, np.integer)) and 1 <= top_k <= len(self)):
            raise ValueError(
                f"top_k is {top_k}, but the bank has {len(self)} rows. Ask for 1 to {len(self)} neighbours, or add "
                "rows."
            )
        if isinstance(exclude, (str, int, np.integer)):
            raise ValueError(f"exclude is {exclude!r}, expected a list with one item a query: [{exclude!r}] of one.")
        if exclude is None:
            exclude = [None] * len(vectors)
        if len(exclude) != len(vectors):
            raise ValueError(f"exclude has {len(exclude)} items for {len(vectors)} queries, expected one a query.")
        excluded = [self.excluded_ids(item) for item in exclude]
        scores, ids = self.key_index.search(vectors, top_k, excluded)
        if isinstance(queries, torch.Tensor):
            return torch.from_numpy(scores).to(queries.device), torch.from_numpy(ids).to(queries.device)
        return scores, ids

    def gather(self, ids: Ids, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return values of rows: ids `(n, k)` (any shape) to `(n, k, num_latents, latent_dim)`; id -1 gives zeros."""
        rows = self.checked_ids(ids)
        device = ids.device if isinstance(ids, torch.Tensor) else "cpu"
        values = self.values.gather(np.maximum(rows, 0), device, dtype)
        if (rows < 0).any():
            values[torch.from_numpy(rows < 0).to(device)] = 0
        return values

    def keys(self, ids: Ids) -> np.ndarray:
        """Return keys of rows: ids `(n,)`, none of them -1, to `(n, key_dim)` float32."""
        rows = self.checked_ids(ids)
        if (rows < 0).any():
            raise ValueError(f"Row {int(np.argmin(rows))} of the ids is -1, which has no key: leave it out.")
        return self.key_array[rows].astype(np.float32)

    def rows(self, ids: Ids) -> list:
        """Return `{"id", "source_id", "caption", kept columns...}` of rows; nested like `ids`, None for id -1."""
        ids = self.checked_ids(ids)
        found = np.full(ids.shape or 1, None, object)
        found[ids >= 0] = self.texts(ids[ids >= 0])
        return found.tolist()

    def texts(self, ids: np.ndarray) -> list[dict]:
        """Return what `rows` does, of a flat array of ids without -1."""
        table = self.table.select(["id", "source_id", "caption", *self.config.columns])
        # `take` would copy all texts of the bank into one buffer, which holds 2 GiB
        return [table.slice(number, 1).to_pylist()[0] for number in ids.tolist()]

    def thumbnail(self, row_id: int) -> Image.Image | None:
        """Return the small picture kept of a row, None for id -1 and in a bank built without thumbnails."""
        if self.config.thumbnail_size is None or row_id == -1:
            return None
        picture = self.table["thumbnail"][int(self.checked_ids([row_id])[0])].as_py()
        return read_thumbnail(picture and picture["bytes"])

    def ids_of(self, source_id: str) -> np.ndarray:
        """Return the ids, int64 and ascending, of the rows made from the image with this `source_id`."""
        if not isinstance(source_id, str):
            raise TypeError(f"source_id is {source_id!r:.50}, expected a text of 32 hex digits.")
        names, order = self.source_order
        wanted = np.bytes_(source_id.encode(errors="replace"))
        return order[np.searchsorted(names, wanted, "left") : np.searchsorted(names, wanted, "right")]

    def image_names(self) -> set[bytes]:
        """Return the `source_id` of all rows, 16 bytes each."""
        return set(map(bytes.fromhex, self.table["source_id"].to_pylist()))

    def batches(self, keys_of: np.ndarray | None = None) -> Iterator[pa.RecordBatch]:
        """Yield all rows with values and their own keys, or those of the rows `keys_of`, `BATCH_ROWS` at a time."""
        schema = config_schema(self.config)
        for start in range(0, len(self), BATCH_ROWS):
            rows = np.arange(start, min(start + BATCH_ROWS, len(self)))
            (part,) = self.table[start : start + BATCH_ROWS].combine_chunks().to_batches()
            columns = dict(zip(part.schema.names, part.columns, strict=True))
            keys = self.key_array[rows if keys_of is None else keys_of[rows]]
            columns["key"] = list_column(keys.astype(np.float32, copy=False))
            if self.config.value_size:
                columns["value"] = list_column(self.values.gather(rows, "cpu", torch.float16).flatten(1).numpy())
            yield pa.record_batch(columns, schema=schema)

    def excluded_ids(self, item: Excluded) -> np.ndarray:
        """Return the ids that an item of `exclude` means."""
        if item is None:
            return NO_IDS
        if isinstance(item, str):
            return self.ids_of(item)
        if isinstance(item, Iterable) and any(isinstance(entry, str) for entry in item):
            return np.concatenate([self.excluded_ids(entry) for entry in item])
        ids = np.atleast_1d(self.checked_ids(item))
        return ids[ids >= 0]

    def checked_ids(self, ids: Ids) -> np.ndarray:
        """Return ids as an int64 array; ValueError if one is no row of the bank."""
        ids = ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"The row ids are of {ids.dtype}, expected integers.")
        ids = ids.astype(np.int64)
        if ids.size and not -1 <= ids.min() <= ids.max() < len(self):
            raise ValueError(
                f"Row ids run from {ids.min()} to {ids.max()}, expected -1 (none) to {len(self) - 1}: these ids are "
                "of another bank."
            )
        return ids


def renumbered(tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a bank's tables with ids 0, 1, 2, ..."""
    start = 0
    for table in tables:
        for batch in table.combine_chunks().to_batches():
            if "id" not in batch.schema.names:
                raise ValueError(f"The columns are {batch.schema.names}, expected those of a bank, id among them.")
            ids = pa.array(range(start, start + len(batch)), pa.int64())
            yield batch.set_column(batch.schema.names.index("id"), "id", ids)
            start += len(batch)
