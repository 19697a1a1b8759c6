"""LoRA adapters beside a live model: peft's own layers, applied by hooks, switched on for single calls.

Nothing is put into the model. A forward hook on each target adds what the adapter makes of its input, and does nothing
where the adapter is off. So the model's modules, parameters and ``state_dict`` are its own at any time, and other
adapters, of peft or of whatever kind, act and are saved, merged and removed as if there were none of ours.

Which adapters are on belongs to the thread or task that switched them (a context variable), not to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from vismem_core.errors import AttachError

from . import tensor

FOREIGN = re.compile(r"\.(lora|ia3)_")
"""Names of parameters that are somebody's adapter, and not the model's own."""


def active() -> str:
    """The names of the adapters that are on here, with a star where it is for some tokens of each row."""
    return " ".join(own.name + "*" * isinstance(tokens, Tensor) for own, tokens in _ON.get().items())


def share() -> None:
    """Before a compiled pass: tell adapters for which tokens they are on, where that is an input of it.

    It is told in the same place each time: dynamo takes what hangs on a module for something that stays where it is,
    and CUDA graphs would be recorded anew whenever it has moved.
    """
    for own, tokens in _ON.get().items():
        if not isinstance(tokens, Tensor):
            continue
        if own.share is not None and own.share.shape == tokens.shape and own.share.device == tokens.device:
            own.share.copy_(tokens)
        else:
            own.share = tokens.clone()


def foreign(name: str) -> bool:
    """Whether a parameter of a model, by its name, is part of an adapter that peft put into it."""
    return FOREIGN.search(name) is not None


class Adapter:
    """One named LoRA over the linear layers of ``model`` whose names match ``targets``; off until :meth:`on`.

    Args:
        model: the whole model.
        targets: regular expression over full module names.

    Raises:
        AttachError: if the targets are no linear layers.
    """

    def __init__(self, model: nn.Module, name: str, targets: str, rank: int, alpha: int, dropout: float) -> None:
        found = {path: innermost(module) for path, module in model.named_modules() if re.fullmatch(targets, path)}
        odd = next((path for path, own in found.items() if not _linear(own)), None)
        if odd is not None or not found:
            why = f"{odd} is a {type(found[odd]).__name__}" if odd is not None else "no module has such a name"
            raise AttachError(f"the LoRA targets {targets!r} do not fit this model: {why}")
        self.name, self.share = f"vismem_{name}", cast("Tensor | None", None)
        self.among = tensor.mesh(model)
        self.layers = _lora_layers(found, self.name, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout))
        self._handles = [own.register_forward_hook(_Hook(self, path)) for path, own in found.items()]
        self.train(False)

    @contextmanager
    def on(self, tokens: slice | Tensor | None = None) -> Iterator[None]:
        """Apply the adapter to every forward pass inside the context, and no other of ours.

        Contexts may be nested: the innermost one counts. With ``tokens`` several count, each for its own.

        Args:
            tokens: the ones it applies to, of a packed sequence (1, M, d), or of rows (B, T, d) as a mask (B, T); by
                default all.
        """
        others = {} if tokens is None else {own: part for own, part in _ON.get().items() if part is not None}
        before = _ON.set({**others, self: tokens})
        try:
            yield
        finally:
            _ON.reset(before)

    # A pass that is being compiled takes these two as they are now: see ``active``, by which compiled passes are kept.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _is_on(self) -> bool:
        return self in _ON.get()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _tokens(self) -> slice | bool | None:
        tokens = _ON.get()[self]
        return True if isinstance(tokens, Tensor) else tokens

    def _shares(self) -> Tensor:
        """The mask (B, T), which compiled passes take as an input."""
        found = self.share if torch.compiler.is_compiling() else _ON.get()[self]
        assert isinstance(found, Tensor)
        return found

    def added(self, path: str, states: Tensor, output: Tensor) -> Tensor:
        """What a layer's output becomes where the adapter is on.

        Args:
            states, output: of the layer, (.., d_in) and (.., d_out), or this process's part of them.
        """
        layer, tokens = self.layers[path], self._tokens()
        down, up = layer.lora_A[self.name], layer.lora_B[self.name]
        if down.weight.device != states.device:  # the model was moved after it was given memory
            layer.to(states.device)
        own = states[:, tokens] if isinstance(tokens, slice) else states
        own = tensor.gathered(own, down.in_features, self.among)
        made = up(down(layer.lora_dropout[self.name](own.to(down.weight.dtype)))) * layer.scaling[self.name]
        made = tensor.parted(made, output.shape[-1], self.among)
        if not isinstance(tokens, slice):
            whole: Tensor = output + (made * self._shares()[..., None] if tokens else made)
            return whole.to(output.dtype)
        output = output.clone()
        output[:, tokens] += made.to(output.dtype)
        return output

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name, such as ``layers.0.self_attn.q_proj.lora_A``."""
        return {
            f"{path}.{matrix}": getattr(layer, matrix)[self.name].weight
            for path, layer in self.layers.items()
            for matrix in ("lora_A", "lora_B")
        }

    def train(self, mode: bool) -> None:
        """Switch the adapter's own dropout; the base model's mode is left alone."""
        for layer in self.layers.values():
            layer.lora_dropout[self.name].train(mode)

    def eject(self) -> None:
        """Take the hooks off; the model then has no trace of the adapter."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


_ON: ContextVar[Mapping[Adapter, slice | Tensor | None]] = ContextVar("vismem_adapters_on", default={})  # noqa: B039 - never written
"""The adapters that are on here, and for which tokens."""


class _Hook:
    """The forward hook on one layer."""

    def __init__(self, adapter: Adapter, path: str) -> None:
        self.adapter, self.path = adapter, path

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return self.adapter.added(self.path, args[0], output) if self.adapter._is_on() else None

    def __deepcopy__(self, memo: Any) -> _Hook:
        return self  # a copy of the model is no other model's memory

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # and a stored one has none


def _nothing() -> Any:
    return lambda layer, args, output: None


def innermost(layer: nn.Module) -> nn.Module:
    """The model's own layer in what peft put around it, which stays when the user's adapter goes."""
    while isinstance(inner := getattr(layer, "base_layer", None), nn.Module):
        layer = inner
    return layer


def _linear(layer: nn.Module) -> bool:
    """Whether it maps vectors of one width to another's, quantised or wrapped as it may be."""
    return all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features"))


def _lora_layers(found: Mapping[str, nn.Module], name: str, config: LoraConfig) -> dict[str, Any]:
    """peft's LoRA layers for linear layers of these shapes, in fp32 on their devices, and without what they wrap.

    peft makes them for layers of a model, so it is given blank ones, whose memory is never touched.
    """
    keys = {path: f"at{number}" for number, path in enumerate(found)}
    blank = {
        keys[path]: nn.utils.skip_init(nn.Linear, own.in_features, own.out_features, bias=False)
        for path, own in found.items()
    }
    config.target_modules = list(blank)
    made: Any = inject_adapter_in_model(config, nn.ModuleDict(blank), adapter_name=name)
    layers = {}
    for path, own in found.items():
        layer = made[keys[path]]
        layer.base_layer = nn.Identity()
        device = next((weight.device for weight in own.parameters()), torch.device("cpu"))
        layers[path] = layer.to(device, torch.float32)  # small updates survive whatever the base's precision
    return layers
