"""`tinyalign bank build` and `bank add`: from the files of a data set to a new bank, in steps that survive a kill."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin, __version__, set_seed

from ...hub_cards.cards import is_hub_id
from ...modeling_tinyalign import MemoryBank, ValueEncoder
from ...modeling_tinyalign.bank_format import CONFIG_NAME, LEFT_OUT_NAME
from ...modeling_tinyalign.key_encoder import evaluating
from ...modeling_tinyalign.row_encoder import DUPLICATE, RowEncoder, check_row_settings, finished
from ..arguments.alignment import AlignmentConfig
from ..data.features import hash_weights
from ..data.images import CaptionedImages, fingerprint_files
from ..data.rows import batch_size_of
from ..disk import full_disk_advice
from ..hub.bank_facts import DATA, command_of_settings, save_with_facts
from ..hub.parts import UNKNOWN, describe_part
from ..models import load_model
from .build import finish_bank, new_key_encoder
from .encode import EncodedParts, describe_left_out, no_usable_row
from .folders import WorkFolder, check_new_folder, work_folder
from .value_encoder_training import ValueEncoderTrainingConfig, train_new_value_encoder

MANY_ROWS = 2000  # take minutes
# Settings of the last step: another value makes another bank of the same encoded rows.
LAST_STEP = ("whiten_dim", "quantized")


@dataclass
class RowSettings:
    """The model, and the rows that it encodes; the fields are the options of `tinyalign bank add`."""

    dataset: str
    model: str | None = None
    vision_model: str | None = None
    language_model: str | None = None
    model_kwargs: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "train"
    image_folder: str | None = None
    image_column: str | None = None
    messages_column: str | None = None
    caption_column: str | None = None
    set: list[str] = field(default_factory=list)
    rows: int | None = None
    seed: int = 0
    keep_duplicates: bool = False
    batch_size: int | None = None

    def __post_init__(self):
        check_row_settings([], 1 if self.batch_size is None else self.batch_size, None)
        self.constants()

    def constants(self) -> dict[str, str]:
        """Return `set` as a dictionary; raises `ValueError` for what is not `column=value`."""
        for text in self.set:
            if text.find("=") < 1:
                raise ValueError(f"--set is {text!r}, expected COLUMN=VALUE, license=cc-by-4.0 say.")
        return dict(text.split("=", 1) for text in self.set)


@dataclass
class BuildSettings(RowSettings):
    """The fields are the options of `tinyalign bank build`."""

    keep: list[str] = field(default_factory=list)
    like: str | None = None
    value_encoder: str | None = None
    value_encoder_steps: int = ValueEncoderTrainingConfig().steps
    key_grid: int = 1
    whiten_dim: int | None = None
    quantized: bool | None = None
    thumbnail_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.like is None:
            known = {*self.keep, "image", "caption", self.caption_column}
            self.keep = [*self.keep, *(name for name in self.constants() if name not in known)]
        check_row_settings(self.keep, 1, self.thumbnail_size or None)
        if self.value_encoder_steps < 0:
            raise ValueError(f"value_encoder_steps is {self.value_encoder_steps}, expected 0 or more.")

    def check_like(self, columns: list[str]) -> None:
        """Raise `ValueError` for settings that the bank `like`, which keeps these columns, has made already."""
        defaults = vars(BuildSettings(self.dataset))
        if sorted(self.keep) == sorted(columns):
            defaults["keep"] = self.keep
        names = ("keep", "value_encoder", "value_encoder_steps", "key_grid", "whiten_dim", "thumbnail_size")
        found = [f"--{name}" for name in names if vars(self)[name] != defaults[name]]
        if found:
            raise ValueError(
                f"The bank is to be --like {self.like}, which keeps {columns} and has encoders and thumbnails of its "
                f"own: leave {', '.join(found)} out."
            )


def build_from_files(settings: BuildSettings, out: str | os.PathLike, ray: int | None = None) -> None:
    """Build a bank in the folder `out` and print what came of it.

    Killed, it goes on where it stopped when it is called again with the same settings, and ends with the same bank.

    Args:
        ray: encode with this many actors of a Ray cluster; 0: one for each of its GPUs, or else of its CPUs.

    Raises:
        ValueError: the data, the model or the settings do not fit, `out` is there, another process builds it, or no
            row is usable.
        OSError: a file cannot be read, or written; what was encoded is kept.
    """
    like = None if settings.like is None else MemoryBank.from_pretrained(settings.like)
    if like is not None:
        settings.check_like(like.config.columns)
    _write_bank(settings, out, like, ray)


def add_from_files(
    settings: RowSettings, bank_name: str | os.PathLike, out: str | os.PathLike, ray: int | None = None
) -> None:
    """Write a new bank to `out`: the rows of a bank, and those of a data set behind them. Print what came of it.

    Goes on where it was killed, and raises, as `build_from_files`.
    """
    _write_bank(settings, out, MemoryBank.from_pretrained(bank_name), ray, old_rows_of=bank_name)


def _write_bank(
    settings: RowSettings,
    out: str | os.PathLike,
    old: MemoryBank | None,
    ray: int | None,
    old_rows_of: str | os.PathLike | None = None,
) -> None:
    """Write a new bank: with the encoders of an old one or new ones, and with the old one's rows if it is named."""
    with_old_rows = old_rows_of is not None
    folder = Path(out).resolve()
    with work_folder(folder) as work:
        build = FileBuild.begin(settings, work, folder, old)
        if build is None:
            print(f"{out} is complete: there is nothing to do.")
            return
        with full_disk_advice(work.path, "what was encoded"):
            encoder = build.row_encoder(old)
            if with_old_rows:
                encoder.next_id = len(old)
                if encoder.seen is not None:
                    encoder.seen.update(old.image_names())
            parts = build.encode(encoder, ray)
            nothing_new = with_old_rows and any(row.reason.startswith(DUPLICATE) for row in parts.left_out)
            if parts.num_rows == 0 and not nothing_new:
                work.clear()
                raise no_usable_row(settings.dataset, parts.left_out)
            if old is None:
                bank = finish_bank(encoder, parts, settings.dataset, settings.whiten_dim, settings.quantized)
            else:
                rows = finished(parts.batches(), old.key_encoder.cpu())
                if with_old_rows:
                    bank = old.with_rows(chain(old.batches(), rows), parts.left_out)
                else:
                    bank = old.with_rows(rows, parts.left_out, settings.quantized)
                    # `with_rows` has added those that the other bank left out
                    bank.config.num_left_out = len(parts.left_out)
            words, names = (["add", str(old_rows_of)], [old_rows_of]) if with_old_rows else (["build"], [])
            data = describe_part(DATA, settings.dataset, "dataset", settings.dataset_revision)
            save_with_facts(bank, folder, command_of_settings(words, settings), names, data)
        work.clear()
    new = f", {parts.num_rows} of them new" if with_old_rows else ""
    listed = f", listed in {Path(out, LEFT_OUT_NAME)}" if parts.left_out else ""
    print(f"{out}: {len(bank)} rows{new}; {describe_left_out(parts.left_out)}{listed}.")


