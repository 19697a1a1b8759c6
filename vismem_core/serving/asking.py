"""What a request asks for: its body read, every field honoured or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vismem_core.base.images import PLACEHOLDER
from vismem_core.errors import DataError, VismemError, cut, nearest
from vismem_core.files import formats
from vismem_core.files.samples import Sample
from vismem_core.memory import trigger as triggers

from . import pictures
from .refused import Limits, RefusedError

HONOURED = (
    "model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "n", "seed", "stream",
    "stream_options", "vismem", "generation_config",
)  # fmt: skip
INDIFFERENT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "service_tier")
"""Fields that change no answer here."""
UNSERVED: Mapping[str, Sequence[Any]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,),
    "presence_penalty": (0,), "logit_bias": ({},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (), "store": (False,),
}  # fmt: skip
"""Standard fields that are refused, and the values by which they ask for nothing."""
SPOKEN = ("tool_calls", "function_call", "audio", "tool_call_id")
"""Parts of a message that are refused."""
ROLES = {"developer": "system"}
TURNS, STOPS, LONGEST = 1000, 4, 256
"""Messages of a request, its stop strings, and characters of one of these or of a trigger."""


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        sample: the question with its images and earlier turns.
        tokens: most of an answer; None leaves it to the server.
        temperature: 0 takes the likeliest token.
        trigger: who invokes memory; empty for the memory's own.
        stream, usage: whether the answer comes in pieces, and ends with what it took.
    """

    sample: Sample
    tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    copies: int = 1
    seed: int | None = None
    trigger: str = ""
    stream: bool = False
    usage: bool = False


def read(body: bytes, name: str, limits: Limits, urls: bool = False) -> Ask:
    """The request in a body.

    Args:
        name: of the model that is served.
        urls: whether images may be fetched.

    Raises:
        RefusedError: what is wrong with it.
    """
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is no JSON: {cut(error, 200)}", code="invalid_json") from error
    if not isinstance(told, dict):
        raise RefusedError("the body must be one JSON object", code="invalid_json")
    told = {key: own for key, own in told.items() if own is not None}
    _known(told)
    told |= _generation(told.pop("generation_config", None))
    _model(told, name)
    trigger = _trigger(told)
    sample = _sample(told.get("messages"), limits, urls)
    most = "max_completion_tokens" if "max_completion_tokens" in told else "max_tokens"
    stream = _flag(told, "stream")
    return Ask(
        sample,
        tokens=_whole(told, most, 1, limits.tokens),
        temperature=_number(told, "temperature", 0.0, 2.0),
        top_p=_number(told, "top_p", 1.0, 1.0),
        stop=_stop(told.get("stop")),
        copies=_whole(told, "n", 1, limits.copies) or 1,
        seed=_whole(told, "seed", -(2**63), 2**63 - 1),
        trigger=trigger,
        stream=stream,
        usage=_usage(told.get("stream_options"), stream),
    )


def _known(told: Mapping[str, Any]) -> None:
    for field, own in told.items():
        if field in HONOURED or field in INDIFFERENT or (field in UNSERVED and own in UNSERVED[field]):
            continue
        if field in UNSERVED:
            raise RefusedError(f"{field} is not supported here", field=field, code="unsupported_parameter")
        hint = nearest(field, (*HONOURED, *INDIFFERENT, *UNSERVED))
        raise RefusedError(f"unknown field {cut(field)!r}; {hint}", field=cut(field), code="unknown_parameter")


def _generation(told: object) -> dict[str, Any]:
    """Our fields of what ``transformers chat`` sends: a generation configuration as JSON."""
    if told is None:
        return {}
    field = "generation_config"
    try:
        config = json.loads(told) if isinstance(told, str) else told
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise RefusedError(f"{field} must be a generation configuration as JSON", field=field)
    samples, temperature = config.pop("do_sample", False), config.pop("temperature", None)
    found = {"temperature": (1.0 if temperature is None else temperature) if samples else 0.0}
    config.pop("transformers_version", None)
    for theirs, ours in (("max_new_tokens", "max_tokens"), ("top_p", "top_p")):
        if (own := config.pop(theirs, None)) is not None:
            found[ours] = own
    if odd := next((name for name, own in config.items() if own is not None), None):
        raise RefusedError(f"{field}: {cut(odd)!r} is not supported here", field=field, code="unsupported_parameter")
    return found


def _model(told: Mapping[str, Any], name: str) -> None:
    asked = told.get("model")
    if asked is None:
        raise RefusedError(f"model is missing; this server has {name!r}", field="model")
    if asked != name:
        raise RefusedError(
            f"there is no model {cut(asked)!r} here; there is {name!r}", 404, field="model", code="model_not_found"
        )


