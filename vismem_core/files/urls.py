"""Images from the web: public addresses only, within limits of time and size."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

from vismem_core.errors import DataError, cut

HOPS = 5
MOVED = (301, 302, 303, 307, 308)


def fetch(url: str, *, seconds: float = 10.0, limit: int = 20_000_000) -> bytes:
    """What a URL gives.

    Raises:
        DataError: it is not http or https, leads to an address that is not public, takes too long or is too large.
    """
    until = time.monotonic() + seconds
    try:
        for _ in range(HOPS):
            data, onward = _get(url, until, limit)
            if onward is None:
                return data
            url = urljoin(url, onward)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"the URL {cut(url)!r} cannot be read: {cut(error, 200)}") from error
    raise DataError(f"the URL {cut(url)!r} redirects too often")


def _get(url: str, until: float, limit: int) -> tuple[bytes, str | None]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise DataError(f"the URL {cut(url)!r} is no plain http or https")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    found = [str(own[4][0]) for own in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)]
    for address in found:
        own = ipaddress.ip_address(address.partition("%")[0])
        if not own.is_global or own.is_multicast or getattr(own, "ipv4_mapped", None):
            raise DataError(f"the URL {cut(url)!r} leads to {address}, which is no public address")
    plain = socket.create_connection((found[0], port), timeout=max(0.1, until - time.monotonic()))
    with ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname) if secure else plain as own_:
        connection = http.client.HTTPConnection(parts.hostname, port)
        connection.sock = own_
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        response = connection.getresponse()
        if response.status in MOVED:
            return b"", response.getheader("location") or ""
        if response.status != 200:
            raise DataError(f"the URL {cut(url)!r} gives status {response.status}")
        data = bytearray()
        while part := response.read1(65536):
            data += part
            if len(data) > limit or time.monotonic() > until:
                raise DataError(f"the URL {cut(url)!r} gives too much, or takes too long")
        return bytes(data), None
