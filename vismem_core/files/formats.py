"""How published data writes a question, and what it means here.

Formats are told by looking at a row's keys: our own (``prompt``, ``answer``), chat (``messages`` with typed content, or
TRL's ``prompt`` and ``completion`` that hold messages), ``conversations`` of ``human`` and ``gpt``, and the columns of
VQA data sets (``question``, ``answer`` or ``answers``). Each becomes a row of our own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vismem_core.base.images import PLACEHOLDER
from vismem_core.errors import DataError, cut, nearest

KEYS = ("id", "image", "images", "video", "videos", "frames", "prompt", "answer", "answers", "type")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
IDS = ("id", "question_id", "uid", "sample_id")
TYPES = ("type", "question_type", "category")
ANSWERS = ("answer", "multiple_choice_answer", "answers", "label")
IMAGES = ("image", "images", "img", "image_path")
TALKS = ("messages", "conversations")
VIDEOS = ("video", "videos", "video_path")
CLIP = "<video>"
"""Where a video stands in a prompt."""


def ours(
    row: Mapping[str, Any], number: int, columns: Mapping[str, str] | None = None, *, whole: bool = False
) -> dict[str, Any]:
    """The same row with our keys: ``id``, ``images``, ``videos``, ``frames``, ``prompt``, ``answer``, ``type``,
    ``turns`` and ``references``.

    Args:
        number: of the row, which is its id where it has none.
        columns: the row's own name of some of our keys.
        whole: a row of our own form holds our keys and nothing else. Others' columns are left aside.

    Raises:
        DataError: an unknown key, a named column is missing, or what is in one cannot be understood.
    """
    if columns:
        if lost := [own for own in columns.values() if own not in row]:
            raise DataError(f"there is no column {lost[0]!r}; there are {cut(', '.join(map(str, row)), 200)}")
        taken = set(columns.values()) | set(columns)
        row = {key: own for key, own in row.items() if key not in taken} | {
            key: row[own] for key, own in columns.items()
        }
    kind = kind_of(row)
    if kind == "ours" and whole and not columns:
        if talk := next((own for own in TALKS if row.get(own) is not None), None):
            raise DataError(f"{talk!r} must be a list of turns, got {cut(repr(row[talk]))}")
        if strange := next((own for own in row if own not in KEYS), None):
            raise DataError(f"unknown key {cut(strange)!r}; {nearest(strange, KEYS)}")
        return dict(row) if row.get("answers") is None else {**row, **_answers(row)}
    told = _known(row, number)
    if kind in ("ours", "columns"):
        return told | {"prompt": row.get("prompt", row.get("question"))} | _answers(row)
    images, videos = list(told.get("images") or []), list(told.get("videos") or [])
    turns = list(_turns(row, kind, images, videos))
    told |= {"images": images, "videos": videos}
    answer = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user":
        raise DataError("the conversation has no question of a user in front of its end")
    return told | {"answer": answer, "prompt": turns[-1][1], "turns": turns[:-1]}


def kind_of(row: Mapping[str, Any]) -> str:
    """``chat``, ``conversations``, ``columns`` or ``ours``."""
    if isinstance(row.get("messages"), list) or isinstance(row.get("prompt"), list):
        return "chat"
    if isinstance(row.get("conversations"), list):
        return "conversations"
    return "columns" if "question" in row and "prompt" not in row else "ours"


def _known(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What all formats have in common; other columns are left aside."""
    own, kind, images = _first(row, IDS), _first(row, TYPES, str), _first(row, IMAGES)
    told: dict[str, Any] = {"id": number if own is None else own}
    if kind is not None:
        told["type"] = kind
    if images is not None:
        told["images"] = images if isinstance(images, list) else [images]
    if (videos := _first(row, VIDEOS)) is not None:
        told["videos"] = videos if isinstance(videos, list) else [videos]
        told["frames"] = row.get("frames")
    return told


def _first(row: Mapping[str, Any], keys: Sequence[str], kind: type = object) -> Any:
    """What stands under the first of some keys that holds something, or something of that kind."""
    for key in keys:
        if (value := row.get(key)) is not None and isinstance(value, kind):
            return value
    return None


