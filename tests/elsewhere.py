"""A device beside the CPU, on the CPU: tensors there compute as usual, and what mixes devices fails as on a GPU.

A tensor of ``far`` wraps one of the CPU. As with CUDA, an operation takes tensors of one device, and of the CPU only
scalars and indices; numpy takes none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
COPIES = {torch.ops.aten.copy_, torch.ops.aten._to_copy}
READS = {torch.ops.aten.index, torch.ops.aten._unsafe_index}
WRITES = {torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
MAKES = {torch.tensor, torch.as_tensor, torch.asarray}


class Far(Tensor):
    """A tensor that is elsewhere; ``near`` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor, device: torch.device) -> Far:
        shape, own = near.size(), {"strides": near.stride(), "storage_offset": near.storage_offset()}
        far: Far = Tensor._make_wrapper_subclass(cls, shape, dtype=near.dtype, device=device, **own)  # type: ignore
        far.near = near
        return far

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"{self.device}: {self.near}"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Far) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.near = other.near

    def tolist(self) -> Any:
        return self.near.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = list(_tensors((args, kwargs)))
    far = [value for value in tensors if isinstance(value, Far)]
    _check(func, args, tensors)
    if far and func.overloadpacket is torch.ops.aten._fused_sdp_choice:
        return 0  # plain arithmetic, the one way that exists everywhere
    device = kwargs.get("device")
    if device is not None:
        place = _place(device)
        kwargs = kwargs | {"device": "cpu" if place.type == NAME else place}
    else:
        place = max(far, key=Tensor.dim).device if far else torch.device("cpu")
    outer = {id(value.near): value for value in far}
    args, kwargs = _mapped(_near, (args, kwargs))
    result = func(*args, **kwargs)
    if place.type != NAME:
        return result
    return _mapped(lambda own: outer[id(own)] if id(own) in outer else Far(own, place), result)


def _check(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    packet = func.overloadpacket
    if packet in COPIES:
        return
    devices = {own.device for own in tensors if own.dim()}
    if packet in READS | WRITES:
        indices = {own.device for own in args[1] if own is not None}
        devices = {args[0].device} | (indices - {torch.device("cpu")})
        if packet in WRITES and args[2].dim():
            devices.add(args[2].device)
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {devices}")


def _place(device: Any) -> torch.device:
    place = torch.device(device)
    return torch.device(NAME, place.index or 0) if place.type == NAME else place


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for own in value.values() if isinstance(value, dict) else value:
            yield from _tensors(own)


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with its tensors changed; torch's own function for that takes longer than all that is computed here."""
    kind = type(value)
    if isinstance(value, Tensor):
        return change(value)
    if kind is tuple or kind is list:
        return kind([_mapped(change, own) for own in value])
    if kind is dict:
        return {name: _mapped(change, own) for name, own in value.items()}
    return tree_map_only(Tensor, change, value) if isinstance(value, (tuple, list, dict)) else value


def _near(value: Tensor) -> Tensor:
    return value.near if isinstance(value, Far) else value


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Makers(TorchFunctionMode):
    """Makers that fill a tensor from Python's numbers, out of the dispatcher's sight."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MAKES and kwargs.get("device") is not None and _place(kwargs["device"]).type == NAME:
            device = kwargs.pop("device")
            return func(*_mapped(_near, args), **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def devices() -> Iterator[None]:
    """Inside the context ``far`` is a device."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Makers(), _Operations():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _empty(size: Any, stride: Any = None, *, dtype: Any = None, device: Any = None, **rest: Any) -> Tensor:
    own = {"dtype": dtype or torch.get_default_dtype(), "device": "cpu"}
    near = torch.empty(size, **own) if stride is None else torch.empty_strided(size, stride, **own)
    return Far(near, _place(device))


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _near(target).copy_(_near(source))
    return target


_setup_privateuseone_for_python_backend(NAME)
_LIBRARY = torch.library.Library("aten", "IMPL")  # what torch asks of a device itself, beside any mode
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy, "PrivateUse1")