@dataclass
class FileBuild:
    """The model and the rows of a build, and the folder of its parts."""

    settings: RowSettings
    work: WorkFolder
    model: PreTrainedModel
    processor: ProcessorMixin
    source: CaptionedImages
    total: int | None  # rows of the data set, if they were counted
    batch_size: int

    @classmethod
    def begin(cls, settings: RowSettings, work: WorkFolder, out: Path, bank: MemoryBank | None) -> "FileBuild | None":
        """Open model and data, and write the settings to the work folder. Return None if the bank is complete.

        The encoders are those of `bank`, or new. Raises `ValueError` as `build_from_files` does.
        """
        files = fingerprint_files(settings.dataset)
        if is_hub_id(settings.dataset):  # at one commit, or rows of two would be mixed
            commit = describe_part(DATA, settings.dataset, "dataset", settings.dataset_revision).revision
            settings.dataset_revision = settings.dataset_revision if commit == UNKNOWN else commit
        used = {**asdict(settings), "files": files, "bank": bank and bank.config.sha256.config}
        used = json.loads(json.dumps(used))  # as the earlier ones: a tuple becomes a list
        earlier = work.read_settings()
        if out.exists() and earlier and used.items() <= earlier.items():
            work.clear()  # a process was killed at its very end
            return None
        check_new_folder(out)
        shared = AlignmentConfig.__dataclass_fields__.keys() & RowSettings.__dataclass_fields__.keys()
        config = AlignmentConfig(output_dir="unused", **{name: vars(settings)[name] for name in shared})
        set_seed(settings.seed)
        model, processor = load_model(config)
        model.to(config.device).eval()
        columns = settings.keep if bank is None else bank.config.columns
        lost = settings.constants().keys() - {*columns, "image", "caption", settings.caption_column}
        if lost:
            raise ValueError(f"--set names {sorted(lost)}, but the bank keeps {list(columns)}: leave them out.")
        source = CaptionedImages(config, settings.caption_column, columns, settings.constants())
        batch_size = settings.batch_size or batch_size_of(config)
        tower = hashlib.sha256(model.config.vision_config.to_json_string().encode())
        hash_weights(tower, model.base_model.vision_tower)
        used |= {"batch_size": batch_size, "tower": tower.hexdigest()}
        used |= {"torch": torch.__version__, "transformers": __version__}
        if work.has_work:
            check_same_work(work, earlier, used)
            total = earlier["total"]
        else:
            total = count_rows(settings, source, is_local=files is not None)
        work.write_settings(used | {"total": total})
        return cls(settings, work, model, processor, source, total, batch_size)

    def row_encoder(self, bank: MemoryBank | None) -> RowEncoder:
        """Return what makes rows, with the encoders of a bank or new ones."""
        seen = None if self.settings.keep_duplicates else set()
        rows = {"read_row": self.source.read, "batch_size": self.batch_size, "skip_bad_rows": True, "seen": seen}
        if bank is not None:
            return bank.row_encoder(self.model, self.processor, **rows)
        return RowEncoder(
            self.model,
            self.processor,
            self.value_encoder(),
            new_key_encoder(self.model, self.processor, self.settings.key_grid),
            keep_columns=self.settings.keep,
            thumbnail_size=self.settings.thumbnail_size or None,
            **rows,
        )

    def value_encoder(self) -> ValueEncoder | None:
        """Return the value encoder that the settings name, or a new one, trained once, if the model reads latents."""
        settings, folder = self.settings, self.work.path / "value_encoder"
        if settings.value_encoder is not None:
            folder = Path(settings.value_encoder)
            if not folder.is_dir() or (folder / CONFIG_NAME).is_file():
                encoder = MemoryBank.open_encoders(settings.value_encoder).value_encoder
                if encoder is None:
                    raise ValueError(
                        f"value_encoder is {settings.value_encoder}, a bank without values, expected one for a model "
                        "that reads latents, or the folder of a value encoder."
                    )
                return encoder.to(self.model.device)
        elif not self.model.config.reads_latents:
            return None
        elif not folder.is_dir():
            training = ValueEncoderTrainingConfig(steps=settings.value_encoder_steps, seed=settings.seed)
            checkpoint, fresh = folder.with_suffix(".pt"), folder.with_suffix(".new")
            encoder = train_new_value_encoder(
                self.model, self.processor, self.source, training, self.batch_size, checkpoint=checkpoint
            )
            encoder.save_pretrained(fresh)
            fresh.rename(folder)
        return ValueEncoder.from_pretrained(folder).to(self.model.device).eval()

    def encode(self, encoder: RowEncoder, ray: int | None) -> EncodedParts:
        """Encode the rows, here or on a Ray cluster, but for those that are encoded already."""
        parts = EncodedParts(self.work.path, self.settings.rows, self.settings.seed, self.total)
        total, done = parts.wanted or parts.total, parts.count_done()
        if done or total is None or total > MANY_ROWS:
            rows = "all" if total is None else f"{total:,}"
            print(f"Encoding {rows} rows, {done:,} of them are done already; --rows N takes fewer.", flush=True)
        try:
            if ray is not None:
                from .ray import encode_on_cluster

                encode_on_cluster(parts, ray, encoder, self.source)
            else:
                with evaluating(self.model, encoder.value_encoder):
                    parts.encode(encoder, self.source)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"stopped; {parts.count_done():,} rows are done, and the same command goes on with the others"
            ) from interrupt
        return parts


def check_same_work(work: WorkFolder, earlier: dict, used: dict) -> None:
    """Raise `ValueError`, naming what differs, unless work with these settings can go on with that of earlier ones."""
    changed = [
        f"{name}: {earlier.get(name)!r} then, {value!r} now"
        for name, value in used.items()
        if name not in LAST_STEP and earlier.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{work.path} holds the unfinished work of other settings ({'; '.join(changed)[:1000]}). Run the command "
            "with those again, or delete the folder to begin anew."
        )


def count_rows(settings: RowSettings, source: CaptionedImages, is_local: bool) -> int | None:
    """Return how many rows a data set has, None if nobody needs to know. Raises `ValueError` if there are too few."""
    if not is_local and settings.rows is None:
        return None
    total = sum(1 for _ in source)
    if total == 0:
        raise ValueError(f"{settings.dataset} has no rows, expected at least one.")
    if settings.rows is not None and not 1 <= settings.rows <= total:
        raise ValueError(f"--rows is {settings.rows}, but {settings.dataset} has {total} rows, expected 1 to {total}.")
    return total
