"""Every format people have, to the same rows; and what is wrong with them."""

import gzip
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.fingerprint import Hasher
from PIL import Image

from tinyalign_cli.main import main
from tinyalign_vlm.processing.images import decode_image
from tinyalign_vlm.training.arguments.alignment import AlignmentConfig
from tinyalign_vlm.training.data.chats import images_of
from tinyalign_vlm.training.data.check import check_rows, row_reader, training_data
from tinyalign_vlm.training.data.collator import TrainingCollator
from tinyalign_vlm.training.data.rows import read_turns

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def conversation(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(turns)]


# LLaVA's own files mix the types of ids, and leave `image` out of rows of text.
LLAVA = [
    {"id": 7, "image": "red.png", "conversations": conversation("<image>\nwhat?", "a red square")},
    {"id": "b-2", "conversations": conversation("and without an image?", "white", "and?", "blue")},
    {"id": "c", "image": ["red.png", "blue.png"], "conversations": conversation("is <image> by <image>?", "blue")},
    {"id": "d", "image": "blue.png", "conversations": conversation("what?", "a circle", "and here?\n<image>", "blue")},
    {
        "id": "e",
        "image": "blue.png",
        "conversations": [{"from": "system", "value": "be short"}, *conversation("<image>", "blue")],
    },
]
EXPECTED = [
    (1, [("user", ["<image>", "what?"]), ("assistant", ["a red square"])]),
    (0, [("user", ["and without an image?"]), ("assistant", ["white"]), ("user", ["and?"]), ("assistant", ["blue"])]),
    (2, [("user", ["is ", "<image>", " by ", "<image>", "?"]), ("assistant", ["blue"])]),
    (
        1,
        [
            ("user", ["what?"]),
            ("assistant", ["a circle"]),
            ("user", ["and here?\n", "<image>"]),
            ("assistant", ["blue"]),
        ],
    ),
    (1, [("system", ["be short"]), ("user", ["<image>"]), ("assistant", ["blue"])]),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (12, 8), colour).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def names_of(row: dict) -> list[str]:
    image = row.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def write(rows: list[dict], kind: str) -> str:
    """The rows in one of the formats, and the name of the file."""
    if kind in ("json", "jsonl"):
        lines = [json.dumps(row) for row in rows]
        Path(f"rows.{kind}").write_text(f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines))
        return f"rows.{kind}"
    if kind == "messages":
        rows = [
            {
                "images": names_of(row),
                "messages": [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]],
            }
            for row in rows
        ]
        Path("messages.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return "messages.jsonl"
    if kind == "tar":
        with tarfile.open("shard-000.tar", "w") as tar:
            for number, row in enumerate(rows):
                parts = {f"{index}.png": Path("images", name) for index, name in enumerate(names_of(row))}
                parts = {name: path.read_bytes() for name, path in parts.items()}
                parts["json"] = json.dumps(row).encode()
                for suffix, content in parts.items():
                    member = tarfile.TarInfo(f"train/{number:05}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        return "shard-*.tar"
    stored = datasets.Dataset.from_list(
        [
            {
                "images": [{"bytes": Path("images", name).read_bytes(), "path": name} for name in names_of(row)],
                "conversations": row["conversations"],
            }
            for row in rows
        ]
    ).cast_column("images", datasets.List(datasets.Image()))
    stored.to_parquet("rows.parquet")
    return "rows.parquet"


def config(dataset: str, **settings) -> AlignmentConfig:
    return AlignmentConfig(output_dir="out", dataset=dataset, image_folder="images", disable_tqdm=True, **settings)


def simple(rows) -> list[tuple]:
    """Number of images, and who says what."""
    return [
        (
            len(images_of(row)),
            [
                (turn["role"], ["<image>" if part["type"] == "image" else part["text"] for part in turn["content"]])
                for turn in row["messages"]
            ],
        )
        for row in rows
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl", "messages", "tar", "parquet"])
def test_every_format_gives_the_same_rows(kind, streaming, folder, processor):
    settings = {"streaming": True, "max_steps": 1} if streaming else {}
    rows = list(training_data(config(write(LLAVA, kind), **settings), processor))
    assert simple(rows) == EXPECTED
    batch = TrainingCollator(processor)(rows)
    assert batch["pixel_values"].shape[0] == 5
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [count * processor.num_image_tokens for count, _ in EXPECTED]
    red, blue = batch["pixel_values"][0, :, 0, 0], batch["pixel_values"][4, :, 0, 0]
    assert torch.equal(batch["pixel_values"][1, :, 0, 0], red) and not torch.equal(red, blue)
    assert torch.equal(batch["pixel_values"][2, :, 0, 0], blue)


def test_several_processes_and_files(folder, processor):
    for number in range(2):
        Path(f"{number}.json").write_text(json.dumps(LLAVA))
    rows, check = check_rows(config("*.json", num_proc=2, max_length=400), processor)
    assert check.rows == 10 and simple(rows) == EXPECTED * 2


def test_a_changed_file_is_read_again(folder):
    name = write(LLAVA, "json")
    assert len(check_rows(config(name))[0]) == 5
    write(LLAVA[:2], "json")
    assert len(check_rows(config(name))[0]) == 2


def test_an_image_that_came_later_is_found(folder):
    write([{"image": "late.png", "conversations": LLAVA[0]["conversations"]}], "json")
    assert len(check_rows(config("rows.json"))[1].problems) == 1
    Image.new("RGB", (4, 4)).save("images/late.png")
    assert not check_rows(config("rows.json"))[1].problems


def test_images_of_trl_rows_come_first_if_nothing_says_where(folder):
    rows = [
        {"images": ["red.png"], "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]},
        {"image": "red.png", "prompt": "?", "completion": "a"},
    ]
    Path("rows.json").write_text(json.dumps(rows))
    found = simple(check_rows(config("rows.json"))[0])
    assert found == [(1, [("user", ["<image>", "?"]), ("assistant", ["a"])])] * 2


def test_only_the_completion_is_learnt(folder, processor):
    prompt = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "white"}]
    row = {
        "image": "red.png",
        "prompt": [*prompt, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and?"}]}],
        "completion": [{"role": "assistant", "content": "a red square"}],
    }
    Path("rows.json").write_text(json.dumps([row]))
    rows, check = check_rows(config("rows.json"), processor)
    assert str(check) == "1 rows: 1 good"
    labels = TrainingCollator(processor)(list(rows))["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "a red square<|im_end|>"


def test_captions_with_a_prompt(folder, images):
    stored = datasets.Dataset.from_dict({"picture": images[:2], "caption": ["blue", "white"]})
    stored.cast_column("picture", datasets.Image()).to_parquet("pairs.parquet")
    settings = {"image_column": "picture", "answer_column": "caption", "prompt": "what?"}
    rows, _ = check_rows(config("pairs.parquet", **settings))
    expected = [(1, [("user", ["<image>", "what?"]), ("assistant", [text])]) for text in ("blue", "white")]
    assert simple(rows) == expected


def test_a_folder_of_images_with_metadata(folder):
    rows = [{"file_name": "red.png", "text": "red"}, {"file_name": "blue.png", "text": "blue"}]
    Path("images/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows, _ = check_rows(config("images", answer_column="text", prompt="what?"))
    assert [found[1][1] for found in simple(rows)] == [("assistant", ["red"]), ("assistant", ["blue"])]


GOOD = LLAVA[0]
BAD = {
    "missing image": [
        {**GOOD, "image": "nowhere.png"},
        {"conversations": GOOD["conversations"]},
        {**GOOD, "image": None},
        {**GOOD, "image": ""},
        {**GOOD, "image": "../images"},
        {**GOOD, "image": 5},
        {**GOOD, "image": [["red.png"]]},
        {**GOOD, "image": {"url": "https://images.example/red.png"}},
        {"video": "a.mp4", "conversations": conversation("what happens?", "A dog runs.")},
    ],
    "broken image": [{**GOOD, "image": "broken.png"}],
    "turn order": [
        {**GOOD, "conversations": GOOD["conversations"][:1]},
        {**GOOD, "conversations": GOOD["conversations"][::-1]},
        {**GOOD, "conversations": [GOOD["conversations"][0], *GOOD["conversations"]]},
        {**GOOD, "conversations": []},
        {**GOOD, "conversations": [{"from": "tool", "value": "x"}, *GOOD["conversations"]]},
        {**GOOD, "conversations": [{"from": ["human"], "value": "x"}, *GOOD["conversations"]]},
        {**GOOD, "conversations": [*GOOD["conversations"], {"from": "human", "value": "and?"}]},
    ],
    "placeholder mismatch": [
        {**GOOD, "conversations": conversation("<image> <image>", "x")},
        {**GOOD, "conversations": conversation("no place for it", "x")},
        {**GOOD, "image": ["red.png", "blue.png"]},
        {**GOOD, "conversations": conversation("what?", "<image>")},
    ],
    "empty answer": [
        {**GOOD, "conversations": conversation("<image>", "")},
        {**GOOD, "conversations": conversation("<image>", " \n ")},
        {**GOOD, "conversations": conversation("<image>", None)},
        {**GOOD, "conversations": conversation("<image>", "x", "and?", "")},
    ],
    "over-long": [{**GOOD, "conversations": conversation("<image>", "a red square " * 50)}],
    "no chat": [
        {"image": "red.png"},
        {"image": "red.png", "conversations": "what?"},
        {"image": "red.png", "conversations": ["what?", "red"]},
        {**GOOD, "conversations": conversation(7, "red")},
        {**GOOD, "conversations": conversation("<image>", {"text": "red"})},
        {"image": "red.png", "messages": [{"role": "user", "content": [{"type": "video"}]}]},
    ],
    "no text": [{**GOOD, "conversations": conversation("<image>", "half an emoji: \ud83d")}],
}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in BAD.items() for row in rows])
def test_a_bad_row_is_named_and_skipped(kind, row, folder, processor, caplog):
    Path("images/broken.png").write_bytes(Path("images/red.png").read_bytes()[:40])
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, [GOOD, row, LLAVA[3]])))
    rows, check = check_rows(config("rows.jsonl", max_length=120), processor)
    assert list(check.problems) == [1] and check.problems[1].startswith(f"{kind}: ")
    assert simple(rows) == [EXPECTED[0], EXPECTED[3]]
    streamed = config("rows.jsonl", max_length=120, streaming=True, max_steps=1)
    assert simple(training_data(streamed, processor)) == simple(rows)
    assert caplog.messages[-1].endswith(" (1 skipped so far)")
    streamed.strict = True
    with pytest.raises(ValueError, match=f"row 1 of rows.jsonl: {kind}: "):
        list(training_data(streamed, processor))


