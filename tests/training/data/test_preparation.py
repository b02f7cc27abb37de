"""Runs prepared from YAML files: rows with their neighbours."""

import json

from tinyalign_vlm.training.arguments.files import read_config
from tinyalign_vlm.training.data.preparation import prepare


def test_rows_of_several_images_do_not_retrieve_each_other(files, captions, monkeypatch):
    monkeypatch.chdir(files)
    question = {"from": "human", "value": "<image><image><image>which is red?"}
    rows = [
        {"images": [f"{3 * row + i}.png" for i in range(3)]}
        | {"conversations": [question, {"from": "gpt", "value": captions[row]}]}
        for row in range(4)
    ]
    (files / "several.json").write_text(json.dumps(rows))
    rows = prepare(read_config(["stage1.yaml"], ["--dataset", "several.json"])).rows
    for number, row in enumerate(rows):
        found = {neighbour for image in row["memory_ids"] for neighbour in image}
        assert found and not found & set(range(3 * number, 3 * number + 3))
