"""``vismem demo``: a page to ask on, and to see what memory did."""

from __future__ import annotations

from threading import Event
from typing import Annotated

import typer

from . import options
from .console import say, warn
from .sources import LoadOptions, check_names, open_memory

EXAMPLE = "Example: vismem demo --memory runs/first --port 8000"
LOCAL = ("127.0.0.1", "localhost", "::1")


def demo(
    memory: options.Memory = None,
    any_base: options.AnyBase = False,
    backbone: options.Backbone = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DType.auto,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="0.0.0.0 lets others on the network in.", rich_help_panel=options.OUTPUT)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=1, max=65535, help="Of the page.", rich_help_panel=options.OUTPUT)
    ] = 7860,
) -> None:
    """Put up a page to ask on: answers with memory and without it, side by side, and where memory looked.

    Without any option it shows the shipped memory. It ends with Ctrl-C.
    """
    check_names(backbone)
    from vismem_core.showing import page

    page.check(host, port)
    load = LoadOptions(memory, backbone, model, any_base, dtype.value, device, trust_remote_code, revision)
    page.show(open_memory(load), host, port)
    if host not in LOCAL:
        warn(f"whoever reaches {host}:{port} can use this page, and see no one else's images")
    say(f"open http://{host}:{port}/ in a browser; Ctrl-C ends it")
    Event().wait()  # the page's threads end with the process