def _answers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to learn, which is the one that most annotators gave, or the first of those, where none is named; and
    all that were given, where there are several."""
    answer = _first(row, ANSWERS)
    if isinstance(answer, str) and row.get("answers") is None:
        return {"answer": answer}
    given = [_each(own) for own in (row.get("answers"), answer) if isinstance(own, list)]
    if isinstance(answer, list):
        answer = Counter(given[-1]).most_common(1)[0][0]
    answer = written(answer)
    if not given:
        return {"answer": answer}
    return {"answer": answer, "references": given[0] if answer in given[0] else [answer, *given[0]]}


def _each(answers: Sequence[Any]) -> list[str]:
    texts: list[Any] = [written(own.get("answer") if isinstance(own, Mapping) else own) for own in answers]
    if not texts or not all(isinstance(own, str) for own in texts):
        raise DataError("'answers' must be a list of texts, or of objects with an 'answer'")
    return texts


def written(value: Any) -> Any:
    """A number as the text that it is written with; anything else as it is."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if whole or (isinstance(value, float) and math.isfinite(value)) else value


class _Placed:
    """Images, or videos, of a conversation in the order in which its turns show them.

    Args:
        own: those that the row has beside its turns; they stand where a turn has a mark and names none.
        mark: what stands in texts in the place of one.
        keys: under which a part names its own.
    """

    def __init__(self, own: list[Any], mark: str, keys: Sequence[str]) -> None:
        self.own, self.mark, self.keys = own, mark, keys
        self.waiting, self.found = iter(list(own)), list[Any]()

    def marked(self, text: str) -> None:
        """The marks of a text take what is waiting."""
        for _ in range(text.count(self.mark)):
            self.found.extend(own for own in [next(self.waiting, None)] if own is not None)

    def part(self, part: Mapping[str, Any], at: int) -> str:
        """A part that shows one; the mark for the turn's text."""
        named = _first(part, self.keys)
        if isinstance(named, Mapping) and isinstance(named.get("url"), str):
            named = named["url"]
        found = named if named is not None else next(self.waiting, None)
        if found is None:
            raise DataError(f"turn {at} shows more {self.mark[1:-1]}s than the row has")
        self.found.append(found)
        return self.mark

    def end(self) -> None:
        if self.found:
            self.own[:] = [*self.found, *self.waiting]


def _turns(row: Mapping[str, Any], kind: str, images: list[Any], videos: list[Any]) -> Iterator[tuple[str, str]]:
    """Role and text of each turn. What stands in the turns themselves is put among ``images`` and ``videos``."""
    if kind == "conversations":
        messages: Sequence[Any] = row["conversations"]
        role, content = "from", "value"
    else:
        written = row["messages"] if isinstance(row.get("messages"), list) else [*row["prompt"], *_completion(row)]
        messages, role, content = written, "role", "content"
    shown = {
        "image": _Placed(images, PLACEHOLDER, ("image", "path", "url", "image_url")),
        "video": _Placed(videos, CLIP, ("video", "path", "url", "video_url")),
    }
    for at, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"turn {at} must be an object, got {cut(repr(message))}")
        own = ROLES.get(str(message.get(role)))
        if own is None:
            raise DataError(
                f"turn {at}: {role!r} is {cut(repr(message.get(role)))}; it must be one of {', '.join(ROLES)}"
            )
        yield own, _text(message.get(content), at, shown)
    for medium in shown.values():
        medium.end()


def _completion(row: Mapping[str, Any]) -> Sequence[Any]:
    completion = row.get("completion")
    return completion if isinstance(completion, list) else []


def _text(content: Any, at: int, shown: Mapping[str, _Placed]) -> str:
    """The text of a turn, with a mark where an image or a video stands."""
    if isinstance(content, str):
        for medium in shown.values():
            medium.marked(content)
        return content
    if not isinstance(content, list):
        raise DataError(f"turn {at}: its content must be a text or a list of parts, got {cut(repr(content))}")
    pieces = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping):
            raise DataError(f"turn {at}: a part must be an object, got {cut(repr(part))}")
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif isinstance(kind, str) and kind.removesuffix("_url") in shown:
            pieces.append(shown[kind.removesuffix("_url")].part(part, at))
        else:
            raise DataError(f"turn {at}: a part of type {cut(repr(kind))}; parts are text, image or video")
    return "".join(pieces)
