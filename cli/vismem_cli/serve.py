"""``vismem serve``: a model with memory for clients of OpenAI's chat completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vismem_core.serving import server
from vismem_core.serving.refused import Limits

from . import options
from .console import say, warn
from .sources import LoadOptions, check_names, open_memory

EXAMPLE = "Example: vismem serve --memory runs/first --port 8000"
USUAL = Limits()
LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    memory: options.Memory = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of the model, for clients; by default the memory's.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="TEXT", envvar="VISMEM_API_KEY", help="That clients must send; by default none."),
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(metavar="RULE", help="Who invokes memory, where a request does not say it.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Answers written together.")] = 16,
    lanes: Annotated[int, typer.Option(metavar="N", min=1, help="Batches that take turns.")] = 2,
    max_new_tokens: options.MaxNewTokens = USUAL.tokens,
    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="At once, waiting ones included; more are refused (429).")
    ] = USUAL.requests,
    max_body: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Of a request.")] = USUAL.body,
    max_characters: Annotated[int, typer.Option(metavar="N", min=1, help="Of a request's texts.")] = USUAL.characters,
    max_images: Annotated[int, typer.Option(metavar="N", min=0, help="Of a request.")] = USUAL.images,
    max_pixels: Annotated[int, typer.Option(metavar="N", min=1, help="Of an image.")] = USUAL.pixels,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="From a request's arrival to its answer's end.")
    ] = USUAL.seconds,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch images that requests name, from public addresses.")
    ] = False,
    backbone: options.Backbone = None,
    model: options.Model = None,
    any_base: options.AnyBase = False,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DType.auto,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer requests of OpenAI's clients: /v1/chat/completions, streamed or whole, and /v1/models.

    Requests that come together are decoded together. SIGTERM and Ctrl-C finish what runs. Without --memory, the shipped
    memory is served.
    """
    server.check()
    check_names(backbone, trigger=trigger)
    load = LoadOptions(memory, backbone, model, any_base, dtype.value, device, trust_remote_code, revision)
    limits = Limits(max_body, max_images, max_pixels, max_characters, max_new_tokens, batch, max_requests, timeout)
    with server.listen(host, port) as listening:
        opened = open_memory(load)
        if trigger is not None:
            opened.trigger = trigger
        called = name or _name(memory, opened.backbone.name)
        if host not in LOCAL and not api_key:
            warn("whoever reaches this address may ask: give --api-key, or listen at 127.0.0.1")
        built = server.build(
            opened, called, limits, batch=batch, lanes=lanes, key=api_key or None, urls=allow_urls, report=warn
        )
        told = f"[{host}]" if ":" in host else host
        say(f"serving {called} at http://{told}:{listening.getsockname()[1]}/v1")
        server.run(built, listening)


def _name(memory: str | None, backbone: str) -> str:
    """A hub id as it is, a folder's own name without the way to it, and the family for the memory that is shipped."""
    if memory is None:
        return backbone
    return Path(memory).resolve().name if Path(memory).is_dir() else memory
