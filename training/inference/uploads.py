"""Pictures and lessons that strangers upload, and a guard that keeps Gradio from fetching what they name."""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from PIL import Image
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...processing.images import MAX_IMAGE_BYTES, decode_image
from .request_images import REQUEST_FORMATS

MAX_ROWS = 200  # of the CSV of one upload
MAX_CSV_BYTES = 2**22
MAX_FILES = 10_000  # in a zip file
MAX_UPLOAD_BYTES = 8 * MAX_IMAGE_BYTES  # of one request, and of what a zip file holds
MAX_CALL_BYTES = 2**20  # of a request without files: a question, two numbers
COLUMNS = ["image", "caption"]

Opener = Callable[[], io.BufferedIOBase]


def read_picture(path: str | Path) -> Image.Image:
    """Return an uploaded picture; `ValueError` in words if it is broken, too large or of another format."""
    return _decoded(partial(open, path, "rb"), Path(path).name)


def read_lessons(paths: list[str | Path]) -> Iterator[tuple[Image.Image, str]]:
    """Yield picture and line of each row of the CSV among uploaded files, or in a zip file.

    Args:
        paths: one zip file, or files of one folder. The CSV has the columns `image`, a file's name, and `caption`.

    Raises:
        ValueError: there is no such CSV, a picture is missing or broken, or it is too much. Rows before were yielded.
    """
    if len(paths) == 1 and zipfile.is_zipfile(paths[0]):
        try:
            archive = zipfile.ZipFile(paths[0])
        except Exception as error:  # zipfile raises BadZipFile, NotImplementedError, struct.error and others
            raise ValueError(f"The zip file cannot be read ({error}): pack it anew.") from error
        with archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            declared = sum(entry.file_size for entry in entries)
            if declared > MAX_UPLOAD_BYTES or len(entries) > MAX_FILES:
                raise ValueError(
                    f"The zip file holds {declared} bytes in {len(entries)} files, expected at most "
                    f"{MAX_UPLOAD_BYTES} in {MAX_FILES}: make several of it."
                )
            # bytes beyond a declared size are an error of zipfile's
            # not zipfile.Path: with a name that begins with "//", it never ends in Python before 3.11.10
            yield from _lessons([(entry.filename, partial(archive.open, entry.filename)) for entry in entries])
    else:
        yield from _lessons([(Path(path).name, partial(open, path, "rb")) for path in paths])


def _lessons(uploads: list[tuple[str, Opener]]) -> Iterator[tuple[Image.Image, str]]:
    files: dict[str, Opener] = {}
    for name, file in uploads:
        if name in files:  # in subfolders, of which Gradio tells nothing
            raise ValueError(f"There are several files named {name:.100}: upload the folder as a zip file.")
        if not PurePosixPath(name).name.startswith("."):  # left by a system, "._a.png" of a Mac say
            files[normalize("NFC", name)] = file  # a Mac writes accents apart
    tables = [name for name in files if name.lower().endswith(".csv")]
    if len(tables) != 1:
        raise ValueError(f"Found {len(tables)} CSV files among {len(files)} files, expected one, beside the pictures.")
    folder = PurePosixPath(tables[0]).parent
    for row in _rows(files[tables[0]], tables[0]):
        name = normalize("NFC", row["image"] or "").replace("\\", "/")
        file = files.get(str(folder / name)) or files.get(name) or _only_end(files, name)
        if file is None:
            raise ValueError(f"{tables[0]} names the picture {name!r:.100}, which was not uploaded.")
        try:
            picture = _decoded(file, name)
        except ValueError as error:
            raise ValueError(f"{name:.100}: {error}") from error
        yield picture, row["caption"] or ""


def _rows(file: Opener, name: str) -> list[dict[str, str | None]]:
    try:
        text = _limited(file, name, MAX_CSV_BYTES).decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # an open quote would take in all
        if not set(COLUMNS) <= set(rows.fieldnames or []):
            raise ValueError(
                f"its columns are {rows.fieldnames!s:.300}, expected {' and '.join(COLUMNS)} in its first line"
            )
        rows = list(islice(rows, MAX_ROWS + 1))
    except (ValueError, csv.Error) as error:
        hint = ": save it as UTF-8" if isinstance(error, UnicodeError) else ""
        raise ValueError(f"{name} cannot be read ({error}){hint}.") from error
    if len(rows) > MAX_ROWS:
        raise ValueError(f"{name} has more than {MAX_ROWS} rows, expected at most so many at once: split it.")
    return rows


def _only_end(files: dict[str, Opener], name: str) -> Opener | None:
    """Return the only file whose path ends with this name, or of whose path the name is a longer form; else None."""
    ends = [path for path in files if f"/{path}".endswith(f"/{name}") or f"/{name}".endswith(f"/{path}")]
    return files[ends[0]] if len(ends) == 1 else None


def _decoded(open_file: Opener, name: str) -> Image.Image:
    return decode_image(io.BytesIO(_limited(open_file, name, MAX_IMAGE_BYTES)), REQUEST_FORMATS)


def _limited(open_file: Opener, name: str, most: int) -> bytes:
    try:
        with open_file() as file:
            content = file.read(most + 1)
    except Exception as error:  # and its codecs zlib.error, LZMAError, EOFError
        raise ValueError(f"the file is broken or has a password ({error})") from error
    if len(content) > most:
        raise ValueError(f"{name:.100} has more than {most} bytes: make it smaller.")
    return content


class Guard:
    """Refuse requests for which Gradio would fetch a URL, and those that are too large.

    Gradio fetches what a path in a request names with http, as `file=http...` and as any input of any function.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        app = self.app
        if scope["type"] == "http":
            try:
                receive = await checked(scope, receive)
            except HTTPException as refusal:
                app = PlainTextResponse(refusal.detail, refusal.status_code)
        await app(scope, receive, send)


async def checked(scope: Scope, receive: Receive) -> Receive:
    """Return what receives the body of a request; `HTTPException` if the request is refused."""
    path, size = scope["path"], int(Headers(scope=scope).get("content-length", 0))
    is_upload = path.endswith("/gradio_api/upload")
    most = MAX_UPLOAD_BYTES if is_upload else MAX_CALL_BYTES
    if any(f"/{word}=" in path and "://" in path for word in ("file", "proxy", "stream")):
        raise HTTPException(403, "No URL is fetched here.")
    if path.rstrip("/").endswith("/process_recording"):
        raise HTTPException(403, "No recording is taken here: upload a picture.")
    if size > most:
        while (await receive()).get("more_body"):  # a client that still writes would not see the answer
            pass
        raise HTTPException(413, f"The request has {size} bytes, expected at most {most}: send less.")
    receive = counted(receive, most)
    if is_upload or scope["method"] != "POST":
        return receive
    try:
        body = await Request(scope, receive).body()
    except ClientDisconnect as error:
        raise HTTPException(413, f"The request has more than {most} bytes: send less.") from error
    if names_url(body):
        raise HTTPException(403, "No URL is fetched here: upload the file.")
    return replayed(body, receive)


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
    paths = []

    def look_at(found: dict) -> dict:
        paths.append(str(found.get("path")))
        return found

    try:
        json.loads(body, object_hook=look_at)
    except ValueError:
        return False  # Gradio says that it is no JSON
    except RecursionError:
        return True
    return any("://" in path for path in paths)
