"""Pictures and lessons that strangers upload, and a guard that keeps Gradio from fetching what they name."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...processing.images import MAX_IMAGE_BYTES, decode_image
from .request_images import REQUEST_FORMATS

MAX_ROWS = 200  # of the CSV of one upload
MAX_UPLOAD_BYTES = 8 * MAX_IMAGE_BYTES  # of one request, and of what a zip file holds
MAX_CALL_BYTES = 2**20  # of a request without files: a question, two numbers
COLUMNS = ["image", "caption"]


def read_picture(path: str | Path) -> Image.Image:
    """Return an uploaded picture; `ValueError` in words if it is broken, too large or of another format."""
    return decode_image(io.BytesIO(_limited(Path(path).open("rb"), Path(path).name)), REQUEST_FORMATS)


def read_lessons(paths: list[str | Path]) -> Iterator[tuple[str, Image.Image, str]]:
    """Yield name, picture and line of each row of the CSV among uploaded files, or in a zip file.

    Args:
        paths: one zip file, or files of one folder. The CSV has the columns `image`, a file's name, and `caption`.

    Raises:
        ValueError: there is no such CSV, a picture is missing or broken, or it is too much. Rows before were yielded.
    """
    if len(paths) == 1 and zipfile.is_zipfile(paths[0]):
        with zipfile.ZipFile(paths[0]) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
            if declared > MAX_UPLOAD_BYTES:
                raise ValueError(f"The zip file holds {declared} bytes, expected at most {MAX_UPLOAD_BYTES}.")
            # bytes beyond a declared size are an error of zipfile's
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
            # not zipfile.Path: with a name that begins with "//", it never ends in Python before 3.11.10
            yield from _lessons({name: partial(archive.open, name) for name in names})
    else:
        yield from _lessons({Path(path).name: partial(open, path, "rb") for path in paths})


def _lessons(files: dict[str, Callable[[], io.BufferedIOBase]]) -> Iterator[tuple[str, Image.Image, str]]:
    tables = [name for name in files if name.lower().endswith(".csv")]
    if len(tables) != 1:
        raise ValueError(f"Found {len(tables)} CSV files among {len(files)} files, expected one, beside the pictures.")
    try:
        text = _limited(files[tables[0]](), tables[0]).decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if not set(COLUMNS) <= set(rows.fieldnames or []):
            raise ValueError(f"its columns are {rows.fieldnames}, expected {' and '.join(COLUMNS)} in its first line")
        rows = list(rows)
    except (ValueError, csv.Error, zipfile.BadZipFile, RuntimeError) as error:  # the last: a zip with a password
        raise ValueError(f"{tables[0]} cannot be read: {error}.") from error
    if len(rows) > MAX_ROWS:
        raise ValueError(f"{tables[0]} has {len(rows)} rows, expected at most {MAX_ROWS} at once.")
    folder = PurePosixPath(tables[0]).parent
    for row in rows:
        name = row["image"] or ""
        file = files.get(str(folder / name)) or files.get(name) or files.get(PurePosixPath(name).name)
        if file is None:
            raise ValueError(f"{tables[0]} names the picture {name!r:.100}, which was not uploaded.")
        try:
            picture = decode_image(io.BytesIO(_limited(file(), name)), REQUEST_FORMATS)
        except (ValueError, zipfile.BadZipFile, RuntimeError) as error:
            raise ValueError(f"{name:.100}: {error}") from error
        yield name, picture, row["caption"] or ""


def _limited(file: io.BufferedIOBase, name: str) -> bytes:
    with file:
        content = file.read(MAX_IMAGE_BYTES + 1)
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"{name:.100} has more than {MAX_IMAGE_BYTES} bytes: make it smaller.")
    return content


class Guard:
    """Refuse requests for which Gradio would fetch a URL, and those that are too large.

    Gradio fetches what a path in a request names with http, as `file=http...` and as any input of any function.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif any(f"/{word}=" in scope["path"] and "://" in scope["path"] for word in ("file", "proxy", "stream")):
            await PlainTextResponse("No URL is fetched here.", 403)(scope, receive, send)
        elif scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, counted(receive, MAX_UPLOAD_BYTES), send)
        else:
            body = await whole_body(receive)
            if body is None or names_url(body):
                refusal = "The request is too large." if body is None else "No URL is fetched here: upload the file."
                await PlainTextResponse(refusal, 413 if body is None else 403)(scope, receive, send)
            else:
                await self.app(scope, replayed(body, receive), send)


async def whole_body(receive: Receive) -> bytes | None:
    """Return the body of a request; None if it is too large."""
    body, more = bytearray(), True
    while more and len(body) <= MAX_CALL_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return None if len(body) > MAX_CALL_BYTES else bytes(body)


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return what receives a body that was read already, and then whatever comes."""
    first = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(first, None) or await receive()

    return replay


def counted(receive: Receive, most: int) -> Receive:
    """Return what receives up to `most` bytes, and then says that the client has gone."""
    left = most

    async def count() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return count


def names_url(body: bytes) -> bool:
    """Return True if a JSON body has a file, an object with a `path`, that is a URL, or is nested beyond reading."""
    try:
        return _names_url(json.loads(body))
    except ValueError:
        return False  # Gradio says that it is no JSON
    except RecursionError:
        return True


def _names_url(value: Any) -> bool:
    if isinstance(value, dict):
        if "://" in str(value.get("path")):
            return True
        value = list(value.values())
    return isinstance(value, list) and any(map(_names_url, value))
