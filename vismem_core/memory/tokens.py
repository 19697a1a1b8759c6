"""The four memory tokens: ids, rows, and the tokenizer that knows their names.

Their rows lie *over* the base model's matrices instead of in them. The alternatives do not keep the promise that a
model with memory off is the base model bit for bit:

- Spare vocabulary rows (Qwen2.5-VL has some, InternVL none) already have logits, so a sampler gives them some
  probability with memory off; and writing to them writes to the base.
- Resizing makes new matrices, and a new module for an untied head; the base loses its identity.
- peft's trainable token rows wrap embedding and head, add a scatter over the whole matrix to every forward pass,
  and need the rows to exist first.

So the ids start where the vocabulary ends. A hook on the embedding supplies their vectors; the decoding loop appends
the invocation tokens' logits to the base's. Tied and untied heads are then the same case, and with memory off the
four tokens do not exist.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from vismem_core.config import KINDS, Kind
from vismem_core.errors import AttachError

NAMES = ("<ms_I>", "<ml_I>", "<ms_E>", "<ml_E>")
"""Invocation tokens of short and long memory, then their end tokens; ids follow this order."""


class MemoryTokens(nn.Module):
    """Rows of the four tokens.

    Attributes:
        first: id of the first of the four; the others follow.
        invoke: (2, d), input vectors of the invocation tokens.
        close: (2, d), input vectors of the end tokens.
        head: (2, d), output rows of the invocation tokens. End tokens have none: they are appended, never sampled.
    """

    def __init__(self, first: int, invoke: Tensor, close: Tensor, head: Tensor) -> None:
        super().__init__()
        self.first = first
        self.invoke, self.close, self.head = nn.Parameter(invoke), nn.Parameter(close), nn.Parameter(head)

    @classmethod
    def like(cls, delimiter: int, embeddings: nn.Module, head: nn.Module, first: int) -> MemoryTokens:
        """Rows that start as a delimiter token's rows plus a small perturbation (Sec. 3.2).

        Copies compete wherever a delimiter would stand, which is where a thought ends and memory is worth asking.
        """
        source = embeddings.weight[delimiter].detach().float()  # type: ignore[index]
        target = head.weight[delimiter].detach().float()  # type: ignore[index]
        return cls(first, _perturbed(source), _perturbed(source), _perturbed(target).to(source.device))

    def invocation(self, kind: Kind) -> int:
        """Id of the token that asks for ``kind``."""
        return self.first + KINDS.index(kind)

    def end(self, kind: Kind) -> int:
        """Id of the token that closes ``kind``."""
        return self.first + 2 + KINDS.index(kind)

    def kind(self, token: int) -> Kind | None:
        """Which memory ``token`` asks for, if it is an invocation token."""
        return KINDS[token - self.first] if self.first <= token < self.first + 2 else None

    def contains(self, ids: Tensor) -> Tensor:
        """Where ``ids`` are memory tokens, as a mask of the same shape."""
        return (ids >= self.first) & (ids < self.first + len(NAMES))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the two invocation tokens, (.., d) -> (.., 2) in fp32."""
        return hidden.float() @ self.head.float().to(hidden.device).T

    def vectors(self, ids: Tensor, like: Tensor) -> Tensor:
        """Input vectors of memory token ids, (..) -> (.., d), on the device and in the precision of ``like``."""
        return torch.cat([self.invoke, self.close]).to(like)[(ids - self.first).to(like.device)]

    def lay_over(self, embeddings: nn.Module) -> list[Any]:
        """Hooks that give the four ids their vectors; remove the handles to take them off."""
        over = _Overlay(self)
        return [embeddings.register_forward_pre_hook(over.before), embeddings.register_forward_hook(over.after)]


