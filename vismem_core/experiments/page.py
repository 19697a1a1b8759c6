"""Results on disk: JSON, plots, and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vismem_core.files.checkpoint import atomically

from . import figures

PAGE, TEXT = "index.html", "experiments.md"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111;
  background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } .note { color: #444; font-size: .9em } nav a { margin-right: 1rem }
@media print { body { margin: 0; max-width: none } section { break-inside: avoid } nav { display: none } }
"""


def write(told: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """``NAME.json``, ``NAME.png`` and ``NAME.svg`` of each experiment; of all in the folder a page, and its text."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for own in told:
        path = folder / f"{own['experiment']}.json"
        text = json.dumps(own, separators=(",", ":")) + "\n"
        atomically(path, lambda place, text=text: place.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        written += [path, *figures.draw(own, folder / own["experiment"])]
    known = [read(path) for path in sorted(folder.glob("*.json"))]
    order = [own["experiment"] for own in told]
    shown = [own for own in known if "experiment" in own]
    shown.sort(
        key=lambda own: (order.index(own["experiment"]) if own["experiment"] in order else 99, own["experiment"])
    )
    page = folder / PAGE
    atomically(page, lambda place: place.write_text("\n".join(_page(shown, folder)), encoding="utf-8"))
    words = folder / TEXT
    atomically(words, lambda place: place.write_text("\n".join(_text(shown)), encoding="utf-8"))
    return [*written, words, page]


def read(path: Path) -> dict[str, Any]:
    """A result that was written."""
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def columns(told: Mapping[str, Any]) -> list[str]:
    """The groups of question types that a table has columns of."""
    return list(told["groups"])


def table(told: Mapping[str, Any]) -> Iterator[list[str]]:
    """A line for each row: its name, accuracies with their standard errors, invocations, parameters, times."""
    first = next(iter(told["rows"].values()))["answering"] or 1.0
    for name, row in told["rows"].items():
        means = [row["accuracy"].get(group) for group in columns(told)]
        asks = [
            sum(row["asks"].get(kind, 0.0) for kind in kinds) / len(kinds) for kinds in told["groups"].values() if kinds
        ]
        yield [
            name,
            *(figure(own) for own in means),
            " / ".join(f"{own:.2f}" for own in asks),
            f"{row['parameters']:,}" if row["parameters"] else "",
            f"{row['training']:.0f}" if row["training"] else "",
            f"{row['answering'] / first:.2f}",
        ]


def headings(told: Mapping[str, Any]) -> list[str]:
    """Of :func:`table`."""
    names = columns(told)
    return ["", *names, f"invocations ({' / '.join(names)})", "trained", "training, core s", "time of an answer"]


def figure(own: Mapping[str, Any] | None) -> str:
    """A mean, with its standard error if there are several seeds."""
    if own is None:
        return ""
    return f"{own['mean']:.3f}" if own["error"] is None else f"{own['mean']:.3f} ± {own['error']:.3f}"


def differences(told: Mapping[str, Any]) -> Iterator[list[str]]:
    """A line for each comparison."""
    for own in told["compare"]:
        interval = f"{own['low']:+.3f} to {own['high']:+.3f}"
        clear = "yes" if own["clear"] else "no"
        yield [
            f"{own['row']} − {own['other']}",
            own["types"],
            f"{own['mean']:+.3f}",
            interval,
            f"{own['effect']:+.2f}",
            clear,
        ]


LEGEND = (
    "Accuracies are means over the types of question of a group, as the data set names groups (of mosaic, seen types "
    "are what the base was trained on, and new ones what was kept from it). Invocations are per answer; trained are "
    "parameters; a core's seconds are those of training; the time of an answer is relative to the first row's. Effect "
    "is the mean difference over the standard deviation of the questions' differences; a difference is clear where its "
    "interval leaves zero out."
)
TRIAL = "A trial run (--quick): it shows that everything runs, and is too small to tell anything."
COMPARED = ["difference", "types", "mean", "95% interval", "effect (d)", "clear"]


def _page(shown: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><meta charset="utf-8"><title>vismem: experiments</title>'
    yield f"<style>{STYLE}</style>"
    yield "<h1>Experiments</h1><nav>"
    yield from (f'<a href="#{escape(own["experiment"])}">{escape(own["experiment"])}</a>' for own in shown)
    yield f'</nav><p class="note">{escape(LEGEND)}</p>'
    for own in shown:
        yield from _section(own, folder)


def _section(told: Mapping[str, Any], folder: Path) -> Iterator[str]:
    name = told["experiment"]
    yield f'<section id="{escape(name)}"><h2>{escape(told["title"])}</h2><p>{escape(told["asks"])}</p>'
    if told.get("trial"):
        yield f"<p><strong>{escape(TRIAL)}</strong></p>"
    picture = folder / f"{name}.svg"
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        yield f'<img alt="{escape(told["title"])}" src="data:image/svg+xml;base64,{data}">'
    yield from _html(headings(told), table(told))
    if told["compare"]:
        yield from _html(COMPARED, differences(told))
    types = [kind for kinds in told["groups"].values() for kind in kinds]
    if len(types) > 1:
        yield "<details><summary>By type of question</summary>"
        rows = ([row, *(figure(own["accuracy"].get(kind)) for kind in types)] for row, own in told["rows"].items())
        yield from _html(["", *types], rows)
        yield "</details>"
    yield f'<p class="note">{escape(_note(told))}</p></section>'


def _text(shown: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: what the page says, for places where people read files."""
    yield f"# Experiments\n\n{LEGEND}\n"
    for told in shown:
        name = told["experiment"]
        yield f"## {told['title']}\n\n{told['asks']}\n\n![{told['title']}]({name}.png)\n"
        if told.get("trial"):
            yield f"**{TRIAL}**\n"
        yield from _markdown(headings(told), table(told))
        if told["compare"]:
            yield from _markdown(COMPARED, differences(told))
        yield _note(told) + "\n"


def _markdown(names: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _note(told: Mapping[str, Any]) -> str:
    versions, base = ", ".join(f"{key} {value}" for key, value in told["versions"].items()), told["base"]
    seeds = ",".join(map(str, told["seeds"]))
    model = base["model"] or f"the model embedded for {base['backbone']}"
    spread = f", ± standard errors over seeds {seeds}" if len(told["seeds"]) > 1 else f", seed {seeds} alone"
    return (
        f"Means over types{spread}; {told['per_type']} "
        f"questions of each type; intervals by a bootstrap of questions. Base: {model}. {versions}. Again: "
        f"vismem experiment {told['experiment']} --backbone {base['backbone']} --seeds {seeds}"
        + (" --quick" if told.get("trial") else "")
    )


def _html(names: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    yield "<table><thead><tr>" + "".join(f"<th>{escape(name)}</th>" for name in names) + "</tr></thead><tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</tbody></table>"
