"""Data sets as people have them: each of them is the same rows, however it is named, stored and read."""

import csv
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub
from huggingface_hub import HfApi
from PIL import Image

from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.data.chats import images_of
from tinyalign_vlm.training.data.check import check_rows, row_reader, training_data
from tinyalign_vlm.training.data.files import open_rows
from tinyalign_vlm.training.data.images import CaptionedImages
from tinyalign_vlm.training.data.preparation import evaluation_settings

COLOURS = {"red": "a red square", "blue": "NA"}
PAIRS = [("red", "a red square"), ("blue", "NA")]
ROWS = [{"image": f"{name}.png", "caption": caption} for name, caption in COLOURS.items()]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Two pictures, whose colours are their names, in the folder that a test runs in."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path)
    return tmp_path


def save_images(folder: Path, names=tuple(COLOURS)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (12, 8), name).save(folder / f"{name}.png")


def config(dataset, **settings) -> AlignmentConfig:
    settings = {"answer_column": "caption", "prompt": "what?", **settings}
    return AlignmentConfig(output_dir="out", dataset=str(dataset), disable_tqdm=True, **settings)


def colour_of(image) -> str:
    content = image["bytes"] if isinstance(image, dict) else None
    if content is None:
        path = image["path"] if isinstance(image, dict) else image
        content = Path(path).read_bytes()
    red = Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0))[0] > 99
    return "red" if red else "blue"


def pairs(rows) -> list[tuple[str, str]]:
    """The colour of each row's image, and what the assistant says of it first."""
    found = []
    for row in rows:
        answer = next(turn for turn in row["messages"] if turn["role"] == "assistant")
        found.append((colour_of(images_of(row)[0]), answer["content"][0]["text"]))
    return found


def read(dataset, processor, **settings) -> list[tuple[str, str]]:
    """What training reads, of which the check, streaming and the reader of banks must read the same."""
    rows, check = check_rows(config(dataset, **settings))
    assert check.problems == {}
    found = pairs(rows)
    streamed = training_data(config(dataset, streaming=True, max_steps=1, **settings), processor)
    assert pairs(streamed) == found
    source = CaptionedImages(config(dataset, **settings), settings.get("answer_column"), [], {})
    bank = [source.read(number, row) for number, row in source]
    red = ["red" if row.image.getpixel((0, 0))[0] > 99 else "blue" for row in bank]
    assert list(zip(red, (row.caption for row in bank), strict=True)) == found
    return found


def write_table(path: str, rows=ROWS, **settings):
    with open(path, "w", newline="", encoding=settings.pop("encoding", "utf-8")) as file:
        table = csv.DictWriter(file, rows[0].keys(), **settings)
        table.writeheader()
        table.writerows(rows)


def write_lines(path: str, rows=ROWS, end="\n", encoding="utf-8"):
    Path(path).write_bytes("".join(json.dumps(row) + end for row in rows).encode(encoding))