def _trigger(told: Mapping[str, Any]) -> str:
    own = told.get("vismem", {})
    if not isinstance(own, dict):
        raise RefusedError("vismem must be an object", field="vismem")
    if odd := next((key for key in own if key != "trigger"), None):
        raise RefusedError(f"vismem: unknown key {cut(odd)!r}; {nearest(odd, ['trigger'])}", field="vismem")
    spec = own.get("trigger")
    if spec is None:
        return ""
    if not isinstance(spec, str) or not 0 < len(spec) <= LONGEST:
        raise RefusedError(f"a trigger is a text of at most {LONGEST} characters", field="vismem.trigger")
    try:
        return triggers.parse(spec).spec
    except (VismemError, ValueError) as error:
        raise RefusedError(str(error), field="vismem.trigger") from error


def _number(told: Mapping[str, Any], field: str, usual: float, most: float) -> float:
    own = told.get(field, usual)
    if isinstance(own, bool) or not isinstance(own, int | float) or not 0 <= own <= most:
        raise RefusedError(f"{field} must be a number from 0 to {most:g}, got {cut(repr(own))}", field=field)
    return float(own)


def _whole(told: Mapping[str, Any], field: str, least: int, most: int) -> int | None:
    own = told.get(field)
    if own is None:
        return None
    if isinstance(own, bool) or not isinstance(own, int) or not least <= own <= most:
        raise RefusedError(f"{field} must be a whole number from {least} to {most}, got {cut(repr(own))}", field=field)
    return own


def _flag(told: Mapping[str, Any], field: str) -> bool:
    own = told.get(field, False)
    if not isinstance(own, bool):
        raise RefusedError(f"{field} must be true or false, got {cut(repr(own))}", field=field)
    return own


def _usage(told: object, stream: bool) -> bool:
    field = "stream_options"
    if told is None:
        return False
    if not isinstance(told, dict) or not stream:
        raise RefusedError(f"{field} is an object, and goes with stream", field=field)
    if odd := next((key for key in told if key not in ("include_usage", "include_obfuscation")), None):
        raise RefusedError(f"{field}: unknown key {cut(odd)!r}", field=field)
    return _flag(told, "include_usage")


def _stop(told: object) -> tuple[str, ...]:
    own = [told] if isinstance(told, str) else [] if told is None else told
    if not isinstance(own, list) or not all(isinstance(one, str) and 0 < len(one) <= LONGEST for one in own):
        raise RefusedError(f"stop must be a text, or a list of texts, of 1 to {LONGEST} characters", field="stop")
    if len(own) > STOPS:
        raise RefusedError(f"stop holds at most {STOPS} texts, got {len(own)}", field="stop")
    return tuple(own)


def _sample(told: object, limits: Limits, urls: bool) -> Sample:
    field = "messages"
    if not isinstance(told, list) or not told:
        raise RefusedError("messages must be a list of messages, and not empty", field=field)
    if len(told) > TURNS:
        raise RefusedError(f"there are {len(told)} messages; at most {TURNS} are taken", field=field)
    for at, message in enumerate(told, 1):
        if isinstance(message, dict) and (odd := next((key for key in SPOKEN if message.get(key)), None)):
            raise RefusedError(f"turn {at}: {odd} is not supported here", field=field, code="unsupported_parameter")
    told = [_renamed(message) for message in told]
    if isinstance(told[-1], dict) and told[-1].get("role") == "assistant":
        raise RefusedError("the last message must be a user's: answers are not continued here", field=field)
    try:
        row = formats.ours({"messages": told}, 1)
    except DataError as error:
        raise RefusedError(str(error), field=field) from error
    if row["videos"]:
        raise RefusedError("videos are not supported here: send some of their frames as images", field=field)
    texts = [*(text for _, text in row["turns"]), row["prompt"]]
    _check(texts, row["images"], limits)
    images = tuple(pictures.load(own, limits, urls) for own in row["images"])
    return Sample("request", images, row["prompt"], turns=tuple(row["turns"]), place="the request")


def _renamed(message: Any) -> Any:
    if isinstance(message, dict) and isinstance(role := message.get("role"), str):
        return message | {"role": ROLES.get(role, role)}
    return message


def _check(texts: Sequence[str], images: Sequence[object], limits: Limits) -> None:
    """What is wrong with a conversation as a whole."""
    field = "messages"
    if sum(map(len, texts)) > limits.characters:
        raise RefusedError(
            f"the messages have more than {limits.characters:,} characters", field=field, code="context_length_exceeded"
        )
    if not texts[-1].strip():
        raise RefusedError("the last message is empty", field=field)
    if len(images) > limits.images:
        raise RefusedError(f"there are {len(images)} images; at most {limits.images} are taken", field=field)
    if sum(text.count(PLACEHOLDER) for text in texts) != len(images):
        raise RefusedError(
            f"a text holds {PLACEHOLDER}, which stands for an image here: write it otherwise", field=field
        )
