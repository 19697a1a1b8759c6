"""The card of a trained memory: ``README.md`` beside its weights, as the hub shows it.

What is written stands between two marks, and metadata are added where a card has none of its own: what people write
around them stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yaml import YAMLError

from vismem_core.errors import CheckpointError

CARD, REPORT = "README.md", "report.json"
BEGIN, END = "<!-- vismem writes from here -->", "<!-- to here -->"
LIBRARY, TASK = "vismem", "image-text-to-text"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WAYS = {
    "base": "the base alone",
    "memory": "with memory",
    "noise": "noise in the latents' places",
    "blind_base": "the base, another question's image",
    "blind": "memory, another question's image",
    "short": "a short-term memory at the start of every answer",
    "long": "a long-term memory at the start of every answer",
}
"""Ways of answering in a report, for people."""


def text(about: Mapping[str, Any], report: Mapping[str, Any], repo: str = "", old: str = "", **metadata: Any) -> str:
    """A card's text.

    Args:
        about: what ``vismem.json`` says.
        report: what ``report.json`` says, or nothing.
        repo: where the memory is published, if it is.
        old: the card that is there.
        metadata: more of the card's, such as ``license``.

    Raises:
        CheckpointError: the metadata of the old card cannot be read.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(old or f"---\n{{}}\n---\n\n# {_title(repo)}\n")
    except (ValueError, YAMLError) as error:
        raise CheckpointError(f"{CARD}: its metadata cannot be read: {' '.join(str(error).split())}") from error
    own = {key: value for key, value in (_metadata(about) | metadata).items() if value}
    told: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    tags = list(dict.fromkeys([*(told.get("tags") or []), *own.pop("tags")]))
    for key, value in {**own, **{name: was for name, was in told.items() if was}, "tags": tags}.items():
        setattr(card.data, key, value)
    section = f"{BEGIN}\n{_section(about, report, repo)}{END}"
    body = card.text
    if BEGIN in body and END in body:
        before, after = body.split(BEGIN, 1)[0], body.split(END, 1)[1]
        body = f"{before}{section}{after}"
    else:
        body = f"{body.rstrip()}\n\n{section}\n"
    return f"---\n{card.data.to_yaml()}\n---\n{body}"


def reported(folder: Path) -> dict[str, Any]:
    """What the report beside a memory says; nothing where there is none, or it is no report."""
    try:
        found = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _title(repo: str) -> str:
    return repo.split("/")[-1] or "Latent vision memory"


def _metadata(about: Mapping[str, Any]) -> dict[str, Any]:
    base = about["base"]
    name = base.get("name") or ""
    known = {"base_model": name} if HUB_ID.fullmatch(name) else {}
    return {
        "library_name": LIBRARY,
        "pipeline_tag": TASK,
        **known,
        "tags": [LIBRARY, "latent-memory", base["backbone"]],
    }


def _section(about: Mapping[str, Any], report: Mapping[str, Any], repo: str) -> str:
    base, memory = about["base"], about["memory"]
    name = base.get("name") or ""
    known = bool(HUB_ID.fullmatch(name))
    of = f"[{name}](https://huggingface.co/{name})" if known else f"a model of the family `{base['backbone']}`"
    model = json.dumps(name if known else "the base model")
    parts = [
        f"Latent vision memory (VisMem, arXiv [2511.11007](https://arxiv.org/abs/2511.11007)) for {of}, trained with "
        "vismem: while it writes, the model may ask for short-term memory "
        f"({memory['short']['length']} vectors, formed by its vision encoder) or long-term memory "
        f"({memory['long']['length']}, by its language model). The base's weights are neither in here nor changed.",
        "```python\n"
        "import vismem_core as vismem\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f"model = AutoModelForImageTextToText.from_pretrained({model})\n"
        f"processor = AutoProcessor.from_pretrained({model})\n"
        f"memory = vismem.attach(model, processor, {json.dumps(repo or 'this memory')})\n"
        "```",
    ]
    if table := _table(report):
        asked = f" of {report['samples']} questions" if report.get("samples") else ""
        parts.append(f"## Measured on held-out questions\n\nBy `{report.get('metric', 'exact')}`{asked}.\n\n{table}")
    parts.append(
        f"It fits one base alone, whose weights have the fingerprint `{base['fingerprint']}`"
        + (f" (revision `{base['revision']}`)" if base.get("revision") else "")
        + "; attaching it to another is refused."
    )
    return "\n\n".join(parts) + "\n"


def _table(report: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for part, heading in (("heldout", "type"), ("seen", "type the base knew")):
        ways: Mapping[str, Mapping[str, float | None]] = report.get(part) or {}
        types = list(dict.fromkeys(kind for own in ways.values() for kind in own))
        if not types:
            continue
        lines += [f"| {heading} | {' | '.join(WAYS.get(way, way) for way in ways)} |", f"|---{'|---' * len(ways)}|"]
        for kind in types:
            lines.append(f"| {_cell(kind)} | {' | '.join(_share(own.get(kind)) for own in ways.values())} |")
        if len(types) > 1:
            means = (_share(_mean(own)) for own in ways.values())
            lines.append(f"| mean | {' | '.join(means)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _mean(scores: Mapping[str, float | None]) -> float | None:
    known = [own for own in scores.values() if own is not None]
    return sum(known) / len(known) if known else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(name: str) -> str:
    return name.replace("|", "\\|").replace("\n", " ")
