"""``vismem push``: a trained memory onto the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .console import err, print_json, say

EXAMPLE = "Example: vismem push runs/mine user/my-memory --private --license apache-2.0"


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a trained memory.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub id, user/name; made if there is none.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Of a new repository; by default as your account has it.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    branch: Annotated[
        str | None,
        typer.Option(
            "--revision", metavar="BRANCH", help="A branch, made if there is none.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="For a card that names none.", rich_help_panel=options.OUTPUT),
    ] = None,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Of the commit.", rich_help_panel=options.OUTPUT)] = "",
    as_json: options.Json = False,
) -> None:
    """Publish a trained memory: weights, description, report and card.

    A card that is there keeps what you wrote. Whoever has the base model attaches the memory by its name.
    """
    with err.status("publishing"):
        from vismem_core.files import publish

        address = publish.push(folder, repo, private=private, revision=branch, license=license, message=message)
    if as_json:
        print_json({"repo": repo, "commit": address})
        return
    say(f"published: {address}")
    at = f"{repo}@{branch}" if branch else repo
    say(f"attach it: vismem.attach(model, processor, {at!r})")
