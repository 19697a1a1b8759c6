"""What chat templates write: prompts with images in their places, and the marks that open and close an answer.

Templates are the models' own and differ; all that is known of them here is found out by asking them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vismem_core.errors import AttachError

from .images import PLACEHOLDER

MARK = "\ue000"
"""A text that no template knows, to see what it writes around one."""
_ARTICLE = {"image": "an image", "video": "a video"}


def ask(processor: Any, media: int | Sequence[str], text: str, answer: str | None = None, opened: bool = True) -> str:
    """The template's prompt for ``text`` behind so many images, or such media; ``opened``, for an answer to follow."""
    content: list[dict[str, str]] = [*_parts(media), {"type": "text", "text": text}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    told: str = processor.apply_chat_template(messages, add_generation_prompt=opened and answer is None)
    return told


def _parts(media: int | Sequence[str]) -> list[dict[str, str]]:
    return [{"type": kind} for kind in (["image"] * media if isinstance(media, int) else media)]


def shows(processor: Any, kind: str) -> bool:
    """Whether the template writes anything where a medium stands, ``image`` or ``video``."""
    try:
        return bool(_markup(processor, kind, 0))
    except Exception:  # templates are programs of their own
        return False


def prompt(processor: Any, text: str, media: int | Sequence[str], before: Sequence[tuple[str, str]] = ()) -> str:
    """As :meth:`vismem_core.base.backbone.Backbone.prompt` says."""
    kinds = ["image"] * media if isinstance(media, int) else list(media)
    if before:
        return _conversation(processor, [*before, ("user", text)], kinds)
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return ask(processor, kinds, text)
    if len(pieces) != len(kinds) + 1:
        raise AttachError(f"the prompt has {len(pieces) - 1} {PLACEHOLDER}, and {_told(kinds)}")
    leading = _leading(pieces, kinds)
    if leading == len(kinds):
        return ask(processor, kinds, pieces[-1].strip())
    pieces[leading] = pieces[leading].lstrip() if leading else pieces[leading]
    # Templates differ in whether they keep the order of parts. So text that no template knows holds the places.
    mark = _unknown([text])
    told = ask(processor, kinds[:leading], mark.join(pieces[leading:]))
    return _placed(processor, told, mark, kinds, range(leading, len(kinds)))


def _leading(pieces: Sequence[str], kinds: Sequence[str]) -> int:
    """How many of a text's media lead, all of one kind: those that a template surely puts in their order."""
    alike = next((at for at, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
    return next((at for at, piece in enumerate(pieces[:alike]) if piece.strip()), min(alike, len(pieces) - 1))


def _told(kinds: Sequence[str]) -> str:
    return f"images: {len(kinds)}" + (f", {kinds.count('video')} of them videos" if "video" in kinds else "")


def _conversation(processor: Any, turns: Sequence[tuple[str, str]], kinds: Sequence[str]) -> str:
    places = sum(text.count(PLACEHOLDER) for _, text in turns)
    if places not in (0, len(kinds)):
        raise AttachError(f"the conversation has {places} {PLACEHOLDER}, and {_told(kinds)}")
    first = next(at for at, (role, _) in enumerate(turns) if role == "user")
    mark = _unknown([text for _, text in turns])
    messages: list[dict[str, Any]] = []
    shown, marked = 0, list[int]()
    for at, (role, text) in enumerate(turns):
        pieces = text.split(PLACEHOLDER)
        leading = _leading(pieces, kinds[shown : shown + len(pieces) - 1])
        rest = pieces[leading:]
        rest[0] = rest[0].lstrip() if leading else rest[0]
        leading = len(kinds) if at == first and not places else leading
        marked += range(shown + leading, shown + leading + len(rest) - 1)
        content = [*_parts(kinds[shown : shown + leading]), {"type": "text", "text": mark.join(rest)}]
        shown += leading + len(rest) - 1
        messages.append({"role": role, "content": content})
    told = processor.apply_chat_template(messages, add_generation_prompt=True)
    return _placed(processor, told, mark, kinds, marked)


def _unknown(texts: Sequence[str]) -> str:
    return next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if not any(mark in text for text in texts))


def _placed(processor: Any, told: str, mark: str, kinds: Sequence[str], places: Sequence[int]) -> str:
    """Each mark replaced by what the template writes for its medium, one after the other."""
    for place in places:
        kind = kinds[place]
        told = told.replace(mark, _markup(processor, kind, kinds[:place].count(kind)).strip(), 1)
    return told


def _markup(processor: Any, kind: str, number: int) -> str:
    """What the chat template writes for the medium that follows ``number`` others of its kind."""
    before, after = (ask(processor, [kind] * count, MARK).partition(MARK)[0] for count in (number, number + 1))
    before = before.rstrip()  # some write a space in front of a text that no image precedes
    if not after.startswith(before) or not after.removeprefix(before).strip():
        raise AttachError(f"the chat template has no place for {_ARTICLE[kind]} that stands within the text")
    return after.removeprefix(before)


def end_of_turn(processor: Any, told: int | Sequence[int] | None) -> int:
    """As :attr:`vismem_core.base.backbone.Backbone.end_of_turn` says.

    Args:
        told: the ids that end ``generate``.
    """
    tokenizer = processor.tokenizer
    ends = [told] if isinstance(told, int) else list(told or ())
    own = tokenizer.eos_token_id
    if not ends and own is None:
        raise AttachError(
            "this model names no token that ends an answer: set eos_token_id in its generation_config.json"
        )
    ends = ends or [int(own)]
    try:
        closing = ask(processor, 0, "?", MARK).partition(MARK)[2]
    except Exception:  # a template that takes no turns of an assistant says nothing of their end
        closing = ""
    written = tokenizer(closing, add_special_tokens=False)["input_ids"]
    found = next((token for token in written if token in ends), None)
    if found is not None:
        return int(found)
    return int(own if own in ends else ends[0])


def opening(processor: Any) -> list[int]:
    """Ids that the chat template writes before an answer."""
    told, asked = ask(processor, 0, MARK), ask(processor, 0, MARK, opened=False)
    text = told.removeprefix(asked) if told.startswith(asked) else ""
    text = text or told.partition(MARK)[2]
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
