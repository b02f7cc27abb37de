"""The rows of a memory bank: searched by key, their values gathered, their captions read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from .bank_fast_index import describe, open_index
from .bank_images import load_image
from .bank_index import KeyIndex
from .bank_keys import PackedKeys, PlainKeys
from .bank_shards import list_column
from .bank_storage import BankFiles
from .bank_values import PackedValues, PlainValues

try:
    import pyarrow as pa
    from PIL import Image
except ImportError:
    pa = Image = None

NO_IDS = np.empty(0, np.int64)


class BankRows:
    """What a bank does without its encoders.

    Keys, values and rows are files that are memory-mapped from `HF_HOME/tinyalign/<sha256>/`, so copies and worker
    processes share them.

    Attributes:
        config: the content of bank_config.json.
        index: how to search: "exact", a faiss factory string, or None, which leaves it to the bank.
    """

    def __init__(self, config: dict, files: BankFiles, index: str | None = None):
        self.config = config
        self.index = index
        self._files = files

    def __len__(self) -> int:
        return self.config["num_rows"]

    def __getstate__(self) -> dict:
        """Without the mapped files, which every process opens for itself."""
        opened = ("_keys", "_searcher", "_values", "_table", "_source_order", "captions", "index_facts")
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __deepcopy__(self, memo: dict) -> BankRows:
        return copy.copy(self)

    def without_encoders(self) -> BankRows:
        """The rows alone: small, for worker processes that only read them."""
        return BankRows(self.config, self._files, self.index)

    @property
    def key_dim(self) -> int:
        return self.config["key_dim"]

    @property
    def num_latents(self) -> int:
        return self.config["num_latents"]

    @property
    def latent_dim(self) -> int:
        return self.config["latent_dim"]

    @cached_property
    def captions(self) -> list[str]:
        return self._table["caption"].to_pylist()

    def search(
        self,
        queries: torch.Tensor | np.ndarray,
        top_k: int,
        exclude: Sequence[int | str | Sequence[int | str] | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[np.ndarray, np.ndarray]:
        """Maximum inner product search, exact or through a fast index (`index_facts`); equal scores are ordered by id.

        Args:
            queries: `(n, key_dim)`, a tensor or an array.
            top_k: number of neighbours, at most the size of the bank.
            exclude: for each query None, a `source_id` or row id (-1 is ignored), or several of them, that must not
                be returned.

        Returns:
            scores `(n, top_k)` float32, best first, and row ids `(n, top_k)` int64, as tensors on the queries' device
            or as arrays, like the queries. Where exclusion leaves fewer than `top_k` rows: id -1 and score -inf.

        Raises:
            ValueError: the shape, `top_k` or `exclude` does not fit, or a query is not finite.
            RuntimeError: in a DataLoader worker or another forked process, where faiss would hang.
        """
        as_array = queries.detach().float().cpu().numpy() if isinstance(queries, torch.Tensor) else queries
        vectors = np.ascontiguousarray(as_array, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.key_dim:
            raise ValueError(f"The queries have shape {vectors.shape}, expected (n, {self.key_dim}).")
        if not np.isfinite(vectors).all():
            raise ValueError("The queries hold NaN or infinity, expected finite numbers: check the vision features.")
        if not (isinstance(top_k, (int, np.integer)) and 1 <= top_k <= len(self)):
            raise ValueError(
                f"top_k is {top_k}, but the bank has {len(self)} rows. Ask for 1 to {len(self)} neighbours, or add "
                "rows."
            )
        if isinstance(exclude, str):
            raise ValueError(f"exclude is {exclude!r}, expected a list with one item a query: [{exclude!r}] of one.")
        if exclude is not None and len(exclude) != len(vectors):
            raise ValueError(f"exclude has {len(exclude)} items for {len(vectors)} queries, expected one a query.")
        excluded = [self._excluded_ids(item) for item in exclude] if exclude is not None else [NO_IDS] * len(vectors)
        scores, ids = self._searcher[0].search(vectors, top_k, excluded)
        if isinstance(queries, torch.Tensor):
            return torch.from_numpy(scores).to(queries.device), torch.from_numpy(ids).to(queries.device)
        return scores, ids

    def gather(self, ids: torch.Tensor | np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values of rows: ids `(n, k)` (any shape) to `(n, k, num_latents, latent_dim)`; id -1 gives zeros."""
        rows = self._checked_ids(ids)
        device = ids.device if isinstance(ids, torch.Tensor) else "cpu"
        values = self._values.gather(np.maximum(rows, 0), device, dtype)
        if (rows < 0).any():
            values[torch.from_numpy(rows < 0).to(device)] = 0
        return values

    def keys(self, ids: torch.Tensor | np.ndarray | Sequence) -> np.ndarray:
        """Keys of rows: ids `(n,)`, none of them -1, to `(n, key_dim)` float32."""
        rows = self._checked_ids(ids)
        if (rows < 0).any():
            raise ValueError(f"Row {int(np.argmin(rows))} of the ids is -1, which has no key: leave it out.")
        return np.array(self._keys[rows])

    def rows(self, ids: torch.Tensor | np.ndarray | Sequence) -> list:
        """`{"id", "source_id", "caption", kept columns...}` of rows; nested like `ids`, None for id -1."""
        ids = self._checked_ids(ids)
        found = np.full(ids.shape or 1, None, object)
        found[ids >= 0] = self._text_of(ids[ids >= 0])
        return found.tolist()

    def _text_of(self, ids: np.ndarray) -> list[dict]:
        table = self._table.drop_columns([name for name in self._table.column_names if name == "thumbnail"])
        return table.take(pa.array(ids)).to_pylist()

    def thumbnail(self, row_id: int) -> Image.Image | None:
        """The small picture kept of a row, None for id -1 and in a bank built without thumbnails."""
        if "thumbnail" not in self._table.column_names or row_id == -1:
            return None
        picture = self._table["thumbnail"][int(self._checked_ids([row_id])[0])].as_py()
        return load_image(picture and picture["bytes"])

    def ids_of(self, source_id: str) -> np.ndarray:
        """Ids, int64 and ascending, of the rows made from the image with this `source_id`."""
        names, order = self._source_order
        wanted = np.bytes_(source_id.encode())
        return order[np.searchsorted(names, wanted, "left") : np.searchsorted(names, wanted, "right")]

    @cached_property
    def index_facts(self) -> dict:
        """How the bank is searched here, measured with up to 500 of its own keys as queries.

        `{"index": "exact", "gpu" or a faiss factory string, "k_factor": candidates compared for every neighbour,
        "recall_at_5": against exact search, "milliseconds": of a query alone}`.
        """
        index, facts = self._searcher
        return facts or describe(index)

    @cached_property
    def _keys(self) -> PlainKeys | PackedKeys:
        return self._files.open_keys()

    @cached_property
    def _searcher(self) -> tuple[KeyIndex, dict | None]:
        return open_index(self._keys, self._files.keys_folder, self.index)

    @cached_property
    def _values(self) -> PlainValues | PackedValues:
        return self._files.open_values()

    @cached_property
    def _table(self) -> pa.Table:
        """Every column but key and value."""
        path = self._files.rows
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"The local file {path} is damaged ({error}). Delete {path.parent} and load the bank again."
            ) from error

    @cached_property
    def _source_order(self) -> tuple[np.ndarray, np.ndarray]:
        """The source ids, sorted, and the rows they belong to."""
        column = self._table["source_id"].combine_chunks().cast(pa.binary()).cast(pa.binary(32))
        names = np.frombuffer(column.buffers()[1], "S32", len(self))
        order = np.argsort(names, kind="stable")
        return names[order], order

    def _batches(self, keys_of: np.ndarray | None = None) -> Iterator[pa.RecordBatch]:
        """The bank's rows with keys and values; `keys_of`: the row whose key each row gets."""
        start = 0
        for batch in self._table.to_batches():
            rows = slice(start, start + len(batch))
            keys = self._keys[rows if keys_of is None else keys_of[rows]]
            values = self._values[rows].reshape(len(batch), -1)
            columns = {name: batch.column(name) for name in batch.schema.names}
            columns["key"], columns["value"] = list_column(keys), list_column(values)
            yield pa.record_batch(columns)
            start += len(batch)

    def _excluded_ids(self, item: int | str | Sequence[int | str] | None) -> np.ndarray:
        if item is None:
            return NO_IDS
        if isinstance(item, (int, np.integer)):
            item = [item]
        if isinstance(item, str):
            return self.ids_of(item)
        if any(isinstance(entry, str) for entry in item):
            return np.concatenate([self._excluded_ids(entry if isinstance(entry, str) else [entry]) for entry in item])
        ids = self._checked_ids(item)
        return ids[ids >= 0]

    def _checked_ids(self, ids: torch.Tensor | np.ndarray | Sequence) -> np.ndarray:
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
