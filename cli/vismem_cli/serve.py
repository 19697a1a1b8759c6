"""``vismem serve``: a model with memory for clients of OpenAI's chat completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vismem_core.serving import server
from vismem_core.serving.refused import Limits

from . import completion, options
from .console import say, warn
from .sources import LoadOptions, check_names, open_memory

EXAMPLE = "Example: vismem serve --memory runs/first --port 8000"
USUAL = Limits()
LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen at.", rich_help_panel=options.SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(metavar="N", min=0, max=65535, help="0 takes any that is free.", rich_help_panel=options.SERVER),
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The model's; by default the memory's.", rich_help_panel=options.SERVER),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            envvar="VISMEM_API_KEY",
            show_envvar=False,
            help="Wanted of clients (or in VISMEM_API_KEY).",
            rich_help_panel=options.SERVER,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="Answers written together.", rich_help_panel=options.SERVER)
    ] = 32,
    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="At once; more get a 429.", rich_help_panel=options.SERVER)
    ] = USUAL.requests,
    max_body: Annotated[
        int, typer.Option(metavar="BYTES", min=1, help="Of a request.", rich_help_panel=options.SERVER)
    ] = USUAL.body,
    max_characters: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of a request's texts.", rich_help_panel=options.SERVER)
    ] = USUAL.characters,
    max_images: Annotated[
        int, typer.Option(metavar="N", min=0, help="Of a request.", rich_help_panel=options.SERVER)
    ] = USUAL.images,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of an image.", rich_help_panel=options.SERVER)
    ] = USUAL.pixels,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="For a whole request.", rich_help_panel=options.SERVER)
    ] = USUAL.seconds,
    allow_urls: Annotated[
        bool,
        typer.Option("--allow-urls", help="Fetch images from public addresses.", rich_help_panel=options.SERVER),
    ] = False,
    memory: options.Memory = None,
    any_base: options.AnyBase = False,
    trigger: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="Who invokes memory, if not the request says.",
            autocompletion=completion.triggers,
            rich_help_panel=options.MEMORY,
        ),
    ] = None,
    backbone: options.Backbone = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DType.auto,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: options.MaxNewTokens = USUAL.tokens,
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
        built = server.build(opened, called, limits, batch=batch, key=api_key or None, urls=allow_urls, report=warn)
        told = f"[{host}]" if ":" in host else host
        say(f"serving {called} at http://{told}:{listening.getsockname()[1]}/v1")
        server.run(built, listening)


def _name(memory: str | None, backbone: str) -> str:
    """A hub id as it is, a folder's own name without the way to it, and the family for the memory that is shipped."""
    if memory is None:
        return backbone
    return Path(memory).resolve().name if Path(memory).is_dir() else memory
