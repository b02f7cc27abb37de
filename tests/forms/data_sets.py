"""The same two rows, a picture and its caption each, in every form that tools write: small files, made by tests."""

import base64
import csv
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from forms.pictures import PICTURE, TURNED, leftovers, png

PICTURES = [PICTURE, TURNED]
CAPTIONS = ["four blocks", 'four "blocks", turned\nü']
FILES = [png(), png(image=TURNED)]
BASE64 = [base64.b64encode(data).decode() for data in FILES]


def write_pictures(folder: Path) -> list[str]:
    """Write the pictures beside what systems leave behind, and return their names."""
    names = ["one.png", "sub dir/two%20ü.png"]
    for name, data in zip(names, FILES, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        for left, content in leftovers(Path(name).name).items():
            path = folder / Path(name).parent / left
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return names


def chat(question, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_json(folder: Path, images: list, name: str = "rows.json") -> str:
    """Write LLaVA's rows; a name that ends in l has a row a line."""
    rows = [
        {
            "id": number,
            "image": image,
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": caption}],
        }
        for number, (image, caption) in enumerate(zip(images, CAPTIONS, strict=True))
    ]
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text)
    return str(folder / name)


def write_chats(folder: Path, parts: list[dict]) -> str:
    """Write chats whose images stand in their content."""
    rows = [
        {"messages": chat([part, {"type": "text", "text": "what?"}], caption)}
        for part, caption in zip(parts, CAPTIONS, strict=True)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "chats.jsonl")


def write_parquet(folder: Path, name: str, images: pa.Array, text: pa.DataType | None = None) -> str:
    captions = pa.array(CAPTIONS, text or pa.string())
    pq.write_table(pa.table({name: images, "caption": captions}), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def large(value: pa.DataType) -> pa.DataType:
    """Return the type as polars writes it."""
    return pa.large_list(value)


def polars_chats(folder: Path) -> str:
    part = pa.struct({"type": pa.large_string(), "text": pa.large_string(), "image": pa.large_binary()})
    turn = pa.struct({"role": pa.large_string(), "content": large(part)})
    rows = [
        [
            {"role": "user", "content": [{"type": "image", "image": data}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": caption}]},
        ]
        for data, caption in zip(FILES, CAPTIONS, strict=True)
    ]
    pq.write_table(pa.table({"messages": pa.array(rows, large(turn))}), folder / "chats.parquet")
    return str(folder / "chats.parquet")


def image_feature(folder: Path) -> str:
    rows = datasets.Dataset.from_dict({"image": PICTURES, "caption": CAPTIONS})
    rows.cast_column("image", datasets.Image()).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def saved_to_disk(folder: Path) -> str:
    rows = datasets.Dataset.from_dict({"image": PICTURES, "caption": CAPTIONS})
    rows.cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    return str(folder / "saved")


def table(folder: Path, images: list[str], delimiter: str = ",") -> str:
    name = "rows.csv" if delimiter == "," else "rows.tsv"
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([("image", "caption"), *zip(images, CAPTIONS, strict=True)])
    return str(folder / name)


def image_folder(folder: Path) -> str:
    place = folder / "pictures"
    names = write_pictures(place)
    lines = [{"file_name": name, "caption": caption} for name, caption in zip(names, CAPTIONS, strict=True)]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(place)


def folder_with_json(folder: Path) -> str:
    write_json(folder, write_pictures(folder))
    return str(folder)


def web_dataset(folder: Path, name: str, form: int, prefix: str = "") -> str:
    """Write a tar as systems' own tools do: a folder's entry first, what they leave behind between the files."""
    with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w", format=form) as tar:
        entry = tarfile.TarInfo(f"{prefix}train")
        entry.type = tarfile.DIRTYPE
        tar.addfile(entry)
        for number, (data, caption) in enumerate(zip(FILES, CAPTIONS, strict=True)):
            key = f"{number:04}ü"
            parts = {f"{key}.png": data, **leftovers(f"{key}.png"), f"{key}.txt": caption.encode()}
            parts |= {"README.md": b"# data", f"{key}.aae": b"<plist>"}
            for part, content in parts.items():
                member = tarfile.TarInfo(f"{prefix}train/{part}")
                member.size = len(content)
                member.pax_headers = {"comment": "x" * 1000} if form == tarfile.PAX_FORMAT else {}
                tar.addfile(member, io.BytesIO(content))
    return str(folder / name)


def zipped(folder: Path) -> str:
    image_folder(folder)
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        for path in sorted((folder / "pictures").rglob("*")):
            if "@eaDir" not in path.parts:
                archive.write(path, path.relative_to(folder))
    shutil.rmtree(folder / "pictures")
    return str(folder / "rows.zip")


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
LARGE_STRUCT = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})

FORMS: dict[str, Callable[[Path], str]] = {
    "JSON, paths": lambda folder: write_json(folder, write_pictures(folder)),
    "JSON, percent and backslash in paths": lambda folder: write_json(
        folder, ["./one.png", write_pictures(folder)[1].replace("%", "%25").replace("/", "\\")]
    ),
    "JSON, file URLs": lambda folder: write_json(folder, [(folder / n).as_uri() for n in write_pictures(folder)]),
    "JSON, base64": lambda folder: write_json(folder, BASE64),
    "JSON lines, data URLs": lambda folder: write_json(
        folder, [f"data:image/png;base64,{text}" for text in BASE64], "rows.jsonl"
    ),
    "JSON, base64 in lines": lambda folder: write_json(folder, [base64.encodebytes(d).decode() for d in FILES]),
    "JSON, dictionaries of base64": lambda folder: write_json(
        folder, [{"bytes": text, "path": "elsewhere.png"} for text in BASE64]
    ),
    "JSON, dictionaries of paths": lambda folder: write_json(
        folder, [{"bytes": None, "path": name} for name in write_pictures(folder)]
    ),
    "chats, paths": lambda folder: write_chats(
        folder, [{"type": "image", "path": name} for name in write_pictures(folder)]
    ),
    "chats, images": lambda folder: write_chats(folder, [{"type": "image", "image": text} for text in BASE64]),
    "chats, image URLs": lambda folder: write_chats(
        folder, [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}} for text in BASE64]
    ),
    "chats, image URLs as text": lambda folder: write_chats(
        folder, [{"type": "image_url", "image_url": name} for name in write_pictures(folder)]
    ),
    "Parquet, datasets' images": image_feature,
    "Parquet, bytes": lambda folder: write_parquet(folder, "image", pa.array(FILES)),
    "Parquet, base64": lambda folder: write_parquet(folder, "image", pa.array(BASE64)),
    "Parquet, base64 as bytes": lambda folder: write_parquet(folder, "image", pa.array([t.encode() for t in BASE64])),
    "Parquet, paths": lambda folder: write_parquet(folder, "image", pa.array(write_pictures(folder))),
    "Parquet, dictionaries of bytes": lambda folder: write_parquet(
        folder, "image", pa.array([{"bytes": data, "path": "elsewhere.png"} for data in FILES], STRUCT)
    ),
    "Parquet, dictionaries of paths": lambda folder: write_parquet(
        folder, "image", pa.array([{"bytes": None, "path": name} for name in write_pictures(folder)], STRUCT)
    ),
    "polars, bytes": lambda folder: write_parquet(
        folder, "image", pa.array(FILES, pa.large_binary()), pa.large_string()
    ),
    "polars, lists of bytes": lambda folder: write_parquet(
        folder, "images", pa.array([[data] for data in FILES], large(pa.large_binary())), pa.large_string()
    ),
    "polars, base64": lambda folder: write_parquet(folder, "image", pa.array(BASE64, pa.large_string())),
    "polars, dictionaries": lambda folder: write_parquet(
        folder, "image", pa.array([{"bytes": data, "path": "elsewhere.png"} for data in FILES], LARGE_STRUCT)
    ),
    "polars, lists of dictionaries": lambda folder: write_parquet(
        folder, "images", pa.array([[{"bytes": data, "path": None}] for data in FILES], large(LARGE_STRUCT))
    ),
    "polars, chats": polars_chats,
    "saved by datasets": saved_to_disk,
    "CSV, paths": lambda folder: table(folder, write_pictures(folder)),
    "CSV, base64": lambda folder: table(folder, BASE64),
    "TSV, data URLs": lambda folder: table(folder, [f"data:image/png;base64,{text}" for text in BASE64], "\t"),
    "folder of images": image_folder,
    "folder with JSON": folder_with_json,
    "zip": zipped,
    "folder with a zip": lambda folder: str(Path(zipped(folder)).parent),
    "WebDataset": lambda folder: web_dataset(folder, "rows.tar", tarfile.GNU_FORMAT),
    "WebDataset, packed, of macOS": lambda folder: web_dataset(folder, "rows.tar.gz", tarfile.PAX_FORMAT, "./"),
}
if int(pa.__version__.split(".")[0]) >= 26:  # pyarrow 21 cannot read them from Parquet
    FORMS["polars, views"] = lambda folder: write_parquet(
        folder, "image", pa.array(FILES, pa.binary_view()), pa.string_view()
    )
