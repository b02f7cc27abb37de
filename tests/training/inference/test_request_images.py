"""Images that a stranger names: nothing but public, allowed hosts is asked, once, for a while, and for so much."""

import base64
import http.server
import io
import socket
import ssl
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from tinyalign_vlm.processing import images
from tinyalign_vlm.processing.images import load_image
from tinyalign_vlm.training.inference import request_images
from tinyalign_vlm.training.inference.request_images import load_request_image

from .conftest import png

PUBLIC = "93.184.215.14"
HOSTS = ["images.example"]
NO_URL = "Port out of range|Invalid IPv6 URL"


def set_seconds(monkeypatch, seconds: float) -> None:
    for module in (images, request_images):
        monkeypatch.setattr(module, "MAX_SECONDS", seconds)


RED = png(Image.new("RGB", (6, 4), "red"))


class Handler(http.server.BaseHTTPRequestHandler):
    """What a host might answer, by path."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Host"]))
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", "/red.png")
            self.end_headers()
        elif self.path == "/missing.png":
            self.send_error(404)
        elif self.path == "/slow.png":
            self.send_response(200)
            self.end_headers()
            for _ in range(1200):  # never silent for long, a minute
                self.wfile.write(b"\0")
                time.sleep(0.05)
        elif self.path == "/slow-head.png":
            for letter in b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 200:
                self.wfile.write(bytes([letter]))
                time.sleep(0.05)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"\0" * 5000 if self.path == "/large.png" else RED)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *arguments: None  # clients go away here
        server.requests = []
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def internet(server, monkeypatch):
    """Every name has a public address, but for those in `names`; whatever is dialled, the server answers."""
    internet = SimpleNamespace(names={}, lookups=[], dialled=[])

    def getaddrinfo(host, port, **options):
        internet.lookups.append(host)
        return [(0, 0, 0, "", (address, port)) for address in internet.names.get(host, [PUBLIC])]

    def create_connection(address, timeout):
        internet.dialled.append(address)
        assert timeout == request_images.MAX_SECONDS
        connection = socket.socket()
        connection.settimeout(60)  # a server that is silent for a while, on a slow machine, is not what is tested
        connection.connect(server.server_address)
        return connection

    monkeypatch.setattr(request_images.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(request_images.socket, "create_connection", create_connection)
    return internet


def test_an_allowed_host(internet, server):
    image = load_request_image("http://images.example/a/red.png?size=6", HOSTS)
    assert image.size == (6, 4) and image.getpixel((0, 0)) == (255, 0, 0)
    assert server.requests == [("/a/red.png?size=6", "images.example")]
    assert internet.dialled == [(PUBLIC, 80)]
    load_request_image("http://IMAGES.example:8080/red.png", ["images.example:8080"])
    assert internet.dialled[1] == (PUBLIC, 8080) and server.requests[1][1] == "images.example:8080"
    load_request_image("http://images.example/red\r\nHost:x.png", HOSTS)
    assert server.requests[2] == ("/redHost:x.png", "images.example")  # no line breaks into the request


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/red.png",
        "http://images.example.other.example/red.png",
        "http://images.example:8080/red.png",
        "http://images.example@other.example/red.png",
        "http://user@images.example/red.png",
        "http://other.example\\@images.example/red.png",
        "http://images.example./red.png",
        "http://127.0.0.1/red.png",
        "http://2130706433/red.png",
        "http:///red.png",
        "http://images.example:99999/red.png",
        "http://[::1/red.png",
    ],
)
def test_other_hosts_are_not_asked(url, internet):
    with pytest.raises(ValueError, match=rf"is not allowed, expected one of \['images.example'\]|{NO_URL}"):
        load_request_image(url, HOSTS)
    with pytest.raises(ValueError, match=f"is not allowed, expected the image itself, as a data: URL|{NO_URL}"):
        load_request_image(url)
    assert not internet.lookups and not internet.dialled


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
    ],
)
def test_addresses_that_are_not_public(address, internet):
    for addresses in ([address], [PUBLIC, address]):
        internet.names["images.example"] = addresses
        with pytest.raises(ValueError, match="images.example has the address .*, which is not public"):
            load_request_image("http://images.example/red.png", HOSTS)
    assert not internet.dialled


def test_a_name_that_changes_its_address(internet, monkeypatch):
    """DNS rebinding: public when it is checked, private when it is used. It is looked up once, for both."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    monkeypatch.setattr(
        request_images.socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", (next(answers)[0], port))]
    )
    load_request_image("http://images.example/red.png", HOSTS)
    assert internet.dialled == [(PUBLIC, 80)] and list(answers) == [["127.0.0.1"]]