def test_bad_rows_are_counted_and_kept_in_a_file(folder, processor):
    bad = [rows[0] for kind, rows in BAD.items() if kind not in ("over-long", "broken image", "no text")]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, [GOOD, *bad])) + "\n{no JSON\n")
    settings = config("rows.jsonl")
    assert len(training_data(settings, processor)) == 1
    problems = json.loads(Path("out/bad_rows.json").read_text())
    assert list(problems) == ["1", "2", "3", "4", "5", "6"] and "no JSON" in problems["6"]
    assert problems["1"].startswith("missing image: images/nowhere.png is no file: set image_folder")
    assert problems["1"].endswith("or remove the row (id 7)")
    settings.strict = True
    with pytest.raises(ValueError, match="7 rows: 1 good, 6 bad .2 no chat, 1 missing image.*\n  row 1: missing"):
        training_data(settings, processor)
    Path("rows.jsonl").write_text(json.dumps(bad[0]))
    with pytest.raises(ValueError, match="None is left to train on"):
        training_data(config("rows.jsonl"), processor)


def test_data_check_prints_every_bad_row(folder, capsys):
    Path("images/rows.jsonl").write_text("\n".join(map(json.dumps, [GOOD, BAD["turn order"][0], GOOD])))
    with pytest.raises(SystemExit, match="1"):
        main(["data", "check", "images/rows.jsonl"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("row 1: turn order: the turns are of user, expected user, assistant")
    assert lines[-1] == "3 rows: 2 good, 1 bad (1 turn order)"
    main(["data", "check", write([GOOD], "json"), "--image_folder", "images"])
    assert capsys.readouterr().out.splitlines()[-1] == "1 rows: 1 good"
    with pytest.raises(SystemExit, match="tinyalign: .*nowhere.json"):
        main(["data", "check", "nowhere.json"])
    with pytest.raises(SystemExit, match="0"):
        main(["data", "check", "--help"])
    assert "<image> anywhere in a question" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_shards(packed, folder):
    """No row is lost in silence: tarfile itself takes a header that is cut or damaged for the end of the file."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(3):
            Image.new("RGB", (4, 4)).save(f"{number}.png")
            Path(f"{number}.json").write_text(json.dumps({"conversations": GOOD["conversations"]}))
            tar.add(f"{number}.png")
            tar.add(f"{number}.json")
        header = tar.getmember("1.png").offset
    whole, name = content.getvalue(), "shard.tar.gz" if packed else "shard.tar"
    damaged = bytearray(whole)
    damaged[header] ^= 1
    shards = [whole[: header + 1], whole[: header + 511], whole[: header + 513], bytes(damaged)]
    if packed:
        shards = [gzip.compress(shard) for shard in shards] + [gzip.compress(whole)[:-9], gzip.compress(whole)[:300]]
    for shard in shards:
        Path(name).write_bytes(shard)
        with pytest.raises(ValueError, match=f"(?s){name} cannot be read .*expected a whole .tar"):
            check_rows(config(name))
    Path(name).write_bytes(gzip.compress(whole) if packed else whole)
    assert str(check_rows(config(name))[1]) == "3 rows: 3 good"


def test_other_endings(folder):
    """A packed shard with images that are neither JPEG nor PNG; a file that is no data set; and one without rows."""
    with tarfile.open("shard.tar.gz", "w:gz") as tar:
        for number, suffix in enumerate(("bmp", "gif", "tiff")):
            Image.new("RGB", (4, 4)).save(f"{number}.{suffix}")
            Path(f"{number}.json").write_text(json.dumps({"conversations": GOOD["conversations"]}))
            tar.add(f"{number}.{suffix}")
            tar.add(f"{number}.json")
    assert str(check_rows(config("shard.tar.gz"))[1]) == "3 rows: 3 good"
    Path("rows[1] 数.json").write_text(json.dumps([{**GOOD, "image": "red.png"}]))
    assert str(check_rows(config("rows[1] 数.json"))[1]) == "1 rows: 1 good"
    Path("rows.xlsx").write_text("image,caption\n")
    with pytest.raises(ValueError, match="rows.xlsx is no data set, expected a file ending in .json, .jsonl"):
        check_rows(config("rows.xlsx"))
    Path("rows.json").write_text("[]")
    with pytest.raises(ValueError, match="rows.json has no rows, expected at least one"):
        check_rows(config("rows.json"))


def test_truncation_never_cuts_an_image_or_all_that_is_to_be_learnt(folder, processor):
    long = "a red square " * 40
    rows = [
        {**GOOD, "conversations": conversation("<image>", long)},  # the answer loses its end
        {**GOOD, "conversations": conversation(long, "blue", "<image>", "red")},  # the image would be cut
        {**GOOD, "conversations": conversation("<image>" + long, "blue")},  # nothing would be left
        GOOD,
    ]
    Path("rows.json").write_text(json.dumps(rows))
    good, check = check_rows(config("rows.json", max_length=110, truncation=True), processor)
    assert list(check.problems) == [1, 2] and len(good) == 2
    assert "would cut an image" in check.problems[1] and "nothing is left to learn" in check.problems[2]
    batch = TrainingCollator(processor, max_length=110, truncation=True)(list(good))
    assert batch["input_ids"].shape[1] == 110
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [processor.num_image_tokens] * 2
    assert ((batch["labels"] != -100).sum(1) > 0).all()
    with pytest.raises(ValueError, match="over-long: the row has .* tokens, .* expected at most 110"):
        TrainingCollator(processor, max_length=110)(list(good))


def test_a_processor_checks_what_the_collator_reads(folder, processor):
    """A row that passes the check is never refused later."""
    rows, check = check_rows(config(write(LLAVA, "json"), max_length=400), processor)
    assert not check.problems
    for row in rows:
        assert (TrainingCollator(processor, max_length=400)([row])["labels"] != -100).any()


def test_a_placeholder_is_text_beside_images_that_are_parts_and_in_answers():
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what does <image> mean?"}]},
        {"role": "assistant", "content": "it is <image>"},
    ]
    for part in (turns[0]["content"], "<image>\n<rag>\nwhat does it mean?"):
        first, last = read_turns([{"role": "user", "content": part}, turns[1]])
        assert [part["type"] for part in first["content"]] == ["image", "text"]
        assert "<rag>" not in first["content"][1]["text"]
        assert last["content"] == [{"type": "text", "text": "it is <image>"}]
    assert read_turns(turns)[0]["content"][1]["text"] == "what does <image> mean?"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_pictures_and_paths_in_one_column(order, folder):
    stored = [{"bytes": Path("images/red.png").read_bytes(), "path": None}, {"bytes": None, "path": "blue.png"}]
    rows = datasets.Dataset.from_dict({"image": [stored[number] for number in order], "caption": ["a", "b"]})
    rows.to_parquet("mixed.parquet")
    rows, check = check_rows(config("mixed.parquet", answer_column="caption", prompt="?"))
    assert not check.problems
    assert [decode_image(images_of(row)[0]).getpixel((0, 0)) for row in rows] == [
        ((255, 0, 0), (0, 0, 255))[number] for number in order
    ]


def test_columns_of_images_that_are_empty_in_all_rows_or_in_one(folder):
    picture = {"bytes": Path("images/red.png").read_bytes(), "path": None}
    table = {"images": [[], []], "image": [picture, None], "path": ["red.png", "red.png"], "caption": ["a", "b"]}
    features = {"images": datasets.List(datasets.Image()), "image": datasets.Image()}
    text = {"path": datasets.Value("string"), "caption": datasets.Value("string")}
    datasets.Dataset.from_dict(table, datasets.Features(features | text)).to_parquet("two.parquet")
    rows, check = check_rows(config("two.parquet", answer_column="caption", prompt="?"))
    assert [len(images_of(row)) for row in rows] == [1]
    assert str(check) == "2 rows: 1 good, 1 bad (1 missing image)"


def test_images_in_one_column_for_some_rows_and_in_another_for_others(folder):
    picture = {"bytes": Path("images/red.png").read_bytes(), "path": None}
    table = {"images": [[picture], None], "image": [None, picture], "caption": ["a", "b"]}
    features = {"images": datasets.List(datasets.Image()), "image": datasets.Image()}
    features = datasets.Features(features | {"caption": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features).to_parquet("two.parquet")
    rows, check = check_rows(config("two.parquet", answer_column="caption", prompt="?"))
    assert not check.problems and [len(images_of(row)) for row in rows] == [1, 1]


def test_a_picture_of_nulls_is_none(folder):
    nothing = {"bytes": None, "path": None}
    table = {"image": [nothing, {**nothing, "path": "red.png"}], "messages": [MESSAGES, MESSAGES]}
    pq.write_table(pa.Table.from_pydict(table), "nulls.parquet")
    rows, check = check_rows(config("nulls.parquet"))
    assert not check.problems and [len(images_of(row)) for row in rows] == [0, 1]


def test_a_broken_picture_inside_a_chat(folder):
    """It is one bad row, as anywhere else."""
    content = datasets.List(
        {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    )
    features = datasets.Features({"messages": datasets.List({"role": datasets.Value("string"), "content": content})})
    chats = []
    for picture in (Path("images/red.png").read_bytes(), b"broken"):
        asked = [{"type": "image", "image": {"bytes": picture, "path": None}}, {"type": "text", "text": "What?"}]
        chats.append(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
        )
    chats = [
        [{**turn, "content": [{"text": None, "image": None, **part} for part in turn["content"]]} for turn in chat]
        for chat in chats
    ]
    datasets.Dataset.from_dict({"messages": chats}, features).to_parquet("inside.parquet")
    rows, check = check_rows(config("inside.parquet"))
    assert len(rows) == 1 and check.problems[1].startswith("broken image: ")


MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]


def test_turns_as_json_in_prompt_and_completion(folder):
    turns = {"prompt": json.dumps(MESSAGES[:1]), "completion": json.dumps(MESSAGES[1:])}
    answers = ['[{"box": [1, 2], "content": "tea"}]', '{"items": ["tea"], "total": 3}', "[1]", "3"]
    rows = [turns, *({"prompt": "Where?", "completion": answer} for answer in answers)]
    Path("rows.jsonl").write_text("\n".join(json.dumps({"image": "red.png", **row}) for row in rows))
    found = simple(check_rows(config("rows.jsonl"))[0])
    assert [turns[-1] for _, turns in found] == [("assistant", [answer]) for answer in ("red", *answers)]


def test_a_column_called_system(folder):
    chats = [MESSAGES, [{"role": "system", "content": "Be brief."}, *MESSAGES]]
    rows = [{"image": "red.png", "system": "Answer in French.", "messages": chat} for chat in chats]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = simple(check_rows(config("rows.jsonl"))[0])
    assert [turns[0] for _, turns in found] == [("system", ["Answer in French."]), ("system", ["Be brief."])]


def test_a_prompt_that_is_the_name_of_a_column(folder):
    Path("rows.jsonl").write_text(json.dumps({"image": "red.png", "question": "Which colour?", "answer": "red"}))
    _, check = check_rows(config("rows.jsonl", answer_column="answer", prompt="question"))
    assert "prompt is 'question', which is a column" in check.problems[0]


def test_columns_are_named_where_no_image_is_found(folder, caplog):
    row = {"screenshot": "red.png", "messages": MESSAGES}
    Path("rows.jsonl").write_text(json.dumps(row))
    check_rows(config("rows.jsonl"))
    assert "No row of rows.jsonl has an image" in caplog.text and "set image_column" in caplog.text
    Path("rows.jsonl").write_text(json.dumps({**GOOD, "image": None, "screenshot": "red.png"}))
    assert "'screenshot'] has more, set image_column" in check_rows(config("rows.jsonl"))[1].problems[0]


def test_a_column_called_json_is_an_answer(folder):
    picture = {"bytes": Path("images/red.png").read_bytes(), "path": None}
    rows = datasets.Dataset.from_dict({"image": [picture], "json": ['{"total": 3}']})
    rows.cast_column("image", datasets.Image()).to_parquet("receipts.parquet")
    rows, _ = check_rows(config("receipts.parquet", answer_column="json", prompt="Read it."))
    assert simple(rows)[0][1][-1] == ("assistant", ['{"total": 3}'])


def test_nan_is_no_image(folder):
    rows = [{"image": float("nan"), "conversations": conversation("q", "a")}, LLAVA[0]]
    Path("rows.json").write_text(json.dumps(rows))
    assert not check_rows(config("rows.json"))[1].problems


def test_one_row_with_a_list_of_its_own(folder):
    row = {"images": ["red.png"], "conversations": conversation("<image>?", "red"), "boxes": [{"x": 1}, {"x": 2}]}
    Path("one.jsonl").write_text(json.dumps(row))
    assert str(check_rows(config("one.jsonl"))[1]) == "1 rows: 1 good"


def test_another_version_of_the_package_reads_again(processor):
    readers = [replace(row_reader(config("rows.json"), None), version=version) for version in ("1", "1", "2")]
    first, again, other = map(Hasher.hash, readers)
    assert first == again != other
