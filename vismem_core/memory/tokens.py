"""The four memory tokens: ids and rows.

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

The tokenizer does not know them at all. Fast ones leave out ids that they do not know, so a decoded answer has no
memory tokens in it, whatever is done with it next; and a text that spells ``<ms_I>`` is a text. Who wants to see or
write them has :meth:`Memory.decode` and :meth:`Memory.encode`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vismem_core.base.tensor import whole
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
        with torch.no_grad():  # the module is asked, since some multiply what their tables hold
            source = embeddings(torch.tensor(delimiter, device=embeddings.weight.device)).float()  # type: ignore[arg-type]
        target = whole(head.weight.detach())[delimiter].float()  # type: ignore[operator]
        return cls(first, _perturbed(source), _perturbed(source), _perturbed(target).to(source.device))

    @property
    def width(self) -> int:
        """Logits and scores of a call with memory are so wide: the base's, up to :attr:`first`, and the four."""
        return self.first + len(NAMES)

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

    def unpaired(self, ids: Sequence[int]) -> str | None:
        """What is wrong with memory tokens in a sequence, in words: each invocation is closed at once by its own end.

        The last id may be an invocation that is yet to be closed.
        """
        for at, token in enumerate(ids):
            kind = self.kind(token)
            if kind is not None and at + 1 < len(ids) and ids[at + 1] != self.end(kind):
                return f"{NAMES[token - self.first]} at id {at} is not followed by its end token"
            if kind is None and token >= self.first and (at == 0 or ids[at - 1] != token - len(KINDS)):
                name = NAMES[token - self.first] if token < self.width else f"id {token}, which nobody knows,"
                return f"{name} at id {at} ends nothing"
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the two invocation tokens, (.., d) -> (.., 2) in fp32."""
        return hidden.float() @ self.head.float().to(hidden.device).T

    def vectors(self, ids: Tensor, like: Tensor) -> Tensor:
        """Input vectors of memory token ids, (..) -> (.., d), on the device and in the precision of ``like``."""
        return torch.cat([self.invoke, self.close]).to(like)[(ids - self.first).to(like.device)]

    def lay_over(self, embeddings: nn.Module, filler: int = 0) -> list[Any]:
        """Hooks that give the four ids their vectors; remove the handles to take them off.

        Args:
            filler: an id that the module knows.
        """
        over = _Overlay(self, filler)
        return [
            embeddings.register_forward_pre_hook(over.before, with_kwargs=True),
            embeddings.register_forward_hook(over.after),
        ]

    def leave_out(self, table: nn.Module, filler: int) -> Any:
        """A hook on another table in which ids are looked up: it has no rows for the four, ``filler`` stands for them.

        Returns:
            its handle.
        """
        return table.register_forward_pre_hook(_Overlay(self, filler).instead)


class _Overlay:
    """The hooks on an embedding, or on another table of the same ids. Copied or stored with a model, they do nothing:
    the copy has no memory."""

    def __init__(self, tokens: MemoryTokens | None, filler: int = 0) -> None:
        self.tokens, self.filler = tokens, filler
        self._seen: list[tuple[Tensor, Tensor]] = []

    def before(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        if self.tokens is None or _TEXT_ALONE.get():
            return None
        self._seen.clear()
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:  # vectors, of which none is a memory token's
            return None
        mine = self.tokens.contains(ids)
        self._seen.append((ids, mine))
        ids = ids.masked_fill(mine, self.filler)
        return ((ids, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": ids})

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.tokens is None or _TEXT_ALONE.get() or not self._seen:
            return None
        ids, mine = self._seen.pop()
        vectors = self.tokens.vectors(ids.where(mine, self.tokens.first), output)
        return torch.where(mine[..., None].to(output.device), vectors, output)

    def instead(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.tokens is None or _TEXT_ALONE.get():
            return None
        return (args[0].masked_fill(self.tokens.contains(args[0]), self.filler), *args[1:])

    def __reduce__(self) -> tuple[Any, ...]:
        return _Overlay, (None,)


_TEXT_ALONE: ContextVar[bool] = ContextVar("vismem_text_alone", default=False)


@contextmanager
def text_alone() -> Iterator[None]:
    """For a caller who knows that no memory token enters inside the context: nothing looks for one."""
    before = _TEXT_ALONE.set(True)
    try:
        yield
    finally:
        _TEXT_ALONE.reset(before)


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


def first_id(tokenizer: Any, rows: int) -> int:
    """The id of the first memory token: the first that neither the model's matrices nor the tokenizer have.

    Args:
        rows: of the model's matrices.

    Raises:
        AttachError: the tokenizer cannot decode ids that it does not know.
    """
    first: int = max(rows, 1 + max(tokenizer.get_vocab().values()))
    try:
        tokenizer.decode([first])
    except Exception as error:
        raise AttachError(
            f"memory needs a tokenizer that leaves out ids it does not know, and {type(tokenizer).__name__} fails on "
            "them: load a fast one (of the tokenizers library)"
        ) from error
    return first


def spelt(tokenizer: Any, first: int, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of ids, with the names of memory tokens where they stand."""
    plain = [token for token in ids if token < first]
    text = tokenizer.decode(plain, skip_special_tokens=skip_special_tokens)
    pieces, at, seen = [], 0, 0
    for token in ids:
        if token < first:
            seen += 1
            continue
        # Tokens may hold parts of a character, so a place in the text is the length of the text before it.
        before = tokenizer.decode(plain[:seen], skip_special_tokens=skip_special_tokens)
        until = max(at, len(before.rstrip("\ufffd")))
        pieces += [text[at:until], NAMES[token - first]]
        at = until
    return "".join([*pieces, text[at:]])


def read(tokenizer: Any, first: int, text: str) -> list[int]:
    """The ids of a text in which the names of memory tokens mean the tokens."""
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, NAMES))})", text):
        if piece in NAMES:
            ids.append(first + NAMES.index(piece))
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids
