"""A web interface with several users at once: each gets the answer to its own question, streamed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bases import mini
from PIL import Image
from transformers import TextIteratorStreamer

import vismem_core as vismem
from vismem_plugins.mini import path

QUESTIONS = ("what is most frequent ?", "how many trousers ?")
PICTURE = Path(path("qwen2_5_vl")).parents[1] / "samples" / "mosaic.png"


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


@pytest.mark.long
def test_users_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    base = mini()
    memory = vismem.attach(base.model, base.processor, path("qwen2_5_vl") / "memory")

    def answer(picture: str, question: str) -> Iterator[str]:
        inputs = memory.backbone.inputs([question], [[Image.open(picture).convert("RGB")]])
        streamer = TextIteratorStreamer(
            base.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60
        )
        settings = dict(**inputs, max_new_tokens=10, streamer=streamer)
        thread = threading.Thread(target=base.model.generate, kwargs=settings)
        thread.start()
        text = ""
        for piece in streamer:
            text += piece
            yield text.strip()
        thread.join()

    alone = [list(answer(str(PICTURE), question))[-1] for question in QUESTIONS]
    assert len(set(alone)) == 2 and all(alone)
    with gradio.Blocks() as page:
        inputs = [gradio.Image(type="filepath"), gradio.Textbox()]
        gradio.Button().click(answer, inputs, gradio.Textbox(), api_name="answer", concurrency_limit=4)
    port = free_port()
    page.queue().launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    try:
        client = Client(f"http://127.0.0.1:{port}", verbose=False)

        def ask(number: int) -> str:
            told: str = client.predict(handle_file(PICTURE), QUESTIONS[number % 2], api_name="/answer")
            return told

        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(ask, range(8)))
    finally:
        page.close()
    assert got == alone * 4
