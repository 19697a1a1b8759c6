"""A page on which people ask a model with memory, and see its answers with and without it (needs the extra ``demo``).

It loads nothing from other hosts, which a policy for the browser holds, and tells nobody of its visitors.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from vismem_core.answers.checking import prepare
from vismem_core.base.embedded import embedded
from vismem_core.errors import DataError, VismemError
from vismem_core.experiments.look import looked
from vismem_core.files.samples import Sample, question, read
from vismem_core.memory import trigger as triggers
from vismem_core.memory.memory import Memory
from vismem_core.plugins import registry

from . import cards
from .writing import Wish, Writing

STYLE = Path(__file__).parent / "style.css"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
)
"""What a browser may load for this page: what comes from where the page came from."""
TRIGGERS = ("policy", "never", "random:0.5", "schedule:0=short", "schedule:0=long")
TOLD = (
    "Who invokes memory: the model by its policy, chance where a thought ends, or a schedule of tokens; or write one."
)
LONGEST = 512
"""Tokens of an answer that may be asked for."""
VISITORS = 8
"""Answers that are written by turns; further ones wait in the queue."""
KEPT = 3600
"""Seconds after which what visitors uploaded is deleted."""


def check(host: str, port: int) -> None:
    """Whether the page can be shown there, before a model is loaded.

    Raises:
        VismemError: gradio is not installed, or the address cannot be had.
    """
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
        raise VismemError(f"{host}:{port}: {why}; choose other values for --host and --port") from error
    _gradio()  # which takes seconds to import


def show(memory: Memory, host: str = "127.0.0.1", port: int = 7860) -> Any:
    """Put the page up, and return: its threads go on until the process ends or what is returned is closed.

    Returns:
        The ``gradio.Blocks``.
    """
    from starlette.middleware import Middleware

    gradio, page = _gradio(), build(memory)
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # an argument of later versions alone
    page.queue(default_concurrency_limit=VISITORS).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        enable_monitoring=False,
        max_file_size="20mb",
        css_paths=STYLE,
        theme=_theme(gradio),
        app_kwargs={"middleware": [Middleware(_FromHere)]},
    )
    return page


def build(memory: Memory) -> Any:
    """The page, a ``gradio.Blocks``."""
    gradio = _gradio()
    shipped = questions(memory.backbone.name)
    ask = _Asking(memory, shipped).ask
    with gradio.Blocks(title="vismem", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.HTML(_head(memory))
        with gradio.Row():
            with gradio.Column(scale=4, min_width=320):
                as_it_is: dict[str, Any] = {"type": "filepath", "image_mode": None}
                image = gradio.Image(
                    **as_it_is, label="Image", height=280, sources=["upload", "clipboard"], elem_classes="vm-image"
                )
                prompt = gradio.Textbox(label="Question", placeholder="What do you want to know?", lines=1)
                button = gradio.Button("Ask", variant="primary")
                controls = _controls(gradio, memory)
            with gradio.Column(scale=6, min_width=360):
                answers = gradio.HTML(cards.EMPTY, label="Answers")
                maps = gradio.HTML("", label="Where memory looked")
                rows = [[str(own.images[0]), own.prompt] for own in shipped]
                gradio.Examples(rows, [image, prompt], label="Questions to begin with", cache_examples=False)
        given, shown = [image, prompt, *controls], [answers, maps]
        gradio.on([button.click, prompt.submit], ask, given, shown, api_name="ask", concurrency_limit=VISITORS)
    return page


def questions(backbone: str) -> list[Sample]:
    """What ships to ask with a backbone's embedded model, or else with the first one that is registered."""
    names = registry("bases").names()
    if not names:
        return []
    base = embedded(backbone if backbone in names else None)[1]
    shipped = read(base.samples, need_answer=False) if base.samples else []
    return [own for own in shipped if len(own.images) == 1 and isinstance(own.images[0], Path)]


class _Asking:
    """What the button does; every visitor's call holds all that it needs."""

    def __init__(self, memory: Memory, known: list[Sample]) -> None:
        self.memory = memory
        self.known = {own.digest(): own for own in known}

    def ask(
        self, image: str | None, prompt: str, trigger: str | None, budget: float, max_new_tokens: float
    ) -> Iterator[tuple[str, str]]:
        """Both answers as they are written, and the maps when they are; what is wrong is told on the page."""
        try:
            if image is None:
                raise DataError("there is no image yet: drop one on the page, or choose a question to begin with")
            triggers.parse(trigger or "")
            asked = question(prompt, [Path(image)])
            asked = self.known.get(asked.digest(), asked)
            yield from self._answer(asked, Wish(trigger, int(budget), int(max_new_tokens)))
        except VismemError as error:
            told = _gradio().Error(str(error), duration=None, print_exception=False)
            raise told from error

    def _answer(self, asked: Sample, wish: Wish) -> Iterator[tuple[str, str]]:
        memory = self.memory
        _, inputs = prepare(memory.backbone, [asked])
        own = Writing(memory, inputs, wish)
        for _ in own:
            yield cards.cards(memory, asked, own, None), ""
        plain = Writing(memory, inputs, Wish(max_new_tokens=wish.max_new_tokens))
        for _ in plain:
            yield cards.cards(memory, asked, own, plain), ""
        invocations = own.trace.row(0)
        moved = looked(memory, inputs, own.ids, invocations)
        why = own.trace.why() or "Memory was not invoked."
        (image,) = asked.load_images()
        yield cards.cards(memory, asked, own, plain), cards.maps(image, invocations, moved, why)


def _controls(gradio: Any, memory: Memory) -> list[Any]:
    choices = list(dict.fromkeys([memory.trigger, *TRIGGERS]))
    trigger = gradio.Dropdown(choices, value=memory.trigger, label="Trigger", info=TOLD, allow_custom_value=True)
    with gradio.Row():
        budget = gradio.Slider(0, max(16, memory.budget), memory.budget, step=1, label="Budget", info="invocations")
        longest = gradio.Slider(1, LONGEST, 64, step=1, label="Length", info="tokens")
    return [trigger, budget, longest]


def _head(memory: Memory) -> str:
    lengths = f"{memory.config.short.length} latents of short-term and {memory.config.long.length} of long-term memory"
    return (
        '<header class="vm-head"><h1>Latent vision memory</h1><p>While it writes, the model may stop, form memory of '
        f"the image, and go on. Here: {memory.backbone.name}, with {lengths} an invocation.</p></header>"
    )


def _theme(gradio: Any) -> Any:
    """With the fonts of the visitor's own system, and text that is dark enough to read."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("monospace",)}
    grey = {"body_text_color_subdued": "*neutral_600", "block_info_text_color": "*neutral_600"}
    dark = {f"{name}_dark": "*neutral_400" for name in grey}
    return gradio.themes.Base(primary_hue="blue", neutral_hue="slate", **fonts).set(**grey, **dark)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise VismemError("the page needs gradio: pip install 'vismem[demo]'") from error
    return gradio


class _FromHere:
    """Every response says what a browser may load for it."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[..., Awaitable[None]]) -> None:
        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await self.app(scope, receive, sent)
