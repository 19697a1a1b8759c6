"""``vismem data``: what is understood of a source of questions."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vismem_core.errors import cut
from vismem_core.files.reading import FRAMES
from vismem_core.files.samples import Dataset, Sample, open_dataset

from . import completion, options
from .console import err, print_json, print_table
from .report import list_skipped, tell_skipped

EXAMPLE = "Example: vismem data train.json --columns prompt=question"
SHOWN = 5
"""Rows that are shown."""
MADE = 1000
"""Samples that are looked at of a data set that has to make them."""


def data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file, a folder, hub:ORG/NAME (then /CONFIG, :SPLIT), or a registered name.",
            autocompletion=completion.datasets,
        ),
    ],
    split: Annotated[
        str,
        typer.Option(metavar="NAME", help="train or heldout, of a source that has both.", rich_help_panel=options.DATA),
    ] = "train",
    columns: options.Columns = None,
    allow_outside: options.AllowOutside = False,
    allow_urls: options.AllowUrls = False,
    frames: options.Frames = FRAMES,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A page with the first rows and images.", rich_help_panel=options.OUTPUT),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what is understood of some data: how many questions, of which types, how long, and what is wrong with rows.

    Bad rows are listed; exits with 1 if no row can be used.
    """
    if split not in ("train", "heldout"):
        raise typer.BadParameter(f"{split!r} is neither train nor heldout", param_hint="--split")
    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {html.parent}", param_hint="--html")
    with err.status("reading"):
        found = open_dataset(
            source,
            split,  # type: ignore[arg-type]
            need_answer=False,
            on_bad="skip",
            allow_outside=allow_outside,
            urls=allow_urls,
            frames=frames,
            columns=options.named_columns(columns),
        )
        told = _told(found)
    if as_json:
        print_json({"source": source, **told, "skipped": list_skipped(found.skipped)})
    else:
        _show(told)
        tell_skipped(found.skipped)
    if html is not None:
        from vismem_core.experiments import rows

        rows.write(html, source, told, found[: 4 * SHOWN])


def _told(found: Dataset) -> dict[str, Any]:
    """Counts over all rows, and the first ones; of a data set that makes its samples, over a thousand of them."""
    looked = range(len(found) if found.told else min(len(found), MADE))
    types, images, turns = Counter[str](), Counter[int](), 0
    prompts, answers, several = array("l"), array("l"), 0
    for own in (found[at] for at in looked):
        types[own.type or ""] += 1
        images[len(own.images)] += 1
        turns += bool(own.turns)
        several += len(own.references) > 1
        prompts.append(len(own.prompt.split()))
        if own.answer is not None:
            answers.append(len(own.answer.split()))
    return {
        "questions": len(found),
        "looked_at": len(looked),
        "types": dict(types.most_common()),
        "images": dict(sorted(images.items())),
        "without_answer": len(looked) - len(answers),
        "several_answers": several,
        "earlier_turns": turns,
        "words_prompt": _spread(prompts),
        "words_answer": _spread(answers),
        "rows": [_row(own) for own in found[:SHOWN]],
    }


def _spread(lengths: Iterable[int]) -> dict[str, int]:
    """Least, middle and most."""
    own = sorted(lengths)
    return {"least": own[0], "middle": own[len(own) // 2], "most": own[-1]} if own else {}


def _row(own: Sample) -> dict[str, Any]:
    return {"id": own.id, "images": len(own.images), "type": own.type, "prompt": own.prompt, "answer": own.answer}


def _show(told: dict[str, Any]) -> None:
    rows = [("questions", str(told["questions"]))]
    if told["looked_at"] != told["questions"]:
        rows.append(("looked at", str(told["looked_at"])))
    types = {name: number for name, number in told["types"].items() if name}
    rows.append(("types", ", ".join(f"{name} {number}" for name, number in list(types.items())[:12]) or "none"))
    rows.append(("images", ", ".join(f"{count} in {number}" for count, number in list(told["images"].items())[:8])))
    rows.append(("without answer", str(told["without_answer"])))
    if told["several_answers"]:
        rows.append(("several answers", f"in {told['several_answers']}"))
    if told["earlier_turns"]:
        rows.append(("earlier turns", f"in {told['earlier_turns']}"))
    for key, name in (("words_prompt", "words of prompts"), ("words_answer", "words of answers")):
        if own := told[key]:
            rows.append((name, f"{own['least']} to {own['most']}, half of them at most {own['middle']}"))
    print_table("Understood", ("", ""), rows)
    lines = [
        (cut(own["id"], 24), str(own["images"]), cut(own["prompt"]), cut(own["answer"] or "")) for own in told["rows"]
    ]
    print_table("\nFirst rows", ("id", "images", "prompt", "answer"), lines)
