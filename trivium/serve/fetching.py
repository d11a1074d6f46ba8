"""Pictures that a request names by URL: fetched only where the server allows it, and never from inside.

A name is resolved once, every address it has must be a public one, and the connection goes to the very
address that was checked, so that a name which resolves differently the next time (DNS rebinding) gains
nothing. A redirect is a new URL, checked like the first. When the time is over, the socket is shut down
from outside: a limit for each read would not end a server that sends a byte now and then.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from trivium.serve.failures import RequestRefused

MOST_BYTES = 16 << 20
MOST_REDIRECTS = 3
SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}
_BLOCK = 1 << 16
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure's services for its own machines
            "192.0.0.0/24",  # protocol assignments; Oracle's cloud answers its machines there
            "192.88.99.0/24",  # relays of 6to4
            "3fff::/20",  # documentation
        ),
    )
)
"""Addresses that Python's tables call public, or did in some version, and that lead inside."""


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also where it is wrapped in one of version 6."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if inner:
            return is_public(str(inner))
        # NAT64 reaches whatever stands in its last four bytes.
        if found in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.is_site_local:
            return False
    if any(found in network for network in _NOT_PUBLIC):
        return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def _refused(why: str) -> RequestRefused:
    return RequestRefused(f"a picture's URL {why}", parameter="messages", code="invalid_image_url")


def checked_address(url: SplitResult) -> tuple[str, int]:
    """The address to connect to, every one that the URL's host has being public."""
    if url.scheme not in _PORTS:
        raise _refused(f"is of the scheme {url.scheme[:20]!r}; http and https are fetched")
    try:
        port = url.port or _PORTS[url.scheme]
        host = url.hostname
    except ValueError:
        raise _refused("has no port that can be read") from None
    if not host:
        raise _refused("names no host")
    if port != _PORTS[url.scheme]:
        raise _refused(f"names the port {port}; only {_PORTS[url.scheme]} is fetched from")
    if url.username is not None or url.password is not None:
        raise _refused("holds a user's name or password, which is not sent")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _refused("names a host that cannot be found") from None
    addresses = [str(one[4][0]) for one in found]
    if not addresses or not all(map(is_public, addresses)):
        raise _refused("leads to an address that is not public, which is never fetched")
    return addresses[0], port


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, for a host that is named."""

    def __init__(self, host: str, address: str, port: int, encrypted: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self._address, self._encrypted = address, encrypted
        self._open: socket.socket | None = None

    def connect(self) -> None:
        self._open = self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._encrypted:
            context = ssl.create_default_context()
            # The handshake comes after the socket is known, so that it can be cut as well.
            self._open = self.sock = context.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()

    def cut(self) -> None:
        """Shut the socket down, under its encryption, so that whatever waits for it goes on."""
        if self._open is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._open, socket.SHUT_RDWR)


def all_fetched(urls: Iterable[str], *, seconds: float = SECONDS) -> dict[str, bytes]:
    """What lies at each URL, together of at most MOST_BYTES and within so many seconds."""
    until, left = time.monotonic() + seconds, MOST_BYTES
    found: dict[str, bytes] = {}
    for url in urls:
        found[url] = fetched(url, seconds=until - time.monotonic(), most=left)
        left -= len(found[url])
    return found


def fetched(url: str, *, seconds: float = SECONDS, most: int | None = None) -> bytes:
    """What lies at a URL, of at most so many bytes (MOST_BYTES) and within so many seconds."""
    until, most = time.monotonic() + seconds, MOST_BYTES if most is None else most
    for _ in range(MOST_REDIRECTS + 1):
        try:
            parts = urlsplit(url)
        except ValueError:
            raise _refused("cannot be read") from None
        address, port = checked_address(parts)
        assert parts.hostname is not None
        left = until - time.monotonic()
        if left <= 0:
            raise _refused("takes too long")
        connection = _Connection(parts.hostname, address, port, parts.scheme == "https", left)
        timer = threading.Timer(left, connection.cut)
        timer.daemon = True
        timer.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"User-Agent": "trivium", "Accept": "image/*", "Accept-Encoding": "identity"}
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                url = urljoin(url, answer.getheader("Location") or "")
                continue
            if answer.status != 200:
                raise _refused(f"answers with status {answer.status}")
            return _body(answer, until, most)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= until:
                raise _refused("takes too long") from None
            raise _refused(f"cannot be fetched: {type(error).__name__}") from None
        finally:
            timer.cancel()
            connection.close()
    raise _refused(f"leads on more than {MOST_REDIRECTS} times")


def _body(answer: http.client.HTTPResponse, until: float, most: int) -> bytes:
    received = bytearray()
    while block := answer.read1(_BLOCK):
        received += block
        if len(received) > most:
            raise _refused(f"holds more than {most:,} bytes")
    # A socket that was cut looks like the end of a body.
    if time.monotonic() >= until:
        raise _refused("takes too long")
    return bytes(received)
