"""Images that a stranger names in a request to a server."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection
from io import BytesIO
from urllib.parse import SplitResult, urlsplit

from PIL import Image

from ...processing.images import MAX_SECONDS, collect, decode_image

CHUNK_BYTES = 2**16
# Where the public addresses of IPv6 are, but for those of 6to4, which hold an address of IPv4.
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
# What a stranger may send: PIL hands some formats, EPS say, to other programs.
REQUEST_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def load_request_image(url: str, allowed_hosts: Collection[str] = ()) -> Image.Image:
    """Return an image that a stranger names in a request to a server: no file of this machine is read, and nothing is
    fetched but from a host that was allowed.

    Args:
        url: A `data:image/...;base64,` URL, or one with http or https.
        allowed_hosts: See [`download_image`].

    Raises:
        ValueError: it is neither, the host is not allowed, or `decode_image` refuses what is there.
    """
    if isinstance(url, str) and url.startswith(("http://", "https://")):
        url = BytesIO(download_image(url, allowed_hosts))
    elif not (isinstance(url, str) and url.startswith("data:image/") and ";base64," in url):
        raise ValueError(f"found {str(url)[:100]!r}, expected a data:image/...;base64, URL")
    return decode_image(url, REQUEST_FORMATS)  # which reads no file: the URL has the bytes


def download_image(url: str, allowed_hosts: Collection[str]) -> bytes:
    """Return what is behind a URL that a stranger named, on a host that was allowed.

    The name is looked up once, all its addresses must be public, and the connection goes to one of these: a name that
    changes its address between check and use (DNS rebinding) gains nothing. Redirects and proxies are not followed.

    Args:
        url: With http or https.
        allowed_hosts: Names, exactly; with a port (`"images.example:8080"`) unless it is the scheme's own.

    Raises:
        ValueError: the host is not allowed or not public, or what is there can't be fetched in time, or is too large.
    """
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        usual = 443 if secure else 80
        host, port = (parts.hostname or "").lower(), parts.port or usual
        name = host if port == usual else f"{host}:{port}"
        if parts.username is not None or name not in {allowed.lower() for allowed in allowed_hosts}:
            expected = f"one of {sorted(allowed_hosts)}" if allowed_hosts else "the image itself, as a data: URL"
            raise ValueError(f"the host {name!r} is not allowed, expected {expected}")
        with socket.create_connection((_public_address(host, port), port), timeout=MAX_SECONDS) as connection:
            return _request(connection, parts, name, ssl.create_default_context() if secure else None)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{url[:200]!r} cannot be fetched ({error}), expected the URL of an image") from error


def _public_address(host: str, port: int) -> str:
    """Return the address of a name that the system prefers; ValueError unless all that it has are public."""
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text)
        if address.version == 6:
            address = address.ipv4_mapped or address
        is_odd = address.version == 6 and (address not in GLOBAL_IPV6 or address.sixtofour is not None)
        if is_odd or address.is_multicast or not address.is_global:
            raise ValueError(f"{host} has the address {text}, which is not public")
    return found[0]


def _request(connection: socket.socket, parts: SplitResult, name: str, tls: ssl.SSLContext | None) -> bytes:
    """Return what a GET brings over a connection, which ends after `MAX_SECONDS` whatever the server does."""
    deadline = time.monotonic() + MAX_SECONDS
    with connection.dup() as guard:  # a server that sends a byte now and then never makes the socket time out
        watch = threading.Timer(MAX_SECONDS, guard.shutdown, [socket.SHUT_RDWR])
        watch.daemon = True
        watch.start()
        try:
            with contextlib.closing(http.client.HTTPConnection(parts.hostname)) as client:
                client.sock = tls.wrap_socket(connection, server_hostname=parts.hostname) if tls else connection
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                client.request("GET", target, headers={"Host": name, "Accept": "image/*"})
                response = client.getresponse()
                if response.status != 200:
                    note = ", and redirects are not followed" if 300 <= response.status < 400 else ""
                    raise ValueError(f"the server answers {response.status}{note}")
                return collect(iter(lambda: response.read(CHUNK_BYTES), b""), deadline)
        except OSError as error:  # the watch's end of the connection may be a reset
            late = time.monotonic() > deadline
            raise ValueError(f"not complete after {MAX_SECONDS} seconds" if late else str(error)) from error
        finally:
            watch.cancel()
