"""Made-up rows in the schema of each benchmark, as Parquet files: `NAME.parquet`, and `gqa_images.parquet`."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

MME = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
MME += ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBJECTS = ("Art", "Biology", "Finance")
# Several commands in one process, which imports lmms-eval once.
COMMANDS = """
import json
import sys

from tinyalign_cli.main import main

for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        print(end)
"""


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8))


def gqa_rows(images: int = 4) -> list[dict]:
    """Three questions an image, whose image is in another file."""
    rows = []
    for number in range(3 * images):
        types = {"structural": ("query", "verify")[number % 2], "semantic": "attr", "detailed": "x"}
        empty = dict.fromkeys(("fullAnswer", "entailed", "equivalent", "annotations", "semantic", "semanticStr"), "")
        answer = ("yes", "red", "Left side")[number % 3]
        row = {"id": f"{number}", "imageId": f"n{number // 3}", "question": f"What is {number}?", "answer": answer}
        rows.append(row | empty | {"isBalanced": True, "groups": {"global": "", "local": ""}, "types": types})
    return rows


def pope_rows(images: int = 5) -> list[dict]:
    """Six questions an image in each of three splits, half of them with yes; the yes-questions are the same."""
    rows = []
    for category in ("adversarial", "popular", "random"):
        for number in range(6 * images):
            answer = ("yes", "no")[number % 2]
            thing = number if answer == "yes" else f"{category} {number}"
            row = {"id": str(len(rows)), "question_id": str(number), "question": f"Is there a {thing} in the image?"}
            row |= {"answer": answer, "image_source": f"COCO_{number // 6}", "category": category}
            rows.append(row | {"image": picture(100 + number // 6)})
    return rows


def mme_rows(images: int = 3) -> list[dict]:
    """Two questions an image, one with Yes and one with No."""
    rows = []
    for category in MME:
        for number in range(images):
            for answer in ("Yes", "No"):
                row = {"question_id": f"{category}/{number}.png", "image": picture(200 + number), "answer": answer}
                row |= {"question": f"Is it {answer} {number}? Please answer yes or no.", "category": category}
                rows.append(row)
    return rows


def scienceqa_rows(rows: int = 12) -> list[dict]:
    names = ("task", "grade", "topic", "category", "skill", "lecture", "solution")
    return [
        dict.fromkeys(names, "")
        | {
            "image": picture(300 + number),
            "question": f"Which is {number}?",
            "hint": ("", "Look.")[number % 2],
            "subject": ("natural science", "social science")[number % 2],
            "choices": ["one", "two", "three", "four"][: 2 + number % 3],
            "answer": number % 2,
        }
        for number in range(rows)
    ]


def textvqa_rows(rows: int = 8) -> list[dict]:
    empty = {"question_tokens": [], "image_classes": [], "set_name": "val", "flickr_original_url": ""}
    return [
        empty
        | {
            "image_id": f"t{number // 2}",
            "question_id": number,
            "question": f"what does Sign {number} say?",
            "answers": ["stop"] * 6 + ["Stop sign"] * 2 + ["go"] * 2,
            "ocr_tokens": ["STOP", str(number)],
            "image": picture(400 + number // 2),
            "image_width": 24,
            "image_height": 24,
        }
        for number in range(rows)
    ]


def vqav2_rows(rows: int = 8) -> list[dict]:
    texts = ["2"] * 5 + ["two"] * 2 + ["three"] * 3
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts)]
    return [
        {
            "question_type": "how many",
            "multiple_choice_answer": "2",
            "answers": answers,
            "image_id": number // 2,
            "answer_type": "number",
            "question_id": 10 + number,
            "question": f"How many are {number}?",
            "image": picture(500 + number // 2),
        }
        for number in range(rows)
    ]


def mmmu_rows(each: int = 4) -> list[dict]:
    """Multiple choice and one open question a subject; the second names two images."""
    rows = []
    for subject in SUBJECTS:
        for number in range(each):
            is_open = number == each - 1
            row = {"id": f"validation_{subject}_{number}", "question": f"What is <image 1> in {number}?"}
            row |= {"options": "[]" if is_open else "['blue', 'red', 'green']", "explanation": "", "subfield": subject}
            row |= {"answer": "7" if is_open else "AB"[number % 2], "topic_difficulty": "Easy", "img_type": "['x']"}
            row |= {"question_type": "open" if is_open else "multiple-choice", "image_1": picture(600 + len(rows))}
            if number == 1:
                row |= {"question": "Is <image 1> like <image 2>?", "image_2": picture(650)}
            rows.append(dict.fromkeys(f"image_{slot}" for slot in range(1, 8)) | row)
    return rows


def mmvet_rows(rows: int = 4) -> list[dict]:
    return [
        {
            "question_id": f"v1_{number}",
            "question": f"What is x in {number}?",
            "answer": "-1<AND>-5",
            "image_source": "x",
            "capability": ("ocr,math", "rec")[number % 2],
            "image": picture(700 + number),
        }
        for number in range(rows)
    ]


ROWS = {"gqa": gqa_rows, "pope": pope_rows, "mme": mme_rows, "scienceqa": scienceqa_rows, "textvqa": textvqa_rows}
ROWS |= {"vqav2_val": vqav2_rows, "vqav2_testdev": vqav2_rows, "mmmu": mmmu_rows, "mmvet": mmvet_rows}


def write(folder: Path, *names: str):
    """Write the files of these benchmarks, of all by default."""
    folder.mkdir(exist_ok=True)
    for name in names or ROWS:
        save(ROWS[name](), folder / f"{name}.parquet")
    if not names or "gqa" in names:
        save([{"id": f"n{number}", "image": picture(number)} for number in range(4)], folder / "gqa_images.parquet")


def save(rows: list[dict], path: Path):
    dataset = datasets.Dataset.from_list(rows)
    for column in dataset.column_names:
        if column == "image" or column.startswith("image_") and column[-1].isdigit():
            dataset = dataset.cast_column(column, datasets.Image())
    dataset.to_parquet(path)
