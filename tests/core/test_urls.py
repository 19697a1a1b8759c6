"""What may be fetched for a row, from a server of our own that does all that a hostile one may do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vismem_cli.app import app
from vismem_core.errors import DataError
from vismem_core.files import urls
from vismem_core.files.samples import read

OK = b"HTTP/1.1 200 OK\r\n"


def png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Server:
    """Answers each connection by what stands for its path; remembers the heads of requests."""

    def __init__(self) -> None:
        self.socket, self.asked, self.answers = socket.create_server(("127.0.0.1", 0)), list[bytes](), dict[str, Any]()
        self.at = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=self.socket.accept()[:1], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = connection.recv(65536)
            self.asked.append(head)
            answer = self.answers[head.split()[1].decode()]
            answer(connection) if callable(answer) else connection.sendall(answer)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(urls, "public", lambda address: address == "127.0.0.1")
    own = Server()
    yield own
    own.socket.close()


def moved(where: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode()


def drip(start: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(200):
            connection.sendall(b"a")
            time.sleep(0.05)

    return answer


def endless(connection: socket.socket) -> None:
    connection.sendall(OK + b"\r\n")
    while True:
        connection.sendall(b"a" * 65536)


def test_what_is_there_is_fetched(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server.answers |= {"/a%20b?c=%C3%BC": OK + b"Content-Length: 4\r\nSet-Cookie: a=b\r\n\r\nfour"}
    server.answers |= {
        "/1": moved("2"),
        "/2": moved(server.at + "/a b?c=ü#d"),
        "/empty": OK + b"Content-Length: 0\r\n\r\n",
    }
    assert urls.fetch(f"{server.at}/1") == b"four"
    assert urls.fetch(f"{server.at}/empty") == b""
    assert not any(name in head.lower() for head in server.asked for name in (b"cookie", b"authorization"))


BAD: list[tuple[str, Any, str]] = [
    ("gone", b"HTTP/1.1 404 Not Found\r\nContent-Length: 1\r\n\r\nx", "gives status 404"),
    ("round", moved("/round"), "redirects more than 5 times"),
    ("nowhere", b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n", "says not where"),
    ("file", moved("file:///etc/passwd"), "is not http or https but 'file'"),
    ("inside", moved("http://127.0.0.2/"), "leads to 127.0.0.2, which is no public address"),
    ("mapped", moved("http://[::ffff:127.0.0.1]/"), "which is no public address"),
    ("large", OK + b"Content-Length: 99999\r\n\r\n", "gives more than 5,000 bytes"),
    ("endless", endless, "gives more than 5,000 bytes"),
    ("slow body", drip(OK + b"\r\n"), "takes more than 0.4 seconds"),
    ("slow head", drip(OK + b"X: "), "takes more than 0.4 seconds"),
    ("silent", lambda connection: time.sleep(2), "takes more than 0.4 seconds"),
    ("short", OK + b"Content-Length: 9\r\n\r\nfour", "cannot be read"),
    ("other", b"SSH-2.0-OpenSSH\r\n", "cannot be read"),
]


@pytest.mark.parametrize(("name", "answer", "says"), BAD, ids=[name for name, _, _ in BAD])
def test_what_is_refused(name: str, answer: Any, says: str, server: Server) -> None:
    server.answers["/"] = server.answers["/round"] = answer
    began = time.monotonic()
    with pytest.raises(DataError, match=says) as caught:
        urls.fetch(server.at, seconds=0.4, limit=5000)
    assert time.monotonic() - began < 1.5
    assert "\n" not in str(caught.value) and str(caught.value).startswith("the URL 'http://127.0.0.1")


NOT_PUBLIC = "127.0.0.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 255.255.255.255 "
NOT_PUBLIC += "240.0.0.1 :: ::1 fe80::1%eth0 fc00::1 ff02::1 fec0::1 ::ffff:8.8.8.8 64:ff9b::a00:1 2002:a00:1:: 2001::1"


def test_addresses() -> None:
    assert [own for own in NOT_PUBLIC.split() if urls.public(own)] == []
    assert urls.public("93.184.216.34") and urls.public("2606:2800:220:1::1")


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "http://2130706433/", "http://0x7f.1/", "http://[::1]/"])
def test_numbers_that_mean_this_machine(url: str) -> None:
    with pytest.raises(DataError, match="no public address"):
        urls.fetch(url)


@pytest.mark.parametrize(
    "url", ["ftp://a/", "//a/", "http://u:p@a/", "http:///x", "http://a:0x/", "http://[", "http://.."]
)
def test_what_is_no_such_url(url: str) -> None:
    with pytest.raises(DataError, match="the URL "):
        urls.fetch(url, seconds=2)


def test_every_address_of_a_name_is_checked_and_the_checked_one_is_connected_to(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, port = socket.getaddrinfo, int(server.at.rpartition(":")[2])
    told = iter([["127.0.0.1"], ["127.0.0.1", "10.0.0.1"]])  # a third question would be one too many

    def resolve(host: str, *rest: Any, **options: Any) -> list[Any]:
        if host != "rebound.test":
            return real(host, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (own, port)) for own in next(told)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    server.answers["/"] = OK + b"Content-Length: 2\r\n\r\nok"
    assert urls.fetch(f"http://rebound.test:{port}/") == b"ok"
    with pytest.raises(DataError, match=r"leads to 10\.0\.0\.1"):
        urls.fetch(f"http://rebound.test:{port}/")


def test_a_resolver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(0.8) or [])
    with pytest.raises(DataError, match=r"takes more than 0\.2 seconds"):
        urls.fetch("http://slow.test/", seconds=0.2)


def test_rows_with_urls(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISMEM_CACHE", str(tmp_path / "cache"))
    server.answers = {"/red": OK + b"\r\n" + png(), "/text": OK + b"\r\nno image"}
    path = tmp_path / "rows.jsonl"
    rows = [
        {"id": str(at), "image": f"{server.at}/{name}", "prompt": "?", "answer": "x"}
        for at, name in enumerate(["red", "red", "text"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the image 'http.*is a URL; .* or pass --allow-urls"):
        read(path, need_answer=True)
    assert server.asked == []
    data = read(path, need_answer=True, urls=True, on_bad="skip")
    assert [own.load_images()[0].getpixel((0, 0)) for own in data] == [(255, 0, 0)] * 2
    assert "gives no image" in data.skipped[0].reason
    assert len(server.asked) == 2  # one of each
    done = CliRunner().invoke(app, ["data", str(path), "--json", "--allow-urls"])
    assert json.loads(done.stdout)["questions"] == 2
