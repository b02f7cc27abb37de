"""Pictures and lessons that strangers upload."""

import asyncio
import json
import tracemalloc
import zipfile

import pytest
from PIL import Image

from tinyalign_vlm.training.inference import uploads
from tinyalign_vlm.training.inference.uploads import Guard, names_url, read_lessons, read_picture

from .conftest import png

RED, BLUE = (png(Image.new("RGB", (9, 7), colour)) for colour in ("red", "blue"))
FILES = {"lessons.csv": b"image,caption,more\na.png,a red thing,1\nb.png,\xc3\xa9t\xc3\xa9,2\n"}
FILES |= {"a.png": RED, "b.png": BLUE}


@pytest.fixture
def put(tmp_path):
    """`put(files, zipped)`: their paths, or that of a zip file of them."""

    def put(files: dict[str, bytes], zipped: bool) -> list:
        if zipped:
            with zipfile.ZipFile(tmp_path / "lessons.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            return [tmp_path / "lessons.zip"]
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        return [tmp_path / name for name in files]

    return put


@pytest.mark.parametrize("zipped", [True, False])
def test_lessons(put, zipped):
    found = list(read_lessons(put(FILES, zipped)))
    assert [line for _, line in found] == ["a red thing", "été"]
    assert [picture.getpixel((0, 0)) for picture, _ in found] == [(255, 0, 0), (0, 0, 255)]


def test_a_zip_file_of_a_folder(put):
    files = {f"birds/{name}": content for name, content in FILES.items()}
    assert len(list(read_lessons(put(files, True)))) == 2
    files["//x.png"] = b"of no row"  # zipfile.Path never ends with it in some versions of Python
    files["birds/lessons.csv"] = b"\xef\xbb\xbfimage,caption\nbirds/a.png,one\n"  # Excel begins so
    assert [line for _, line in read_lessons(put(files, True))] == ["one"]


def test_accents_in_either_form_and_folders_of_windows(put):
    table = "image,caption\nbirds\\Zaunk\u00f6nig.png,x\n".encode()
    files = {"birds/Zaunko\u0308nig.png": RED, "lessons.csv": table}
    assert [line for _, line in read_lessons(put(files, True))] == ["x"]


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_mac_leaves_behind(put, zipped):
    folder = "__MACOSX/" if zipped else ""
    files = {f"{folder}._{name}": b"of the Finder" for name in FILES} | {".DS_Store": b"of the Finder"}
    assert len(list(read_lessons(put({**FILES, **files}, zipped)))) == 2


@pytest.mark.parametrize(
    ("name", "pictures", "found"),
    [
        ("a.png", ["cats/a.png"], True),
        ("a.png", ["cats/a.png", "dogs/a.png"], False),
        ("cats/a.png", ["a.png"], True),
        ("cats/a.png", ["all/cats/a.png", "b.png"], True),
        ("cats/a.png", ["dogs/a.png"], False),
        ("cats/a.png", ["cats/a.png", "dogs/a.png", "a.png"], True),
        ("cats/a.png", ["all/cats/a.png", "all/dogs/a.png"], True),
        ("a.png", ["ba.png"], False),
    ],
)
def test_the_picture_of_a_row_of_a_zip_file(put, name, pictures, found):
    files = dict.fromkeys(pictures, BLUE) | {pictures[0]: RED}
    lessons = read_lessons(put({**files, "lessons.csv": f"image,caption\n{name},x\n".encode()}, True))
    if found:
        ((picture, _),) = lessons
        assert picture.getpixel((0, 0)) == (255, 0, 0)
    else:
        with pytest.raises(ValueError, match="which was not uploaded"):
            list(lessons)


def test_a_folder_with_two_pictures_of_one_name(put, tmp_path):
    (tmp_path / "dogs").mkdir()
    paths = put({**FILES, "dogs/a.png": BLUE}, False)  # Gradio keeps the names alone
    with pytest.raises(ValueError, match="several files named a.png: upload the folder as a zip file"):
        list(read_lessons(paths))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lessons.csv": b"file,text\na.png,x\n"}, r"columns are \['file', 'text'\], expected image and caption"),
        ({"lessons.csv": b"\xff\xfe"}, "lessons.csv cannot be read .*: save it as UTF-8"),
        ({"lessons.csv": b'image,caption\na.png,"open\nb.png,x\n'}, "lessons.csv cannot be read .*end of data"),
        ({"lessons.csv": b"image,caption\nc.png,x\n"}, "names the picture 'c.png', which was not uploaded"),
        ({"lessons.csv": b"image,caption\n../../etc/passwd,x\n"}, "which was not uploaded"),
        ({"other.csv": b""}, "Found 2 CSV files among 4 files, expected one"),
        ({"a.png": b"no picture"}, "a.png: the image cannot be read"),
        ({"lessons.csv": b"image,caption\n" + b"a.png,x\n" * 201}, "has more than 200 rows, expected at most so many"),
    ],
)
def test_bad_lessons(put, zipped, changed, message):
    with pytest.raises(ValueError, match=message):
        list(read_lessons(put({**FILES, **changed}, zipped)))