def write_tar(path: str):
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(ROWS):
            parts = {"png": Path(row["image"]).read_bytes(), "json": json.dumps({"caption": row["caption"]}).encode()}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{number:05}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(path: str):
    stored = [{**row, "image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in ROWS]
    datasets.Dataset.from_list(stored).cast_column("image", datasets.Image()).to_parquet(path)


FILES = {
    "rows.json": lambda name: Path(name).write_text(json.dumps(ROWS, indent=1)),
    "bom.json": lambda name: Path(name).write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "data.json": lambda name: Path(name).write_text(json.dumps({"version": 1, "data": ROWS}, indent=1)),
    "line.json": lambda name: Path(name).write_text(json.dumps({"rows": ROWS})),
    "columns.json": lambda name: pd.DataFrame(ROWS).to_json(name),
    "index.json": lambda name: pd.DataFrame(ROWS, index=["a", "b"]).to_json(name, orient="index"),
    "crlf.jsonl": lambda name: write_lines(name, end="\r\n", encoding="utf-8-sig"),
    "rows.jsonl": write_lines,
    "rows.jsonl.gz": lambda name: Path(name).write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "rows.json.gz": lambda name: Path(name).write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv": write_table,
    "bom.csv": lambda name: write_table(name, encoding="utf-8-sig"),
    "excel.csv": lambda name: write_table(name, delimiter=";"),
    "results.csv": lambda name: Path(name).write_text(
        "image| caption\n" + "".join(map("{image}| {caption}\n".format_map, ROWS))
    ),
    "late.csv": lambda name: Path(name).write_text("\n\nimage,caption\nred.png,a red square\nblue.png,NA\n\n"),
    "rows.tsv": lambda name: write_table(name, delimiter="\t", lineterminator="\n"),
    "metadata.csv": lambda name: write_table(
        name, [{"file_name": row["image"], "caption": row["caption"]} for row in ROWS]
    ),
    "rows.tar": write_tar,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_a_pattern_and_a_folder_are_the_same_rows(name, place, processor):
    FILES[name](name)
    assert read(name, processor) == PAIRS
    assert read(f"{place}/{name[:3]}*.{name.partition('.')[2]}", processor) == PAIRS
    assert read(place, processor) == PAIRS
    (place / "README.md").write_text("# rows")
    assert read(".", processor) == PAIRS


def test_what_spark_writes(place, processor):
    """A folder called as a file, with parts of which some are empty, and folders called as splits."""
    stored = [{"bytes": Path(row["image"]).read_bytes(), "path": None} for row in ROWS]
    table = pa.table({"image": stored, "caption": list(COLOURS.values())})
    for part, rows in enumerate((table.slice(0, 0), table)):
        for folder in ("rows.parquet", "parts/split=train", "parts/split=test"):
            (place / "spark" / folder).mkdir(parents=True, exist_ok=True)
            pq.write_table(rows, place / "spark" / folder / f"part-{part}.parquet")
    assert read("spark/rows.parquet", processor) == read("spark/parts", processor) == PAIRS
    shutil.rmtree("spark/parts")
    assert read("spark", processor) == PAIRS
    Path("spark/rows.parquet/part-1.parquet").unlink()
    with pytest.raises(ValueError, match="^spark has no rows, expected at least one"):
        check_rows(config("spark"))


def test_a_tar_that_is_no_web_dataset(place, processor):
    write_lines("metadata.jsonl", [{"file_name": row["image"], "caption": row["caption"]} for row in ROWS])
    for kind in ("tar", "gztar", "xztar"):
        name = shutil.make_archive(str(place / "all"), kind, place)
        message = r"^\S*all.tar\S* has ./metadata.jsonl in it, .*: unpack the tar, and name its folder.$"
        for streaming in ({}, {"streaming": True, "max_steps": 1}):
            with pytest.raises(ValueError, match=message):
                training_data(config(name, **streaming), processor)
        Path(name).unlink()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.zip", b"", r"rows.zip cannot be read \(File is not a zip file\)"),
        ("rows.tar", b"", r"rows.tar cannot be read \(file could not be opened successfully\)"),
        ("rows.json", b"[" * 100_000, r"rows.json cannot be read \(maximum recursion depth"),
        ("rows.json", b"5", r"rows.json cannot be read \(it holds the int 5\)"),
        (
            "rows.csv",
            b'image,caption\nred.png,"a red\nblue.png,blue\n',
            "rows.csv cannot be read .line 3: a quote inside a field, or one that is not closed: put",
        ),
        (
            "rows.tsv",
            b'image\tcaption\nred.png\t"Stop" sign\n',
            "rows.tsv cannot be read .line 2: a quote inside a field",
        ),
        ("rows.csv", b"image\n\xff", r"rows.csv cannot be read \('utf-8' .* in UTF-8"),
        ("empty/.hidden", b"", "^empty has no images, rows or .zip in it, expected .json"),
    ],
)
def test_what_cannot_be_read_is_said_once_in_a_line(name, content, message, place, processor):
    (place / "empty").mkdir()
    Path(name).write_bytes(content)
    name = name.removesuffix("/.hidden")
    for streaming in ({}, {"streaming": True, "max_steps": 1}):
        with pytest.raises(ValueError, match=message) as error:
            training_data(config(name, **streaming), processor)
        assert len(re.findall(r"\bexpected", str(error.value))) == 1 and len(str(error.value).splitlines()) == 1


def test_a_quote_that_is_closed_lines_later_is_a_bad_row(place, processor):
    Path("rows.tsv").write_text('image\tcaption\nred.png\t"Stop sign\nblue.png\tblue"\nred.png\t"a ""red"" one"\n')
    rows, check = check_rows(config("rows.tsv"))
    assert pairs(rows) == [("red", 'a "red" one')] and "put text that has the separator in it" in check.problems[0]


def test_a_packed_table(place, processor):
    write_table("rows.csv")
    Path("rows.csv.gz").write_bytes(gzip.compress(Path("rows.csv").read_bytes()))
    assert read("rows.csv.gz", processor) == PAIRS


def test_a_repository_is_the_same_rows(place, tmp_path, monkeypatch):
    """In a process of its own: huggingface_hub reads the address of the Hub when it is imported."""
    repositories = (
        "rows.json",
        "rows.jsonl.gz",
        "rows.csv",
        "metadata.csv",
        "rows.tar",
        "rows.parquet",
        "rows.json",
        "rows.jsonl",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with FakeHub() as hub:
        api = HfApi(endpoint=hub.url, token="hf_owner")
        for number, name in enumerate(repositories):
            save_images(place / f"{number}")
            monkeypatch.chdir(place / f"{number}")
            FILES[name](name)
            if number == 0:  # as cameras write them
                for picture in Path().glob("*.png"):
                    picture.rename(picture.with_suffix(".PNG"))
                Path(name).write_text(Path(name).read_text().replace(".png", ".PNG"))
            if number >= 6:  # the card says which files
                Path("README.md").write_text(f"---\nconfigs:\n- config_name: some\n  data_files: {name}\n---\n")
            api.create_repo(f"owner/{number}", repo_type="dataset")
            api.upload_folder(repo_id=f"owner/{number}", repo_type="dataset", folder_path=".")
        monkeypatch.chdir(place / "0")
        run = subprocess.run(
            [sys.executable, __file__, *(f"owner/{number}" for number in range(len(repositories)))],
            env={
                **os.environ,
                **hub.environment(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "HF_DATASETS_OFFLINE": "0",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert found == [[list(pair) for pair in PAIRS]] * 2 * len(repositories)


def test_a_folder_of_splits(place, processor):
    for split in ("train", "val"):
        save_images(place / split)
        write_lines(f"{split}/chats.jsonl", ROWS[:1] if split == "val" else ROWS)
    assert read(place, processor) == PAIRS
    assert read(place, processor, dataset_split="validation") == PAIRS[:1]
    with pytest.raises(ValueError, match="no split 'test', found train, validation"):
        check_rows(config(place, dataset_split="test"))


def test_saved_to_disk(place, processor):
    rows = datasets.Dataset.from_list(ROWS).cast_column("image", datasets.Image())
    rows.save_to_disk("one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk("several")
    assert read("one", processor) == read("several", processor) == PAIRS
    assert read("several", processor, dataset_split="test") == PAIRS[1:]
    with pytest.raises(ValueError, match="no split 'validation', found test, train"):
        check_rows(config("several", dataset_split="validation"))


def test_names_of_classes(place, processor):
    for name in COLOURS:
        save_images(place / "sorted" / f"a {name} thing", [name])
    expected = [("blue", "a blue thing"), ("red", "a red thing")]
    assert read("sorted", processor, answer_column="label") == expected
    rows = datasets.load_dataset("imagefolder", data_dir="sorted", split="train")
    rows.to_parquet("classes.parquet")
    assert read("classes.parquet", processor, answer_column="label") == expected
    label = datasets.ClassLabel(names=["none", "cat", "dog"])
    several = rows.remove_columns("label").add_column("labels", [[2, 1], [1]], feature=datasets.List(label))
    several.to_parquet("lists.parquet")
    assert read("lists.parquet", processor, answer_column="labels") == [("blue", "dog"), ("red", "cat")]


def save_classes(folder: Path, names=("circle", "square")):
    """Save a red picture of the first class and a blue one of the second."""
    for colour, name in zip(COLOURS, names, strict=True):
        save_images(folder / name, [colour])


@pytest.mark.parametrize("name", ["[1] a*?", "plain", "train", "b[a-c]"])
def test_a_folder_or_a_pattern_of_classes(name, place, processor):
    save_classes(place / "data" / name)
    expected = [("red", "circle"), ("blue", "square")]
    assert read(f"data/{name}", processor, answer_column="label") == expected
    assert read(f"{place}/data/*/*/*.png", processor, answer_column="label") == expected
    (place / "data" / name / "circle").rename(place / "data" / name / "[0]")
    assert read(f"data/{name}", processor, answer_column="label") == [("red", "[0]"), ("blue", "square")]


def test_classes_that_are_called_as_splits(place, processor):
    save_classes(place / "classes", ("station", "train"))
    assert read("classes", processor, answer_column="label") == [("red", "station"), ("blue", "train")]
    save_classes(place / "splits/train", ("cat", "test"))
    save_classes(place / "splits/val", ("dog", "test"))
    assert read("splits", processor, answer_column="label") == [("red", "cat"), ("blue", "test")]
    found = read("splits", processor, answer_column="label", dataset_split="validation")
    assert found == [("red", "dog"), ("blue", "test")]
    with pytest.raises(ValueError, match="no split 'test', found train, validation"):
        check_rows(config("splits", dataset_split="test"))


def test_a_pattern_that_no_file_has(place):
    with pytest.raises(ValueError, match=r"photos/\*\.jpg does not exist"):
        check_rows(config("photos/*.jpg"))


@pytest.mark.parametrize("prefix", ["", "data/"])
@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.jsonl.gz", "metadata.csv"])
def test_a_zip_with_rows_and_pictures(name, prefix, place, processor):
    FILES[name](name)
    with zipfile.ZipFile("all.zip", "w") as archive:
        for file in (name, *(row["image"] for row in ROWS)):
            archive.write(file, prefix + file)
    for file in (name, *(row["image"] for row in ROWS)):
        Path(file).unlink()
    assert read("all.zip", processor) == read(place, processor) == PAIRS


def test_a_zip_of_classes_and_a_zip_that_has_changed(place, processor):
    for names in (("circle", "square"), ("eight", "square")):
        save_classes(place / names[0], names)
        shutil.make_archive("all", "zip", names[0])
        assert read("all.zip", processor, answer_column="label") == [("red", names[0]), ("blue", "square")]
    with zipfile.ZipFile("rot.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.json", json.dumps(list(range(1000))))
    rot = bytearray(Path("rot.zip").read_bytes())
    rot[60:90] = bytes(30)
    Path("rot.zip").write_bytes(rot)
    with pytest.raises(ValueError, match="rot.zip cannot be read .*expected a whole .zip"):
        check_rows(config("rot.zip"))
    Path("all.zip").write_bytes(Path("all.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match="all.zip cannot be read"):
        check_rows(config("all.zip"))


def test_a_stream_of_several_files_is_not_counted(place, processor, caplog):
    """Each file would be from 0 on: rows are named by their ids, and no worker leaves out those of its own files."""
    for file in (0, 1):
        rows = [{**row, "id": f"{file}-{number}"} for number, row in enumerate(ROWS)]
        rows[-1]["caption"] = "" if file else rows[-1]["caption"]
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = {"streaming": True, "max_steps": 1}
    assert len(list(training_data(config("*.jsonl", **stream), processor))) == 3
    assert "Skipped a row of *.jsonl: " in caplog.text and "(id 1-1)" in caplog.text
    assert pairs(training_data(config("0.jsonl", **stream, dataset_split="train[1:]"), processor)) == PAIRS[1:]
    several = config("*.jsonl", **stream, dataset_split="train[1:]", dataloader_num_workers=2)
    with pytest.raises(ValueError, match="a stream of 2 files that 2 workers .* share.*dataloader_num_workers to 0"):
        open_rows(several)


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "rows.tar"])
def test_a_part_of_a_split(name, place, processor):
    FILES[name](name)
    assert read(name, processor, dataset_split="train[:1]") == PAIRS[:1]
    assert read(name, processor, dataset_split="train[1:]") == PAIRS[1:]
    assert read(name, processor, dataset_split="train[1:]+train[:1]") == PAIRS[::-1]
    assert read(name, processor, dataset_split="train + train[:1]") == [*PAIRS, PAIRS[0]]
    for part in ("train[50%:]", "train[-1:]", "train[:1]+train[50%:]"):
        assert pairs(check_rows(config(name, dataset_split=part))[0])[-1:] == PAIRS[1:]
        with pytest.raises(ValueError, match=r"^dataset_split is .* not counted: .* as in train\[100:200\], or no"):
            open_rows(config(name, dataset_split=part, streaming=True, max_steps=1))
    for wrong in ("train[first]", "train[", "train[]", "train[1]x"):
        with pytest.raises(ValueError, match=r"^dataset_split is .*expected a part of 2 rows, as in train\[:100\] or"):
            check_rows(config(name, dataset_split=wrong))


CAPTIONS = [["a red square", "something red"], ["NA", "something blue"]]


@pytest.mark.parametrize(
    "captions",
    [CAPTIONS, [[{"raw": text} for text in row] for row in CAPTIONS], [[None, "", *row] for row in CAPTIONS]],
)
def test_the_first_of_several_captions(captions, place, processor):
    rows = [{**row, "caption": several} for row, several in zip(ROWS, captions, strict=True)]
    write_lines("rows.jsonl", rows)
    assert read("rows.jsonl", processor) == PAIRS
    datasets.Dataset.from_list(rows).to_parquet("rows.parquet")
    assert read("rows.parquet", processor) == PAIRS
    write_table("flickr.csv", [{**row, "caption": json.dumps(text)} for row, text in zip(ROWS, CAPTIONS, strict=True)])
    assert read("flickr.csv", processor) == PAIRS
    write_table("pandas.csv", [{**row, "caption": str(text)} for row, text in zip(ROWS, CAPTIONS, strict=True)])
    assert read("pandas.csv", processor) == PAIRS
    write_table(
        "numpy.csv", [{**row, "caption": str(text).replace(",", "")} for row, text in zip(ROWS, CAPTIONS, strict=True)]
    )
    problem = check_rows(config("numpy.csv"))[1].problems[0]
    assert problem.startswith("no caption: the caption is \"['a red square' 'something red']\" (no commas in it)")


@pytest.mark.parametrize("name", ["raw", "caption", "text", "answer", "en"])
def test_captions_in_dictionaries(name, place, processor):
    write_lines("rows.jsonl", [{**row, "caption": [{"id": 1, name: row["caption"]}]} for row in ROWS])
    if name == "en":
        assert (
            "no chat: a turn of 'assistant' has the text {'en': 'NA', 'id': 1}, expected"
            in check_rows(config("rows.jsonl"))[1].problems[1]
        )
    else:
        assert read("rows.jsonl", processor) == PAIRS


def test_parts_of_openais_responses(place, processor):
    def chat(name: str, caption: str) -> list[dict]:
        asked = [{"type": "input_image", "image_url": f"{name}.png"}, {"type": "input_text", "text": "what?"}]
        answer = [{"type": "output_text", "text": caption}]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    write_lines("rows.jsonl", [{"messages": chat(*pair)} for pair in PAIRS])
    assert read("rows.jsonl", processor, answer_column=None, prompt=None) == PAIRS


def test_texts_of_user_and_assistant(place, processor):
    rows = [
        {
            "images": [{"bytes": Path(row["image"]).read_bytes(), "path": None}],
            "texts": [
                {"user": "what?", "assistant": row["caption"], "source": "x"},
                {"user": "and?", "assistant": "no", "source": "x"},
            ],
        }
        for row in ROWS
    ]
    features = datasets.Dataset.from_list(rows).features | {"images": datasets.List(datasets.Image())}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet("rows.parquet")
    settings = {"answer_column": None, "prompt": None}
    assert read("rows.parquet", processor, **settings) == PAIRS
    good = check_rows(config("rows.parquet", **settings))[0]
    assert [turn["role"] for turn in good[0]["messages"]] == ["user", "assistant"] * 2
    assert [part["type"] for part in good[0]["messages"][0]["content"]] == ["image", "text"]


@pytest.mark.parametrize("indent", [None, 1])
def test_captions_of_coco(indent, place, processor):
    save_images(place / "train2017")
    captions = [
        {"id": 10, "image_id": 2, "caption": "NA"},
        {"id": 11, "image_id": 1, "caption": "a red square"},
        {"id": 12, "image_id": 1, "caption": "something red"},
    ]
    images = [{"id": 1, "file_name": "red.png"}, {"id": 2, "file_name": "blue.png"}]
    content = {"info": {"year": 2017}, "licenses": [{"id": 1}], "images": images, "annotations": captions}
    (place / "annotations").mkdir()
    Path("annotations/captions_train2017.json").write_text(json.dumps(content, indent=indent))
    found = read("annotations/captions_train2017.json", processor, image_folder="train2017")
    assert found == [("blue", "NA"), ("red", "a red square"), ("red", "something red")]


@pytest.mark.parametrize(
    "content", ['{"a": {"b": 1},\n "c": 2}', '{\n "image": [\n  "red.png"', '{"a": [{"x": 1}], "b": [{"x": 1}]}', "5"]
)
def test_other_json_is_refused_in_one_line(content, place):
    Path("rows.json").write_text(content)
    try:
        rows, check = check_rows(config("rows.json"))
    except ValueError as error:
        assert "rows.json cannot be read" in str(error) and len(str(error).splitlines()) == 1
    else:
        assert len(rows) == 0 and len(check.problems) == 1 and max(map(len, check.problems.values())) <= 300


NAMES = ["a b.png", "a%20b.png", "é.png", unicodedata.normalize("NFD", "é.png"), "数[1].png", "a#b;c.png"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_and_folders(name, place, processor):
    folder = place / name.replace(".png", " *")
    folder.mkdir()
    Path("red.png").rename(folder / name)
    write_lines(folder / f"{name}.jsonl", [{"image": name, "caption": "x"}])
    for dataset in (folder, folder / f"{name}.jsonl"):
        assert read(dataset, processor) == [("red", "x")]
    stored = [{"image": {"bytes": (folder / name).read_bytes(), "path": None}, "caption": "x"}]
    (folder / f"{name}.jsonl").unlink()
    datasets.Dataset.from_list(stored).cast_column("image", datasets.Image()).to_parquet(folder / f"{name}.parquet")
    for dataset in (folder, folder / f"{name}.parquet"):
        assert read(dataset, processor) == [("red", "x")]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("a b.png", "a%20b.png"),
        ("é.png", unicodedata.normalize("NFD", "é.png")),
        (unicodedata.normalize("NFD", "é b.png"), "é%20b.png"),
        ("sub/a.png", "sub\\a.png"),
    ],
)
def test_names_that_tools_spell_otherwise(there, said, place, processor):
    (place / "sub").mkdir()
    Path("red.png").rename(there)
    write_lines("rows.jsonl", [{"image": said, "caption": "x"}])
    assert read("rows.jsonl", processor) == [("red", "x")]


def test_symbolic_links(place, processor):
    real = place / "real"
    save_images(real)
    write_lines("real/rows.jsonl")
    (place / "link").symlink_to(real)
    assert read("link", processor) == read("link/rows.jsonl", processor) == PAIRS
    (place / "folder").mkdir()
    (place / "folder" / "rows.jsonl").symlink_to(real / "rows.jsonl")
    assert read("folder/rows.jsonl", processor, image_folder="link") == PAIRS


def test_each_file_of_a_pattern_has_its_own_pictures(place, processor):
    for number, names in enumerate((("red", "blue"), ("blue", "red"))):
        for name, colour in zip(COLOURS, names, strict=True):
            save_images(place / f"{number}", [colour])
            (place / f"{number}" / f"{colour}.png").rename(place / f"{number}" / f"{name}.new")
        for name in COLOURS:
            (place / f"{number}" / f"{name}.new").rename(place / f"{number}" / f"{name}.png")
        write_lines(f"{number}/rows.jsonl")
    assert [colour for colour, _ in read("[01]/rows.jsonl", processor)] == ["red", "blue", "blue", "red"]


def test_files_that_datasets_and_img2dataset_write_beside_the_rows(place, processor):
    write_tar("00000.tar")
    Path("00000_stats.json").write_text("{}")
    write_parquet("00000.parquet")
    assert read(place, processor) == PAIRS
    Path("00000.tar").unlink()
    with pytest.raises(ValueError, match="files of several kinds, 00000.parquet and 00000_stats.json"):
        check_rows(config(place))


def test_a_caption_that_is_cut_by_its_comma_is_bad(place):
    Path("rows.csv").write_text("image,caption\nred.png,a red, big square\nblue.png,NA\n")
    rows, check = check_rows(config("rows.csv"))
    assert pairs(rows) == PAIRS[1:] and "one field for each column name" in check.problems[0]


def test_messages_are_short_and_counted(place):
    rows = [{"image": f"{'x' * 500}/{number}.png", "caption": "x"} for number in range(200)]
    rows += [{"conversations": [{"from": "human", "value": "y" * 9000}, {"from": "z" * 9000}], "id": "i" * 900}] * 3
    write_lines("rows.jsonl", rows)
    check = check_rows(config("rows.jsonl"))[1]
    assert len(check.problems) == 203 and max(map(len, check.problems.values())) <= 300
    lines = list(check.lines())
    assert len(lines) == 2 and max(map(len, lines)) <= 400
    assert lines[0].endswith("and 199 more: 1, 2, 3, 4, 5, ...")
    stored = [{"picture": b"\x89PNG\x00\xff" * 99, "chat": [{"role": "user", "content": "x"}]}]
    datasets.Dataset.from_list(stored).to_parquet("rows.parquet")
    settings = {"image_column": "picture", "messages_column": "picture", "answer_column": None}
    (problem,) = check_rows(config("rows.parquet", **settings))[1].problems.values()
    assert "\\x89" not in problem and "<594 bytes>" in problem


def test_bad_streamed_rows_are_told_once_a_kind(place, processor, caplog):
    write_lines("rows.jsonl", [{"image": "none.png", "caption": "x"}] * 200 + ROWS)
    assert pairs(training_data(config("rows.jsonl", streaming=True, max_steps=1), processor)) == PAIRS
    said = [message for message in caplog.messages if "Skipped row" in message]
    assert len(said) <= 6 and said[-1].endswith("(100 skipped so far)")


def test_evaluation_rows_have_their_own_pictures(place):
    save_images(place / "held_out")
    (place / "held_out" / "red.png").rename(place / "held_out" / "blue.png")
    write_lines("held_out/rows.jsonl", ROWS[1:])
    write_lines("rows.jsonl")

    def folders(**settings) -> tuple[str, str]:
        run = config("rows.jsonl", image_folder=".", **settings)
        return pairs(check_rows(evaluation_settings(run))[0])

    assert folders(eval_dataset="held_out/rows.jsonl") == [("red", "NA")]
    assert folders(eval_dataset="held_out/rows.jsonl", eval_image_folder=".") == [("blue", "NA")]
    assert folders(eval_dataset="rows.jsonl") == PAIRS


def test_home(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    write_lines("rows.jsonl")
    assert len(open_rows(config("~/rows.jsonl"))) == 2
    run = config("~/rows.jsonl", image_folder="~/", eval_dataset="~/rows.jsonl", model="~/m")
    assert (run.image_folder, run.model) == (f"{place}/", f"{place}/m")
    assert row_reader(run, None).image_folder == f"{place}/"


if __name__ == "__main__":
    for repository in sys.argv[1:]:
        for streaming in (False, True):
            settings = {"streaming": True, "max_steps": 1} if streaming else {}
            reader = row_reader(config(repository), None)
            found = [reader(row, number) for number, row in enumerate(open_rows(config(repository, **settings)))]
            print(json.dumps(pairs(found)))
