"""The page in a browser, and with several visitors at once: answers, messages, and what it asks of other hosts."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from bases import mini
from browser import browser
from PIL import Image

from vismem_core import Memory
from vismem_core.answers.inference import answers
from vismem_core.base.embedded import embedded
from vismem_core.decoding.attach import attach
from vismem_core.errors import VismemError
from vismem_core.files.samples import Sample, question
from vismem_core.showing import page

SHIPPED = page.questions("qwen2_5_vl")
TEXT = "document.querySelectorAll('.vm-answer')[{}].innerText"
DONE = "!!document.querySelector('.vm-legend') && !!document.querySelector('.vm-maps')"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def shown() -> Iterator[tuple[str, Memory, set[str]]]:
    """The address of the page, its memory, and the hosts that the server looked for."""
    pytest.importorskip("gradio")
    base = mini()
    memory = attach(base.model, base.processor, embedded("qwen2_5_vl")[1].memory)
    sought: set[str] = set()
    look = socket.getaddrinfo

    def looked(host: Any, *rest: Any, **named: Any) -> Any:
        sought.add(str(host))
        return look(host, *rest, **named)

    with socket.create_server(("127.0.0.1", 0)) as own:
        port = int(own.getsockname()[1])
    page.check("127.0.0.1", port)
    socket.getaddrinfo = looked
    opened = page.show(memory, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}/", memory, sought
    opened.close(verbose=False)
    socket.getaddrinfo = look


def texts(memory: Memory, asked: Sample, **options: Any) -> tuple[str, str]:
    """The plain answers: marked, and the base's."""
    (own,) = answers(memory, [asked], **options)
    with memory.off():
        (plain,) = answers(memory, [asked])
    return own.marked, plain.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium is installed")
def test_a_visitor(shown: tuple[str, Memory, set[str]], tmp_path: Path) -> None:
    address, memory, sought = shown
    with browser(tmp_path / "profile") as own:
        own.open(address, 1200, 900)
        own.wait("document.querySelectorAll('table tbody tr').length == 4")
        own.run("document.querySelector('button.primary').click()")
        assert "there is no image yet" in own.wait("document.querySelector('.toast-body')?.innerText")
        own.run("document.querySelector('table tbody tr').click()")
        own.wait("document.querySelector('textarea').value && !!document.querySelector('.vm-image img')")
        own.run("document.querySelector('button.primary').click()")
        own.wait(DONE)
        got = [" ".join(own.run(TEXT.format(number)).replace("›", "› ").split()) for number in (0, 1)]
        assert got == list(texts(memory, SHIPPED[0]))
        assert own.run("document.querySelectorAll('.vm-maps svg rect').length") == 9
        assert "✓ right" in own.run("document.querySelector('.vm-card').innerText")
        own.photograph(tmp_path / "page.png")
        own.open(address, 1200, 900)
        own.wait("!!document.querySelector('input[type=file]')")
        image = tmp_path / "mine.png"
        Image.open(str(SHIPPED[3].images[0])).rotate(90).save(image)
        own.upload("input[type=file]", image)
        own.wait("!!document.querySelector('.vm-image img')")
        own.write("textarea", "list the cells .")
        own.run("document.querySelector('button.primary').click()")
        own.wait("!!document.querySelector('.vm-legend')")
        own.wait("document.querySelectorAll('.vm-card .vm-hint')[1].innerText.match(/^\\d+ tokens$/)")
        assert own.run(TEXT.format(1)) == texts(memory, question("list the cells .", [image]))[1]
        here = re.compile(f"(data:|blob:|{re.escape(address)}).*", re.DOTALL)
        assert len(own.asked) > 20 and [url for url in own.asked.values() if not here.fullmatch(url)] == []
        assert own.blocked == []
        own.run("new Image().src = 'http://elsewhere.invalid/dot.png'")
        for _ in range(50):
            if own.blocked:
                break
            own.wait("new Promise(next => setTimeout(next, 100)) && true")
        assert own.blocked == ["http://elsewhere.invalid/dot.png"]
    assert sought <= {"127.0.0.1", "localhost"}
    for hidden in ("monitoring", "gradio_api/runs"):
        answer = httpx.get(address + hidden, headers={"accept": "text/html"}, follow_redirects=False)
        assert answer.status_code >= 400 or '"run_history":false' in answer.text, hidden
    with Image.open(tmp_path / "page.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
    assert {(255, 240, 229), (255, 255, 255)} <= colours  # a mark of short memory, the page


def test_visitors_at_once(shown: tuple[str, Memory, set[str]]) -> None:
    from gradio_client import Client, handle_file

    address, memory, _ = shown
    wishes = [(SHIPPED[0], "policy", 8), (SHIPPED[1], "schedule:0=short", 8), (SHIPPED[0], "schedule:0=long", 0)]
    client = Client(address, verbose=False)

    def ask(wish: tuple[Sample, str, int]) -> list[str]:
        asked, trigger, budget = wish
        told = client.predict(handle_file(str(asked.images[0])), asked.prompt, trigger, budget, 64, api_name="/ask")
        parts = re.findall(r'class="vm-answer">(.*?)</p>', told[0])
        return [" ".join(re.sub("<.*?>", " ", part).split()) for part in parts]

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(ask, wishes * 2))
    expected = [list(texts(memory, asked, trigger=trigger if budget else "never")) for asked, trigger, budget in wishes]
    assert got == expected * 2
    assert len({own[0] for own in expected}) == 3


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (("what ?", "sometimes", 8, 64), "unknown trigger 'sometimes'"),
        (("what ?", "random:7", 8, 64), "takes a probability"),
        ((" ", "policy", 8, 64), "the prompt is empty"),
        (("what ?", "policy", 8, 10**6), "greater than maximum"),
    ],
)
def test_what_cannot_be_asked_is_told(shown: tuple[str, Memory, set[str]], wish: tuple[Any, ...], message: str) -> None:
    from gradio_client import Client, handle_file

    with pytest.raises(Exception, match=message):
        Client(shown[0], verbose=False).predict(handle_file(str(SHIPPED[0].images[0])), *wish, api_name="/ask")


def test_an_address_that_is_taken_is_told_before_a_model_loads(shown: tuple[str, Memory, set[str]]) -> None:
    port = int(shown[0].rstrip("/").rpartition(":")[2])
    with pytest.raises(VismemError, match=f"^127.0.0.1:{port}: address already in use; choose"):
        page.check("127.0.0.1", port)