def test_a_zip_bomb(put, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_IMAGE_BYTES", 2**16)
    with pytest.raises(ValueError, match="a.png.* has more than 65536 bytes"):
        list(read_lessons(put({**FILES, "a.png": bytes(2**17)}, True)))
    with pytest.raises(ValueError, match="The zip file holds .* bytes in 4 files, expected at most"):
        list(read_lessons(put({**FILES, "c.png": bytes(uploads.MAX_UPLOAD_BYTES)}, True)))


def test_a_zip_file_that_lies_about_its_sizes(put, tmp_path):
    (path,) = put({**FILES, "a.png": bytes(2**20)}, True)
    content = path.read_bytes().replace((2**20).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.png"):
        list(read_lessons([path]))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_broken_picture_of_a_zip_file(tmp_path, method):
    path = tmp_path / "lessons.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        entry = archive.getinfo("a.png")
    start, content = entry.header_offset + 30 + len("a.png"), bytearray(path.read_bytes())
    content[start : start + entry.compress_size] = b"\xff" * entry.compress_size
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.png: the file is broken or has a password"):
        list(read_lessons([path]))


@pytest.mark.parametrize("place", [0, 6])  # the mark of the list of files, and the version it asks for
def test_a_broken_zip_file(put, place):
    (path,) = put(FILES, True)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + place] = 99
    path.write_bytes(content)
    with pytest.raises(ValueError, match="The zip file cannot be read .*: pack it anew"):
        list(read_lessons([path]))


def test_an_endless_table_takes_no_memory(put):
    paths = put({**FILES, "lessons.csv": b"image,caption\n" + b"a.png,x\n" * 400_000}, False)
    tracemalloc.start()
    with pytest.raises(ValueError, match="has more than 200 rows"):
        list(read_lessons(paths))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20
    with pytest.raises(ValueError, match=f"lessons.csv has more than {uploads.MAX_CSV_BYTES} bytes"):
        list(read_lessons(put({**FILES, "lessons.csv": b"image,caption" + b"," * uploads.MAX_CSV_BYTES}, False)))
    wide = b"image," * 200_000
    with pytest.raises(ValueError, match=r"its columns are .* expected image and caption") as caught:
        list(read_lessons(put({**FILES, "lessons.csv": wide}, False)))
    assert len(str(caught.value)) < 1000


def test_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    assert read_picture(tmp_path / "a.png").size == (9, 7)
    Image.new("RGB", (9, 7)).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match="cannot be read"):
        read_picture(tmp_path / "a.eps")
    Image.new("1", (15_000, 15_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="the image is too large"):
        read_picture(tmp_path / "huge.png")
    (tmp_path / "big.png").write_bytes(bytes(uploads.MAX_IMAGE_BYTES + 1))
    with pytest.raises(ValueError, match="big.png has more than"):
        read_picture(tmp_path / "big.png")


def test_urls_are_found_wherever_they_are():
    file = {"path": "https://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    for value in (file, [file], {"data": [1, {"deep": [file]}]}, {"path": "HTTP://x"}, {"path": "ftp://x"}):
        assert names_url(json.dumps(value).encode())
    assert names_url(b"[" * 100_000 + b"]" * 100_000)
    for text in ('{"data": ["see https://example.com", {"path": "/tmp/x.png", "url": "http://a/x"}]}', "no JSON"):
        assert not names_url(text.encode())


def answer(method: str, path: str, *chunks: bytes, size: int | None = None) -> tuple[int, bytes]:
    """The guard's status, and what the application behind it has received."""
    received, sent = [], []
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request":
            received.append(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    headers = [] if size is None else [(b"content-length", str(size).encode())]
    asyncio.run(Guard(app)({"type": "http", "method": method, "path": path, "headers": headers}, receive, send))
    return sent[0]["status"], b"".join(received)


def test_the_guard(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 100)
    assert answer("GET", "/gradio_api/file=/tmp/x.png") == (200, b"")
    assert answer("HEAD", "/gradio_api/file=http://x/y") == (403, b"")
    assert answer("POST", "/gradio_api/call/ask", b'{"data": ', b'["x"]}') == (200, b'{"data": ["x"]}')
    assert answer("POST", "/gradio_api/call/ask", b'{"path": "http:', b'//x"}') == (403, b"")
    assert answer("POST", "/gradio_api/call/ask", b"x" * 2**20, b"x") == (413, b"")
    assert answer("POST", "/gradio_api/upload", b"x" * 60, b"x" * 40) == (200, b"x" * 100)
    assert answer("POST", "/gradio_api/upload", b"x" * 60, b"x" * 60) == (200, b"x" * 60)
    assert answer("POST", "/gradio_api/upload", b"x", size=100) == (200, b"x")
    assert answer("POST", "/gradio_api/upload", b"x", size=101) == (413, b"")
    assert answer("POST", "/gradio_api/call/ask", b"x", size=2**20 + 1) == (413, b"")
    assert answer("POST", "/gradio_api/run/upload", b'{"path": "http://x"}') == (403, b"")  # is no upload
    assert answer("POST", "/gradio_api/process_recording", b"x") == (403, b"")
