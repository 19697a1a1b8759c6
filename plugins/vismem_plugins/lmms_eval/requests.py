"""lmms-eval's requests as samples, and its settings of generation as those of ``generate``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vismem_core.base.images import PLACEHOLDER, Picture
from vismem_core.errors import DataError, cut
from vismem_core.files.samples import Sample

SUFFIXES = frozenset(Image.registered_extensions())
FILLED_IN = "\n\n"
"""What lmms-eval itself writes into ``until`` where a task says nothing; its own models do not end there either."""
READ = ("max_new_tokens", "until", "do_sample")
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
PASSED_ON = ("num_beams", "repetition_penalty")


def of_context(name: str, context: str, visuals: Any, answer: str | None = None) -> Sample:
    """A context and what it is about; images stand in front of it, or where it has as many ``<image>``.

    Args:
        name: of the request, for messages.
        visuals: what a task's ``doc_to_visual`` gives, or None.

    Raises:
        DataError: something else than images.
    """
    found = visuals if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
    return Sample(name, tuple(_picture(name, own) for own in found), context, answer)


def of_messages(name: str, messages: Sequence[Any]) -> Sample:
    """A conversation whose last turn is the user's; images stand where the messages have them.

    Raises:
        DataError: something else than texts and images, or the last turn is not the user's.
    """
    turns: list[tuple[str, str]] = []
    images: list[Picture] = []
    parts = [(own["role"], _parts(own["content"])) for own in map(_plain, messages)]
    marked = any(PLACEHOLDER in part.get("text", "") for _, content in parts for part in content)
    mark = "" if marked else PLACEHOLDER  # the task's own marks say where images stand
    for role, content in parts:
        text = ""
        for part in content:
            if part["type"] == "text":
                text += part["text"]
            elif part["type"] == "image":
                images.append(_picture(name, part["url"]))
                text += mark
            else:
                raise DataError(f"{name}: {_refused(part['type'], part.get('url'))}")
        turns.append((role, text))
    if not turns or turns[-1][0] != "user":
        raise DataError(
            f"{name}: its messages do not end with the user's: an answer that has begun is not gone on with"
        )
    first = next(at for at, (role, _) in enumerate(turns) if role == "user")
    if images and turns[first][1].startswith(in_front := mark * len(images)):
        turns[first] = ("user", turns[first][1].removeprefix(in_front))
    return Sample(name, tuple(images), turns[-1][1], turns=tuple(turns[:-1]))


def generation(settings: Mapping[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], set[str]]:
    """What :func:`vismem_core.answers.inference.answers` takes, and the names of the settings that it does not know.

    Args:
        settings: a task's ``generation_kwargs``. What samples is ``do_sample``, or without it a temperature above 0;
            at temperature 0 nothing does.
        max_new_tokens: where the task says nothing.
    """
    until = settings.get("until") or []
    stop = [own for own in ([until] if isinstance(until, str) else until) if own and own != FILLED_IN]
    told: dict[str, Any] = {"max_new_tokens": int(settings.get("max_new_tokens") or max_new_tokens), "stop": stop}
    temperature = settings.get("temperature")
    sampled = bool(settings.get("do_sample", temperature)) and temperature != 0
    names = (*SAMPLING, *PASSED_ON) if sampled else PASSED_ON
    told |= {"do_sample": sampled} | {name: settings[name] for name in names if settings.get(name) is not None}
    return told, {str(name) for name in settings if name not in (*READ, *SAMPLING, *PASSED_ON)}


def _plain(message: Any) -> Mapping[str, Any]:
    return message if isinstance(message, Mapping) else message.model_dump()


def _parts(content: Any) -> Iterable[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _picture(name: str, visual: Any) -> Picture:
    if isinstance(visual, str) and Path(visual).suffix.lower() in SUFFIXES:
        return Path(visual)
    if isinstance(visual, Image.Image | Path | bytes):
        return visual
    raise DataError(f"{name}: {_refused(type(visual).__name__, visual)}")


def _refused(kind: str, what: Any) -> str:
    return f"{kind} {cut(str(what))!r} is no image, and vismem answers about images: choose a task of images or frames"
