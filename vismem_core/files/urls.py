"""Images from the web, where that is asked for: public addresses only, within limits of time and size.

What a URL in somebody's data names must not become a way into the network of whoever reads the data, so every address
that a name resolves to is looked at, and the connection goes to one that was. No proxy, cookie or password is used.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from vismem_core.base.images import verify
from vismem_core.errors import DataError, cut

from . import cache

HOPS = 5
"""Redirects that are followed."""
MOVED = (301, 302, 303, 307, 308)
SECONDS, LIMIT = 10.0, 20_000_000
HEADERS = (("User-Agent", "vismem"), ("Accept", "image/*,*/*;q=0.5"), ("Accept-Encoding", "identity"))
NAT64 = ipaddress.ip_network("64:ff9b::/96")
PLAIN = "%/:=&?~#+!$,;'@()*[]"
"""Characters that a URL's path and query may hold as they are."""


def fetch(url: str, *, seconds: float = SECONDS, limit: int = LIMIT) -> bytes:
    """What a URL gives.

    Args:
        seconds: for all of it, redirects included.
        limit: bytes that it may be long.

    Raises:
        DataError: it is not http or https, a name in its way leads to an address that is not public, it takes too long
            or is too large, or there is nothing at it.
    """
    until = time.monotonic() + seconds
    told = f"the URL {cut(url)!r}"
    try:
        for _ in range(HOPS + 1):
            data, onward = _get(url, until, limit)
            if onward is None:
                return data
            url = urljoin(url, onward)
    except httpcore.TimeoutException as error:
        raise DataError(f"{told} takes more than {seconds:g} seconds") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError, ValueError) as error:
        raise DataError(
            f"{told} cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
        ) from error
    except DataError as error:
        raise DataError(f"{told} {error}") from error
    raise DataError(f"{told} redirects more than {HOPS} times")


def stored(url: str) -> Path:
    """The image at a URL as a file in the user's cache, fetched where it is not there yet.

    Raises:
        DataError: see :func:`fetch`; or it is no image, or cannot be kept.
    """
    place = cache.folder("images") / hashlib.sha256(url.encode()).hexdigest()
    if not place.is_file():
        data = fetch(url)
        try:
            verify(data)
            cache.keep(place, data)
        except DataError as error:
            raise DataError(f"the URL {cut(url)!r} gives no image, or a damaged one") from error
        except OSError as error:
            raise DataError(f"{place}: cannot be written: {error.strerror}") from error
    return place


def public(address: str) -> bool:
    """Whether an IP address is one of the internet: not private, loopback, link-local, multicast or reserved, and none
    that stands for such a one (IPv4 inside IPv6)."""
    own = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(own, ipaddress.IPv6Address):
        if own.ipv4_mapped or own.sixtofour or own.teredo or own in NAT64:
            return False
        if own.is_site_local:
            return False
    return own.is_global and not (own.is_multicast or own.is_reserved or own.is_unspecified or own.is_loopback)


def _get(url: str, until: float, limit: int) -> tuple[bytes, str | None]:
    """The body, or where it has moved."""
    target = _target(url)
    with httpcore.ConnectionPool(network_backend=_Checked(until), retries=0) as pool:
        left = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), max(0.0, until - time.monotonic()))}
        with pool.stream("GET", target, headers=HEADERS, extensions=left) as response:
            if response.status in MOVED:
                if not (where := _header(response.headers, b"location")):
                    raise DataError(f"gives status {response.status} and says not where it has moved")
                return b"", where.decode("utf-8", "replace")
            if response.status != 200:
                raise DataError(f"gives status {response.status}")
            length = _header(response.headers, b"content-length")
            if length is not None and length.isdigit() and int(length) > limit:
                raise DataError(f"gives more than {limit:,} bytes")
            return _body(response.iter_stream(), until, limit), None


def _body(parts: Iterable[bytes], until: float, limit: int) -> bytes:
    data = bytearray()
    for part in parts:
        data += part
        if len(data) > limit:
            raise DataError(f"gives more than {limit:,} bytes")
        if time.monotonic() > until:
            raise httpcore.ReadTimeout
    return bytes(data)


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    return next((value for key, value in headers if key.lower() == name), None)


def _target(url: str) -> str:
    """The URL in ASCII, if it is one that may be asked for."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise DataError(f"is not http or https but {cut(parts.scheme)!r}")
    if "@" in parts.netloc:
        raise DataError("holds a user's name or password")
    if not parts.hostname:
        raise DataError("names no host")
    host = parts.hostname if ":" in parts.hostname else parts.hostname.encode("idna").decode()
    place = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port is not None else ""
    query = f"?{quote(parts.query, safe=PLAIN)}" if parts.query else ""
    return f"{parts.scheme}://{place}{port}{quote(parts.path, safe=PLAIN) or '/'}{query}"


class _Checked(httpcore.NetworkBackend):
    """Connects to addresses that were looked at, and to nothing after ``until``."""

    def __init__(self, until: float) -> None:
        self.until, self.plain = until, httpcore.SyncBackend()

    def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.NetworkStream:
        found = _resolved(host, port, self.until)
        if barred := next((own for own in found if not public(own)), None):
            raise DataError(f"leads to {barred}, which is no public address")
        for at, address in enumerate(found, 1):
            try:
                return _Timed(self.plain.connect_tcp(address, port, timeout=_left(self.until)), self.until)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if at == len(found):
                    raise
        raise DataError("names no host that is known")


class _Timed(httpcore.NetworkStream):
    """A stream that nothing holds open for longer than until one moment, however little it gives at a time."""

    def __init__(self, inner: httpcore.NetworkStream, until: float) -> None:
        self.inner, self.until = inner, until

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.inner.read(max_bytes, _left(self.until))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, _left(self.until))

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Timed(self.inner.start_tls(ssl_context, server_hostname, _left(self.until)), self.until)

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left


def _resolved(host: str, port: int, until: float) -> list[str]:
    """Every address of a name. The system's resolver knows no limit of time, so it works in a thread beside."""
    found: list[str] = []
    failed: list[str] = []

    def ask() -> None:
        try:
            told = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(own[4][0]) for own in told))
        except (OSError, ValueError) as error:
            failed.append(getattr(error, "strerror", None) or str(error))

    asking = threading.Thread(target=ask, name="vismem-resolve", daemon=True)
    asking.start()
    asking.join(_left(until))
    if asking.is_alive():
        raise httpcore.ConnectTimeout
    if failed:
        raise DataError(f"names a host that is not known ({failed[0]})")
    return list(found)