def test_https_asks_for_the_certificate_of_the_name(internet, monkeypatch):
    asked = []

    class Context:
        def wrap_socket(self, connection, server_hostname):
            asked.append(server_hostname)
            if server_hostname == "stolen.example":
                raise ssl.SSLCertVerificationError("Hostname mismatch")
            return connection

    monkeypatch.setattr(request_images.ssl, "create_default_context", Context)
    load_request_image("https://images.example/red.png", HOSTS)
    with pytest.raises(ValueError, match="stolen.example.* cannot be fetched .*Hostname mismatch"):
        load_request_image("https://stolen.example/red.png", ["stolen.example"])
    assert asked == ["images.example", "stolen.example"] and internet.dialled == [(PUBLIC, 443)] * 2
    # and the context is the one that checks
    assert ssl.create_default_context is Context
    monkeypatch.undo()
    context = ssl.create_default_context()
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("redirect", "the server answers 302, and redirects are not followed"),
        ("missing.png", "the server answers 404"),
        ("large.png", "more than 4000 bytes"),
        ("slow.png", "not complete after 0.4 seconds"),
        ("slow-head.png", "cannot be fetched"),
        ("space here.png", "cannot be fetched"),
    ],
)
def test_answers_that_are_refused(path, message, internet, server, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 4000)
    set_seconds(monkeypatch, 0.4 if "slow" in path else 60)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load_request_image(f"http://images.example/{path}", HOSTS)
    assert time.monotonic() - start < 30  # of the minute that slow answers take
    assert "/red.png" not in [path for path, _ in server.requests]


def test_a_connection_that_is_reset_when_time_is_up(internet, server, monkeypatch):
    """What ending the connection makes of it is the system's: a reset, or an end."""

    def reset(client):
        time.sleep(0.3)
        raise ConnectionResetError(104, "Connection reset by peer")

    set_seconds(monkeypatch, 0.1)
    monkeypatch.setattr("http.client.HTTPConnection.getresponse", reset)
    with pytest.raises(ValueError, match="cannot be fetched .not complete after 0.1 seconds."):
        load_request_image("http://images.example/red.png", HOSTS)


def test_a_host_that_is_silent(internet, monkeypatch):
    set_seconds(monkeypatch, 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        connection = socket.socket()
        connection.connect(silent.getsockname())
        connection.settimeout(5)
        monkeypatch.setattr(request_images.socket, "create_connection", lambda address, timeout: connection)
        with pytest.raises(ValueError, match="cannot be fetched"):
            load_request_image("http://images.example/red.png", HOSTS)


def test_images_in_the_request():
    image = Image.new("RGB", (6, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    for data, size in ((png(image), (6, 4)), (png(image, exif=exif), (4, 6))):
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        assert load_request_image(url).size == size
    in_lines = base64.encodebytes(png(image)).decode().rstrip("=\n")  # not padded
    assert load_request_image(f"data:image/png;base64,{in_lines}").size == (6, 4)
    with pytest.raises(ValueError, match="expected a data:image/...;base64, URL"):
        load_request_image("data:image/svg+xml;utf8,<svg/>")
    file = io.BytesIO()
    image.save(file, "TIFF")
    tiff = base64.b64encode(file.getvalue()).decode()
    with pytest.raises(ValueError, match="expected an intact image in one of PNG, .*: convert HEIC"):
        load_request_image(f"data:image/tiff;base64,{tiff}")


def test_what_no_request_may_name(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(RED)
    eps = io.BytesIO()
    Image.new("RGB", (6, 4)).save(eps, "EPS")
    bare = base64.b64encode(RED).decode()
    for source in (
        str(path),
        f"file://{path}",
        "ftp://images.example/red.png",
        bare,
        "",
        None,
        RED,
        "data:text/html,x",
    ):
        with pytest.raises(ValueError, match="expected a data:image/...;base64, URL"):
            load_request_image(source, HOSTS)
    for data in ("", "data:image/png,raw", "####", base64.b64encode(eps.getvalue()).decode()):
        with pytest.raises(ValueError, match="expected base64|the image cannot be read"):
            load_request_image(f"data:image/eps;base64,{data}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match="the image is too large .*24 pixels.* expected at most 20 pixels"):
        load_request_image(f"data:image/png;base64,{bare}")


def test_a_users_own_urls(server, monkeypatch):
    """They may be anywhere and redirect, but have to end as well."""
    url = "http://127.0.0.1:{}/{}".format(server.server_address[1], "{}")
    for path in ("red.png", "redirect"):
        assert load_image(url.format(path)).size == (6, 4)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 4000)
    for path, message in (
        ("large.png", "more than 4000"),
        ("missing.png", "404"),
        ("slow.png", "not complete|timed out"),
    ):
        set_seconds(monkeypatch, 0.4 if path == "slow.png" else 60)
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"image 2: .*cannot be downloaded .*{message}"):
            load_image(url.format(path), "image 2")
        assert time.monotonic() - start < 30  # of the minute that a slow answer takes


def test_the_address_that_the_system_prefers(internet):
    """Sorted, an IPv6 address would come first, which many machines cannot reach."""
    internet.names["images.example"] = ["52.85.10.11", "2600:9000::1"]
    load_request_image("http://images.example/red.png", HOSTS)
    assert internet.dialled == [("52.85.10.11", 80)]
