"""A row of any format, to what both stages train on: checked, with its features and neighbours."""

import importlib.metadata
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from urllib.parse import unquote

import datasets
import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from ...modeling_tinyalign.row_encoder import first_caption, image_source_id, readable
from ...processing.images import MissingImage, decode_image, image_source, is_base64
from ..arguments.stage import StageArguments
from .chats import BadRow, check_messages, count_images, encode_chat, images_of, shown, to_messages
from .files import FOLDER, IMAGE_SUFFIXES, STORED_IMAGE, TEXT

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

# Where a row's images are, the first that has any.
PATH_COLUMNS = ("file_name", "filename", "filepath", "image_path", "image_file", "file", "path")
OTHER_COLUMNS = ("img", "picture", "photo")
IMAGE_COLUMNS = ("images", "image", *(suffix[1:] for suffix in IMAGE_SUFFIXES), *PATH_COLUMNS, *OTHER_COLUMNS)

# Parts of a chat's content that are an image, as transformers and as OpenAI's clients call them.
IMAGE_PARTS = ("image", "image_url", "input_image")

TEXT_PARTS = ("text", "input_text", "output_text")

# What every format becomes; `row` is its number, and an answer whose `train` is False belongs to the question. Rows
# that are bad have no messages but a `problem`.
TURN = {"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT}), "train": datasets.Value("bool")}
FEATURES = datasets.Features(
    {
        "messages": datasets.List(TURN),
        "row": datasets.Value("int64"),
        "id": TEXT,
        "problem": TEXT,
        "images": datasets.List(STORED_IMAGE),
    }
)


@dataclass
class RowReader:
    """A row of any format, as `open_rows` gives it -> the columns of `FEATURES`.

    The formats: `conversations` of turns with `from` and `value` (LLaVA), `messages` of turns with `role` and
    `content`, `prompt` + `completion` (TRL), `texts` of `user` and `assistant` (the Cauldron), or the column
    `answer_column` with answers to `prompt`, of several the first. `<image>` in a question says where an image stands;
    where it is nowhere in chats that are not LLaVA's, images come first, as in TRL. A text called `system` goes before
    chats without a system prompt.
    """

    image_folder: str | None  # of relative paths; by default the folder of the row's file, or `folder`
    folder: str  # of the data set
    image_column: str | None
    messages_column: str | None
    answer_column: str | None
    prompt: str | None
    processor: ProcessorMixin | None  # without one, the length of the rows is not checked
    max_length: int | None
    truncation: bool
    name_images: bool = False  # add the `source_ids` of the images
    version: str = importlib.metadata.version("tinyalign-vlm")  # of what is cached: another may read rows otherwise

    def __call__(self, row: dict[str, Any], number: int | None) -> dict[str, Any]:
        result = {"images": [], "messages": [], "row": number, "id": None, "problem": None}
        source_ids = []
        try:
            row = self.fields(row)
            result["id"] = None if row.get("id") is None else str(row["id"])
            images, messages = self.read(row)
            for image in images:
                decoded = open_image(image)
                if self.name_images:
                    source_ids.append(image_source_id(decoded))
            if self.processor is not None:
                self.check_tokens(messages, len(images))
            result |= {"images": images, "messages": messages}
        except BadRow as error:
            name = "" if row.get("id") is None else f" (id {row['id']})"
            result["problem"] = readable(f"{error}{name}")
        return {**result, "source_ids": source_ids} if self.name_images else result

    def fields(self, row: dict[str, Any]) -> dict[str, Any]:
        """The columns of a row: `json` is the text of a text file's row, or a part of a WebDataset's."""
        fields = row.get("json")
        if {FOLDER, "txt", "__key__"}.isdisjoint(row) or not isinstance(fields, (str, dict)):
            return row
        return {
            **(_parse(fields) if isinstance(fields, str) else fields),
            **{name: value for name, value in row.items() if value and name != "json"},
        }

    def read(self, row: dict[str, Any]) -> tuple[list, list[dict]]:
        """The images of a row, not yet looked at, and its messages. Raises `BadRow` unless they are a chat."""
        images = self.stored_images(row)
        messages = self.messages(row, len(images))
        check_turns(messages)
        check_placeholders(messages, len(images), columns_of(row))
        check_messages(messages)
        return images, messages

    def stored_images(self, row: dict[str, Any]) -> list:
        """The images of a row, not yet looked at, as `datasets` stores them."""
        own_folders = [self.folder] if row.get(FOLDER) is None else [row[FOLDER], self.folder]
        folders = own_folders if self.image_folder is None else [self.image_folder]
        return [stored_image(image, folders) for image in self.images(row)]

    def images(self, row: dict[str, Any]) -> list:
        if self.image_column is not None:
            if self.image_column not in row:
                raise BadRow("missing image", f"no column {self.image_column!r}, the columns are {columns_of(row)}")
            return images_of({"image": row[self.image_column]})
        found = (images_of({"image": row.get(name)}) for name in IMAGE_COLUMNS)
        images = next(filter(None, found), []) or images_in_chats(row.values())
        others = [name for name in ("video", "videos", "audio", "audios") if row.get(name) not in (None, "", [])]
        if others and not images:
            raise BadRow(
                "missing image", f"the row has no image but {others[0]}, expected images or text alone: remove it"
            )
        return images

    def messages(self, row: dict[str, Any], num_images: int) -> list[dict]:
        columns = ("messages", "conversations", "texts") if self.messages_column is None else (self.messages_column,)
        turns = next((row[name] for name in columns if row.get(name) is not None), None)
        if self.prompt is not None and self.answer_column in row:
            if self.prompt in row:
                raise BadRow(
                    "no chat",
                    f"prompt is {self.prompt!r}, which is a column, expected one question for all images: where each "
                    "has its own, call the columns prompt and completion",
                )
            return to_messages(self.prompt, first_caption(row[self.answer_column]))
        if turns is not None:
            turns = list_turns(turns)
            return with_system(row, place_images(turns, read_turns(turns), num_images))
        if row.get("prompt") is not None and "completion" in row:
            prompt, completion = turns_of(row["prompt"], "user"), turns_of(row["completion"], "assistant")
            question = [{**turn, "train": False} for turn in read_turns(prompt)]
            return with_system(row, place_images(prompt, question + read_turns(completion), num_images))
        raise BadRow(
            "no chat",
            f"the columns are {columns_of(row)}, expected messages or conversations: set messages_column, or "
            f"answer_column (found {self.answer_column!r}) and prompt (found {self.prompt!r})",
        )

    def check_tokens(self, messages: list[dict], num_images: int):
        processor = self.processor
        ids, learn = encode_chat(processor, messages, max_length=self.max_length, truncation=self.truncation)
        if not any(learn):
            raise BadRow("empty answer", f"the tokenizer makes nothing of what is answered in {shown(messages)}")
        found = ids.count(processor.image_token_id)
        if found != num_images * processor.num_image_tokens:
            raise BadRow("placeholder mismatch", f"the text has the model's own token {processor.image_token!r}")


def open_image(image: Any) -> Image.Image:
    """Return a stored image as upright RGB; raises `BadRow` if there is none, or it is broken."""
    path = image_path(image)
    if path is not None and "://" not in path and not os.path.isfile(path):
        raise BadRow("missing image", f"{path} is no file: set image_folder (or eval_image_folder), or remove the row")
    try:
        return decode_image(image)
    except MissingImage as error:
        raise BadRow("missing image", str(error)) from error
    except ValueError as error:
        raise BadRow("broken image", f"{path or ''} {error}".strip()) from error


def image_path(image: Any) -> str | None:
    """Return the path or URL of an image that is stored so, None of one that is stored itself."""
    source = image_source(image)
    return source if isinstance(source, str) and not is_base64(source) else None


def stored_image(image: Any, folders: Sequence[str]) -> Any:
    """Return an image as `datasets` stores it, its path found in one of the folders."""
    source, path = image_source(image), image_path(image)
    if isinstance(source, bytes):
        return {"bytes": source, "path": None}  # `datasets` would read the file of that name instead, if there is one
    if path is None or "://" in path:
        return source
    return {"bytes": None, "path": find_image(path, folders)}  # Arrow cannot mix texts and dictionaries in a column


def images_in_chats(columns: Iterable) -> list[dict]:
    """Return the parts of chats that hold an image themselves."""
    turns = [turn for turns in columns if isinstance(turns, list) for turn in turns if isinstance(turn, dict)]
    contents = [turn.get("content") for turn in turns]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [part for part in parts if part.get("type") in IMAGE_PARTS and image_source(part) is not None]


def columns_of(row: dict[str, Any]) -> list[str]:
    """Return the names of a row's columns, without those that say where it is from."""
    return sorted(name for name in row if not name.startswith("__"))


def find_image(name: str, folders: Sequence[str]) -> str:
    """Return the path of an image in the first folder that has it, as it is spelt there: tools differ in accents."""
    for folder in folders:
        slashes = name.replace("\\", "/")
        for spelling in (name, slashes, unquote(name), unquote(slashes)):
            for form in (spelling, *(unicodedata.normalize(form, spelling) for form in ("NFC", "NFD"))):
                path = os.path.join(folder, os.path.expanduser(form))
                if os.path.isfile(path):
                    return path
    return os.path.join(folders[0], name)


def _parse(text: str) -> dict:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow("no chat", f"no JSON ({error}): {shown(text)}") from error
    if not isinstance(row, dict):
        raise BadRow(
            "no chat",
            f"found {shown(row)}, expected an object with the fields of the row, or in CSV one field for each column "
            "name: put text that has the separator in it in quotes, and close these",
        )
    if "\\ud" in text.lower():  # a surrogate pair is one character, half of one cannot be stored
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise BadRow("no text", f"half a surrogate pair in {shown(text)} ({error})") from error
    return row


def list_turns(turns: Any) -> Any:
    """Return a list of turns: of JSON as text, of a dictionary of lists, or of pairs of `user` and `assistant`."""
    if isinstance(turns, str):
        with suppress(ValueError):
            turns = json.loads(turns)
    if isinstance(turns, dict):  # `datasets` stores a Sequence of dictionaries so
        columns = [values for values in turns.values() if isinstance(values, list)]
        turns = [dict(zip(turns, values, strict=True)) for values in zip(*columns, strict=False)]
    if isinstance(turns, list) and all(isinstance(turn, dict) and "user" in turn for turn in turns):
        return [{"role": role, "content": turn.get(role)} for turn in turns for role in ("user", "assistant")]
    return turns


def turns_of(value: Any, role: str) -> list:
    """Return a list of turns, also of JSON as text, or the one turn of a role that any other text is."""
    if isinstance(value, list):
        return value
    with suppress(ValueError, TypeError):
        turns = json.loads(value)
        if isinstance(turns, list) and turns and all({"role", "content"} <= dict(turn).keys() for turn in turns):
            return turns
    return [{"role": role, "content": value}]


def with_system(row: dict[str, Any], messages: list[dict]) -> list[dict]:
    """Put the text of a column called `system` before a chat that has no system prompt."""
    text = row.get("system")
    if not isinstance(text, str) or not text.strip() or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": [{"type": "text", "text": text}], "train": None}, *messages]


def read_turns(turns: list[dict]) -> list[dict]:
    """Turns of LLaVA or of TRL -> messages whose content is a list of parts. `<image>` in a question becomes a part,
    unless the chat has parts that are images: then it is text, as it is in an answer.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("no chat", f"the chat is {shown(turns)}, expected a list of turns")
    messages = []
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    has_parts = any(isinstance(part, dict) and part.get("type") in IMAGE_PARTS for parts in contents for part in parts)
    for turn in turns:
        name = turn["role"] if turn.get("role") is not None else turn.get("from")
        if not isinstance(name, str) or name not in ROLES:
            raise BadRow("turn order", f"a turn is of {name!r}, expected one of {', '.join(ROLES)}")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        places = ROLES[name] == "user" and not has_parts
        parts = [new for part in parts for new in _split(part, places)]
        messages.append({"role": ROLES[name], "content": parts, "train": None})
    return messages


def _split(part: dict, places: bool) -> list[dict]:
    """A part, or, with `places`, the text and images in it; the line break after `<image>` is the chat template's."""
    if not isinstance(part, dict) or part.get("type") not in IMAGE_PARTS + TEXT_PARTS:
        raise BadRow("no chat", f"a turn has {shown(part)}, expected text or an image in its content")
    if part["type"] in IMAGE_PARTS:
        return [{"type": "image", "text": None}]
    if part.get("text") is None:
        return [{"type": "text", "text": None}]
    if not isinstance(part["text"], str):
        raise BadRow("no chat", f"a turn has the text {shown(part['text'])}, expected a string")
    first, *rest = re.split("<image>\n?(?:<rag>\n?)?", part["text"]) if places else [part["text"]]
    parts = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image", "text": None}, {"type": "text", "text": text}]
    return [part for part in parts if part["text"] != ""]


def place_images(turns: list[dict], messages: list[dict], num_images: int) -> list[dict]:
    """Put the images first where chats of plain text have no place for them, as TRL does."""
    if count_images(messages) == 0 and all(isinstance(turn.get("content"), str) for turn in turns):
        user = next((message for message in messages if message["role"] == "user"), None)
        if user is not None:
            user["content"] = [{"type": "image", "text": None}] * num_images + user["content"]
    return messages


def check_turns(messages: list[dict]):
    """Raise `BadRow` unless user and assistant speak in turn, after at most one system prompt, the assistant last."""
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadRow(
            "turn order",
            f"the turns are of {', '.join(roles) or 'nobody'}, expected user, assistant, user, assistant ..., with at "
            "most one system prompt before them",
        )


def check_placeholders(messages: list[dict], num_images: int, columns: list[str]):
    """Raise `BadRow` unless there is a place for each image, in what the user says."""
    for message in messages:
        if message["role"] != "user" and count_images([message]):
            raise BadRow(
                "placeholder mismatch", f"a turn of {message['role']} has an image, expected it in a question"
            )
    found = count_images(messages)
    if found != num_images:
        kind = "placeholder mismatch" if num_images else "missing image"
        text = f"the chat has {found} <image>, but the row has {num_images} images, expected one for each"
        raise BadRow(kind, f"{text}: if one of the columns {columns} has more, set image_column")


class RowImages(Sequence):
    """All images of a data set, those of the first row first, as they are stored."""

    def __init__(self, rows: datasets.Dataset):
        counts = [count_images(messages) for messages in rows["messages"]]
        self.starts = [0, *accumulate(counts)]
        self.rows = rows.select_columns([name for name in ("image", "images") if name in rows.column_names])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        row = int(np.searchsorted(self.starts, index, "right")) - 1
        return images_of(self.rows[row])[index - self.starts[row]]

    def row_numbers(self) -> list[int]:
        """The row that each image is of."""
        return [row for row, images in enumerate(self.by_row(range(len(self)))) for _ in images]

    def by_row(self, values: Sequence) -> list:
        """Something about each image -> lists of it, one a row."""
        return [list(values[start:end]) for start, end in zip(self.starts, self.starts[1:], strict=False)]


def batch_size_of(config: StageArguments) -> int:
    """Images that go through the tower at once: few are faster on a CPU."""
    return 8 if config.device.type == "cpu" else 64
