"""`tinyalign bank build` and `bank add`: from a data set to rows of a memory bank, in steps that survive a kill."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin, __version__, set_seed

from ...modeling_tinyalign import MemoryBank, ValueEncoder, ValueEncoderConfig
from ...modeling_tinyalign.bank_builder import RowEncoder, check_row_settings, evaluating
from ...modeling_tinyalign.bank_folders import scratch_folder
from ...modeling_tinyalign.bank_storage import Packed
from ..arguments.alignment import Stage1Config
from ..data.chats import BadRow
from ..data.images import CaptionedImages, fingerprint_files
from ..data.rows import batch_size_of
from ..disk import keeping
from ..models import load_model
from .encode import Parts
from .log import LEFT_OUT_NAME, changing, count_kinds, is_last_change, open_bank, read_log, save_change
from .value_encoder_training import ValueEncoderTrainingConfig, train_value_encoder

SETTINGS_NAME = "settings.json"
# What the value encoder is trained on.
ENCODER_IMAGES, ENCODER_CAPTIONS = 256, 10_000


@dataclass
class RowSettings:
    """Which model encodes which rows; the fields are the options of `tinyalign bank add`."""

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

    def run_config(self) -> Stage1Config:
        """As `tinyalign train` has it."""
        shared = set(Stage1Config.__dataclass_fields__) & set(RowSettings.__dataclass_fields__)
        return Stage1Config(output_dir="unused", **{name: vars(self)[name] for name in shared})

    def constants(self) -> dict[str, str]:
        """`set` as a dictionary. Raises `ValueError` for what is not `column=value`."""
        for text in self.set:
            if not text.partition("=")[0] or "=" not in text:
                raise ValueError(f"--set is {text!r}, expected COLUMN=VALUE, license=cc-by-4.0 say.")
        return {text.partition("=")[0]: text.partition("=")[2] for text in self.set}


@dataclass
class BuildSettings(RowSettings):
    """The fields are the options of `tinyalign bank build`."""

    keep: list[str] = field(default_factory=list)
    like: str | None = None
    value_encoder: str | None = None
    value_encoder_steps: int = ValueEncoderTrainingConfig().steps
    key_grid: int = 1
    whiten_dim: int | None = None
    packed: Packed | None = None
    thumbnail_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        check_row_settings(self.keep, 1, self.thumbnail_size or None)
        if self.value_encoder_steps < 0:
            raise ValueError(f"value_encoder_steps is {self.value_encoder_steps}, expected 0 or more.")

    def check_like(self, columns: list[str]):
        """Raises `ValueError` for settings that the bank `like`, which keeps these columns, has made already."""
        others = vars(BuildSettings(self.dataset, keep=self.keep if sorted(self.keep) == sorted(columns) else []))
        names = ("keep", "value_encoder", "value_encoder_steps", "key_grid", "whiten_dim", "thumbnail_size")
        found = [f"--{name}" for name in names if vars(self)[name] != others[name]]
        if found:
            raise ValueError(
                f"The bank is to be --like {self.like}, which keeps {columns} and has encoders and thumbnails of its "
                f"own: leave {', '.join(found)} out."
            )


def build_bank(settings: BuildSettings, out: str | os.PathLike, ray: int | None = None):
    """
    Builds a bank in the folder `out` and says what came of it. Killed, it goes on where it stopped when it is called
    again with the same settings, and ends with the same bank.

    Args:
        ray: Encode with this many actors of a Ray cluster; 0: one for each of its GPUs, or else of its CPUs. The bank
            is the same.

    Raises:
        ImportError: Ray is not installed.
        ValueError: The data, the model or the settings do not fit, `out` is another bank, another process builds it,
            or no row is usable.
        OSError: A file cannot be read, or written; what was encoded is kept.
    """
    name, out = out, Path(out).resolve()
    with changing(out):
        kept = asdict(settings) | {"files": fingerprint_files(settings.dataset)}
        work = out.with_name(f".{out.name}.build")
        log = read_log(out)
        if log and log[0].get("settings") == kept:
            discard(work)
            print(f"{name} is complete: there is nothing to do.")
            return
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise ValueError(
                f"{out} is there already and was not made by this command, with these data. Choose another --out, or "
                "delete it; `tinyalign bank add` puts rows into a bank."
            )
        like = None if settings.like is None else MemoryBank.from_pretrained(settings.like)
        keep = settings.keep
        if like is not None:
            keep = like.config["columns"]
            settings.check_like(keep)
        run = Encoding.begin(settings, work, kept, keep, like)
        if like is None:
            with keeping(work, "what was encoded"):
                value_encoder = prepare_value_encoder(run, settings)
            encoder = RowEncoder.for_new_bank(
                run.model,
                run.processor,
                value_encoder,
                settings.key_grid,
                keep_columns=keep,
                batch_size=run.batch_size,
                thumbnail_size=settings.thumbnail_size or None,
                packed=settings.packed,
            )
        else:
            encoder = like.row_encoder(run.model, run.processor, batch_size=run.batch_size)
        with keeping(work, "what was encoded"):
            parts = run.encode(encoder, set(), ray)
            if parts.rows == 0:
                discard(work)
                raise ValueError(f"{settings.dataset} has no usable row. {_examples(parts)}")
            if like is None:
                bank = MemoryBank.from_encoded(encoder, parts.batches, settings.whiten_dim)
            else:
                bank = like.of_encoded(parts.batches(), settings.packed)
            save_change(bank, out, {"change": "build", "settings": kept}, parts.left_out)
        discard(work)
    print(f"{name}: {len(bank)} rows; {count_kinds(parts.left_out)}{_listed(name, parts)}.")


def add_rows(settings: RowSettings, folder: str | os.PathLike, ray: int | None = None):
    """
    Adds the rows of a data set to the bank in `folder` and says what came of it; goes on where it was killed.

    Raises as [`build_bank`].
    """
    name, folder = folder, Path(folder).resolve()
    with changing(folder):
        bank = open_bank(folder)
        kept = asdict(settings) | {"files": fingerprint_files(settings.dataset), "bank": bank.config["sha256"]}
        work = folder.with_name(f".{folder.name}.add")
        if (work / SETTINGS_NAME).is_file() and _read(work)["settings"]["bank"] != bank.config["sha256"]:
            same = kept | {"bank": _read(work)["settings"]["bank"]}
            complete = is_last_change(folder, json.loads(json.dumps({"change": "add", "settings": same})))
            discard(work)
            if complete:
                print(f"{name}: {len(bank)} rows; these were added before, there is nothing to do.")
                return
        run = Encoding.begin(settings, work, kept, bank.config["columns"], bank)
        encoder = bank.row_encoder(run.model, run.processor, batch_size=run.batch_size, num_rows=len(bank))
        seen = {bytes.fromhex(image) for image in bank._table["source_id"].to_pylist()}
        with keeping(work, "what was encoded"):
            parts = run.encode(encoder, seen, ray)
            if parts.rows == 0 and not any(row["reason"].startswith("duplicate") for row in parts.left_out):
                discard(work)
                raise ValueError(f"{settings.dataset} has no usable row. {_examples(parts)}")
            if parts.rows:
                bank = bank.with_encoded(parts.batches())
                save_change(bank, folder, {"change": "add", "settings": kept}, parts.left_out)
        discard(work)
    print(f"{name}: {len(bank)} rows, {parts.rows} of them new; {count_kinds(parts.left_out)}{_listed(name, parts)}.")


@dataclass
class Encoding:
    """What encodes the rows of a data set, and where the parts of them go."""

    settings: RowSettings
    work: Path
    model: PreTrainedModel
    processor: ProcessorMixin
    source: CaptionedImages
    total: int | None
    batch_size: int

    @classmethod
    def begin(
        cls, settings: RowSettings, work: Path, kept: dict, keep: list[str], bank: MemoryBank | None
    ) -> "Encoding":
        """
        Opens model and data, and the folder `work`, which says with `kept` what it is of.

        Raises `ValueError` when the folder is of something else.
        """
        config = settings.run_config()
        set_seed(settings.seed)
        model, processor = load_model(config, bank)
        model.to(config.device).eval()
        source = CaptionedImages(config, settings.caption_column, keep, settings.constants())
        batch_size = settings.batch_size or batch_size_of(config)
        versions = {"torch": torch.__version__, "transformers": __version__}
        kept = {
            name: value for name, value in kept.items() if name not in ("whiten_dim", "packed")
        }  # of the last step
        kept = json.loads(json.dumps(kept | {"tower": _fingerprint(model), "batch_size": batch_size} | versions))
        if (work / SETTINGS_NAME).is_file() and len(list(work.iterdir())) > 1:
            found = _read(work)
            changed = [
                f"{name}: {found['settings'].get(name)!r} then, {value!r} now"
                for name, value in kept.items()
                if found["settings"].get(name) != value
            ]
            if changed:
                raise ValueError(
                    f"{work} holds the unfinished work of other settings ({'; '.join(changed)[:1000]}). Run the "
                    "command with those again, or delete the folder to begin anew."
                )
            return cls(settings, work, model, processor, source, found["total"], batch_size)
        total = source.count() if kept["files"] or settings.rows is not None else None
        if total == 0:
            raise ValueError(f"{settings.dataset} has no rows, expected at least one.")
        if settings.rows is not None and not 1 <= settings.rows <= total:
            raise ValueError(
                f"--rows is {settings.rows}, but {settings.dataset} has {total} rows, expected 1 to {total}."
            )
        work.mkdir(exist_ok=True)
        with keeping(work, "what was encoded"):
            fresh = work / f"{SETTINGS_NAME}.new"
            fresh.write_text(json.dumps({"settings": kept, "total": total}, indent=1), encoding="utf-8")
            fresh.replace(work / SETTINGS_NAME)
        return cls(settings, work, model, processor, source, total, batch_size)

    def encode(self, encoder: RowEncoder, seen: set[bytes], ray: int | None) -> Parts:
        """The parts, all of them; images in `seen` are left out, unless they may come again."""
        parts, settings = Parts(self.work), self.settings
        duplicates = None if settings.keep_duplicates else seen
        arguments = encoder, self.source, duplicates, settings.rows, settings.seed, self.total
        if ray is not None:
            from .ray import encode_on_cluster

            encode_on_cluster(parts, ray, *arguments)
        else:
            with evaluating(self.model, encoder.value_encoder):
                parts.encode(*arguments)
        return parts


def prepare_value_encoder(run: Encoding, settings: BuildSettings) -> ValueEncoder:
    """
    The value encoder of a bank or folder that the settings name, or a new one, trained on some rows of the data, once.

    Raises `ValueError` when no row is usable.
    """
    if settings.value_encoder is not None:
        path = Path(settings.value_encoder)
        if path.is_dir() and not (path / "bank_config.json").is_file():
            return ValueEncoder.from_pretrained(path).eval()
        return MemoryBank._open(settings.value_encoder).value_encoder
    folder = run.work / "value_encoder"
    if folder.is_dir():
        return ValueEncoder.from_pretrained(folder).eval()
    images, captions = [], []
    for number, row in islice(run.source, 2 * ENCODER_CAPTIONS):
        try:
            if len(images) < ENCODER_IMAGES:
                images.append(run.source.read(number, row)["image"])
            captions.append(run.source.describe(row)["caption"])
        except BadRow:
            continue
        if len(captions) == ENCODER_CAPTIONS:
            break
    if not images:
        raise ValueError(f"{settings.dataset} has no usable row: `tinyalign data check` says what is wrong with each.")
    features = []
    with evaluating(run.model):
        for start in range(0, len(images), run.batch_size):
            batch = images[start : start + run.batch_size]
            pixels = run.processor.image_processor(images=batch, return_tensors="pt")["pixel_values"]
            features.append(run.model.get_vision_features(pixels).half().cpu())
    features, config = torch.cat(features).numpy(), run.model.config
    set_seed(settings.seed)
    heads = math.gcd(8, config.latent_dim)
    encoder = ValueEncoder(
        ValueEncoderConfig(
            num_latents=config.num_latents,
            latent_dim=config.latent_dim,
            latents_per_word=config.latents_per_word,
            num_self_attention_heads=heads,
            num_cross_attention_heads=heads,
            num_vision_tokens=features.shape[1],
            vision_feature_size=features.shape[2],
        )
    ).to(run.model.device)
    if settings.value_encoder_steps:
        training = ValueEncoderTrainingConfig(steps=settings.value_encoder_steps, seed=settings.seed)
        train_value_encoder(encoder, features, captions, training)
    fresh = run.work / "value_encoder.new"
    encoder.save_pretrained(fresh)
    fresh.replace(folder)
    return ValueEncoder.from_pretrained(folder).to(run.model.device).eval()


def discard(work: Path):
    """
    Deletes the work of a command. `settings.json` goes last: with it, a command that is killed meanwhile and run again
    knows whose work is left. What else there was is never seen in part.
    """
    if not work.is_dir():
        return
    with scratch_folder(work.parent, f"{work.stem}.new-") as scratch:  # as of the bank, which clears up after a kill
        for path in work.iterdir():
            if path.name != SETTINGS_NAME:
                path.rename(scratch / path.name)
    shutil.rmtree(work)


def _read(work: Path) -> dict:
    return json.loads((work / SETTINGS_NAME).read_text(encoding="utf-8"))


def _fingerprint(model: PreTrainedModel) -> str:
    """Of the tower's weights and settings."""
    digest = hashlib.sha256(model.config.vision_config.to_json_string().encode())
    for name, tensor in sorted(model.base_model.vision_tower.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _examples(parts: Parts) -> str:
    lines = [f"row {row['row']}: {row['reason']}" for row in parts.left_out[:5]]
    return "\n  ".join([f"{count_kinds(parts.left_out)}:", *lines])


def _listed(folder: str | os.PathLike, parts: Parts) -> str:
    return f", listed in {Path(folder, LEFT_OUT_NAME)}" if parts.left_out else ""