class _Overlay:
    """The hooks on an embedding. Copied or stored with a model, they do nothing: the copy has no memory."""

    def __init__(self, tokens: MemoryTokens | None) -> None:
        self.tokens = tokens
        self._seen: list[Tensor] = []

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.tokens is None:
            return None
        ids = args[0]
        self._seen[:] = [ids]
        return (ids.where(~self.tokens.contains(ids), 0), *args[1:])

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.tokens is None:
            return None
        ids = self._seen.pop()
        mine = self.tokens.contains(ids)
        vectors = self.tokens.vectors(ids.where(mine, self.tokens.first), output)
        return torch.where(mine[..., None].to(output.device), vectors, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Overlay, (None,)


def _perturbed(row: Tensor) -> Tensor:
    noise = torch.randn(len(KINDS), row.numel()).to(row)
    return row + noise * (0.02 * row.square().mean().sqrt())


def delimiter_ids(tokenizer: Any, delimiters: Iterable[str]) -> list[int]:
    """Ids of tokens whose text ends in a delimiter, the ones that are a delimiter alone first."""
    wanted = tuple(delimiters)
    special = set(tokenizer.all_special_ids)
    byte_newline = "Ċ"  # how byte-level BPE spells "\n"
    alone, ending = [], []
    for piece, token in tokenizer.get_vocab().items():
        if token in special or not any(mark in piece for mark in (*wanted, byte_newline)):
            continue
        text = tokenizer.convert_tokens_to_string([piece]).strip(" ")
        if text in wanted:
            alone.append((wanted.index(text), token))
        elif text.endswith(wanted):
            ending.append(token)
    return [token for _, token in sorted(alone)] + sorted(ending)


@dataclass
class _Lesson:
    """What a tokenizer was taught, and for how many memories: several models may share one processor."""

    backend: Any
    first: int
    users: int = 0


_LESSONS: WeakKeyDictionary[Any, _Lesson] = WeakKeyDictionary()


def first_id(tokenizer: Any, rows: int) -> int:
    """The id of the first memory token on a tokenizer, for a model whose matrices have so many rows.

    Raises:
        AttachError: the tokenizer is no fast one, or it serves another model with memory, which has fewer.
    """
    if not hasattr(getattr(tokenizer, "_tokenizer", None), "to_str"):
        raise AttachError(f"memory needs a fast tokenizer (the tokenizers library), not {type(tokenizer).__name__}")
    lesson = _LESSONS.get(tokenizer)
    vocabulary = lesson.backend.get_vocab(with_added_tokens=True) if lesson else tokenizer.get_vocab()
    least: int = max(rows, 1 + max(vocabulary.values()))
    if lesson is None:
        return least
    if lesson.first < least:
        raise AttachError(
            f"this processor serves another model with memory, whose vocabulary ends at {lesson.first}, and this one's "
            f"at {least}: load a processor for each"
        )
    return lesson.first


def teach(tokenizer: Any, first: int) -> None:
    """The tokenizer knows the four tokens from now on, until every memory that taught it has it :func:`forget`."""
    lesson = _LESSONS.get(tokenizer)
    if lesson is None:
        backend = tokenizer._tokenizer
        tokenizer._tokenizer = taught(backend, first)
        lesson = _LESSONS[tokenizer] = _Lesson(backend, first)
    lesson.users += 1


def forget(tokenizer: Any) -> None:
    """One memory less: with the last one the tokenizer has its own vocabulary again, the same object."""
    lesson = _LESSONS[tokenizer]
    lesson.users -= 1
    if not lesson.users:
        tokenizer._tokenizer = lesson.backend
        del _LESSONS[tokenizer]


def taught(backend: Tokenizer, first: int) -> Tokenizer:
    """A copy of a fast tokenizer's backend in which the four tokens have the ids from ``first`` on.

    Ids between the tokenizer's end and ``first`` get placeholder names that no text produces, since a vocabulary
    with holes cannot be saved.
    """
    state = json.loads(backend.to_str())
    size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    names = [*(f"<|vismem_unused_{token}|>" for token in range(size, first)), *NAMES]
    vocabulary = state["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise AttachError(f"memory tokens cannot be added to a tokenizer of type {state['model']['type']}")
    # Added tokens that the model does not list would be numbered anew from the vocabulary's end when it is read.
    vocabulary.update((added["content"], added["id"]) for added in state["added_tokens"])
    for token, name in enumerate(names, start=size):
        vocabulary[name] = token
        if name in NAMES:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            state["added_tokens"].append({"id": token, "content": name, "special": True, **flags})
    return Tokenizer.from_str(json.dumps(state))
