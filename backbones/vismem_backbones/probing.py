"""What can be learnt of a vision encoder by calling it, and how its blocks are called on other tokens than patches."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismem_core.base.adapters import innermost
from vismem_core.errors import AttachError

TARGETS = re.compile(r"(q|v|qkv|query|value|q_b|kv_b|query_key_value)(_proj)?|[wW]q|[wW]v|[wW]qkv|c_attn")
"""Names of linear layers that make queries or values."""


@dataclass
class Call:
    """How the encoder calls one of its blocks.

    Attributes:
        shape: of the patches, (.., L, D).
        named: its other arguments.
        wraps: whether it returns a tuple.
    """

    shape: torch.Size
    named: dict[str, Any]
    wraps: bool

    @staticmethod
    def hear(block: nn.Module, index: int, calls: dict[int, Call]) -> RemovableHandle:
        """Note each call of ``block`` under ``index``."""
        names = list(inspect.signature(block.forward).parameters)

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = dict(zip(names, args, strict=False)) | kwargs
            calls[index] = Call(named.pop(names[0]).shape, named, isinstance(output, tuple))

        return block.register_forward_hook(leave, with_kwargs=True)

    def again(self, block: Any, extra: Tensor) -> Tensor:
        """The block on tokens (R, E, D) that have no place in the image; where patches are packed, so are they."""
        packed = len(self.shape) == 2 or "cu_seqlens" in self.named
        hidden = extra.reshape(*self.shape[:-2], -1, extra.shape[-1]) if packed else extra
        named = {name: setting(name, own, hidden.shape[-2]) for name, own in self.named.items()}
        output = block(hidden, **named)
        return (output[0] if self.wraps else output).view(extra.shape)  # type: ignore[no-any-return]

    @contextmanager
    def instead(self, block: Any, output: Tensor | None) -> Iterator[None]:
        """Inside the context the block gives ``output``, or its input."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = next(iter((*args, *kwargs.values()))) if output is None else output
            return (given, None) if self.wraps else given

        with entry(vars(block), "forward", forward):
            yield


def setting(name: str, own: Any, count: int) -> Any:
    """An argument of a block's call, for ``count`` tokens that see each other and whose rotation is the identity."""
    if "seqlen" in name:
        if isinstance(own, Tensor):
            return own.new_tensor([0, count]) if own.ndim else own.new_tensor(count)
        return count if own is not None else None
    if own is None or "mask" in name:
        return None
    if isinstance(own, tuple) and len(own) == 2 and all(isinstance(part, Tensor) for part in own):
        shapes = [[1] * (part.ndim - 1) + [part.shape[-1]] for part in own]
        return own[0].new_ones(shapes[0]), own[1].new_zeros(shapes[1])
    if name.endswith("position_ids") and isinstance(own, Tensor) and own.ndim > 1:
        return own.new_zeros(1, count, *own.shape[2:])  # the first place turns nothing
    if isinstance(own, Tensor) and own.is_complex():
        return own.new_ones(1, 1)
    if isinstance(own, Tensor):
        raise AttachError(f"its blocks take {name!r}, of which nothing is known")
    return own


def features(result: Any) -> list[Tensor]:
    """Language tokens of each image, (T_i, d)."""
    pooled = getattr(result, "pooler_output", result)
    if pooled is None:
        raise AttachError("its get_image_features() gives no tokens of the language model")
    if isinstance(pooled, Tensor) and pooled.ndim == 2:
        return [pooled]
    return [own.flatten(0, -2) for own in pooled]


def sources(told: Tensor, leaves: Sequence[Tensor]) -> dict[int, list[int]]:
    """Which patches of which leaves a number depends on."""
    slopes = torch.autograd.grad(told, leaves, retain_graph=True, allow_unused=True)
    found = {
        at: own.flatten(0, -2).any(-1).nonzero().flatten().tolist() for at, own in enumerate(slopes) if own is not None
    }
    return {at: patches for at, patches in found.items() if patches}


def seen_keys(key: Tensor, mask: Tensor | None) -> Tensor:
    """Which keys (B, L) are no padding."""
    if mask is None:
        return key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return (seen if seen.ndim == 2 else seen.any(-2)[:, 0]).expand(key.shape[0], -1)


def heads(own: Tensor, heads: int) -> Tensor:
    """(B, own heads, L, w) -> (B, L, heads, w)"""
    return own.repeat_interleave(heads // own.shape[1], dim=1).transpose(1, 2)


def blocks_in(tower: nn.Module, count: int = 0) -> nn.ModuleList | None:
    """Its list of ``count`` modules with attention, or else its longest."""
    lists = [own for own in tower.modules() if isinstance(own, nn.ModuleList) and len(own)]
    attentive = [own for own in lists if any(map(_attends, *zip(*own.named_modules(), strict=True)))]
    return max(attentive, key=lambda own: (len(own) == count, len(own)), default=None)


def _attends(name: str, module: nn.Module) -> bool:
    return "att" in name or "Attention" in type(module).__name__


def targets_in(path: str, blocks: Sequence[nn.Module]) -> str:
    """A regular expression for the linear layers in ``blocks`` that make queries and values; empty without any.

    What only clips around a linear layer counts as the layer.
    """
    modules = ((name, innermost(own)) for block in blocks for name, own in block.named_modules())
    linear = {name for name, own in modules if isinstance(own, nn.Linear)}
    own = {name: name.removesuffix(".linear").rpartition(".")[2] for name in linear}
    names = sorted(re.escape(name) for name, last in own.items() if TARGETS.fullmatch(last))
    numbers = "|".join(map(str, range(len(blocks))))
    return rf"{re.escape(path)}\.({numbers})\.({'|'.join(names)})" if names else ""


def cast(dtype: torch.dtype, own: Any) -> Any:
    return own.to(dtype) if isinstance(own, Tensor) and own.is_floating_point() else own


@contextmanager
def entry(table: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """``table[name]`` is ``value`` inside the context."""
    before = dict(table)
    table[name] = value
    try:
        yield
    finally:
        del table[name]
        if name in before:
            table[name] = before[name]
