"""LoRA adapters on a tower of a live model: put in by peft, switched on for single calls, taken out without trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismem_core.errors import AttachError


class Adapter:
    """One named LoRA over the linear layers of ``model`` whose names match ``targets``; off until :meth:`on`.

    peft's own switches (``set_adapter``, ``disable_adapters``) also flip ``requires_grad``, which would freeze what
    is being trained; so each layer's switch is set directly. The switch belongs to the model, not to a thread.

    Args:
        model: the whole model, so that peft sees how it was quantised.
        targets: regular expression over full module names.

    Raises:
        AttachError: if the targets are no linear layers, or the model already carries a peft adapter.
    """

    def __init__(self, model: nn.Module, name: str, targets: str, rank: int, alpha: int, dropout: float) -> None:
        taken = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        if any(not _ours(model.get_submodule(path)) for path in taken):
            raise AttachError(f"{taken[0]} already carries a peft adapter: merge it first (merge_and_unload)")
        self._model, self.name = model, f"vismem_{name}"
        self._state: RemovableHandle | None = None
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        configs = vars(model).pop("peft_config", None)  # peft keeps a list of adapters here; ours is not part of it
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
        try:
            inject_adapter_in_model(config, model, adapter_name=self.name)
        except Exception as error:
            self.layers = self._wrapped()
            self.eject()
            reason = " ".join(str(error).split())
            raise AttachError(f"the LoRA targets {targets!r} do not fit this model: {reason}") from error
        finally:
            vars(model).pop("peft_config", None)
            if configs is not None:
                model.peft_config = configs
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        self.layers = self._wrapped()
        for weight in self.parameters().values():
            weight.data = weight.data.float()  # small updates survive whatever the base's precision
        self._state = self._left_out()
        self._switch(off=True)
        self.train(False)

    def _left_out(self) -> RemovableHandle:
        """From now on ``model.state_dict`` gives the base's own, and so ``save_pretrained`` writes the base."""

        def leave_out(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
            tensors = list(state.items())
            state.clear()
            for name, tensor in tensors:
                path, matrix, _ = name.removeprefix(prefix).partition(".lora_")
                if matrix and path in self.layers:
                    continue
                path, _, rest = name.removeprefix(prefix).partition(".base_layer.")
                state[f"{prefix}{path}.{rest}" if path in self.layers else name] = tensor

        return self._model.register_state_dict_post_hook(leave_out)  # type: ignore[no-any-return]

    def _wrapped(self) -> dict[str, BaseTunerLayer]:
        return {
            path: module
            for path, module in self._model.named_modules()
            if isinstance(module, BaseTunerLayer) and self.name in module._get_available_adapters()
        }

    def _switch(self, *, off: bool) -> None:
        for layer in self.layers.values():
            layer._disable_adapters = off
            layer._active_adapter = [self.name]  # peft made the adapter put in last the active one everywhere

    @contextmanager
    def on(self, tokens: slice | None = None) -> Iterator[None]:
        """Apply the adapter to every forward pass inside the context, and no other that shares its layers.

        Contexts may be nested: the innermost one counts. With ``tokens`` several count, each for its own.

        Args:
            tokens: of a packed sequence (1, M, d), the ones it applies to; by default all.
        """
        before = {path: (layer._disable_adapters, layer._active_adapter) for path, layer in self.layers.items()}
        with ExitStack() as stack:
            self._switch(off=tokens is not None)
            if tokens is not None:
                for path in self.layers:
                    handle = self._model.get_submodule(path).register_forward_hook(self._add(tokens))
                    stack.callback(handle.remove)
            try:
                yield
            finally:
                for path, layer in self.layers.items():
                    layer._disable_adapters, layer._active_adapter = before[path]

    def _add(self, tokens: slice) -> Callable[[Any, Any, Tensor], Tensor]:
        """What peft's layer adds to its output, for some tokens."""

        def add(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            down, up = layer.lora_A[self.name], layer.lora_B[self.name]
            own = layer.lora_dropout[self.name](args[0][:, tokens].to(down.weight.dtype))
            output = output.clone()
            output[:, tokens] += (up(down(own)) * layer.scaling[self.name]).to(output.dtype)
            return output

        return add

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
            layer.lora_dropout[self.name].train(mode)  # type: ignore[attr-defined]

    def eject(self) -> None:
        """Put the original layers back, the very same objects."""
        for path, layer in self.layers.items():
            parent, _, child = path.rpartition(".")
            setattr(self._model.get_submodule(parent), child, layer.get_base_layer())
        self.layers = {}
        if self._state:
            self._state.remove()


def _ours(layer: nn.Module) -> bool:
    assert isinstance(layer, BaseTunerLayer)
    return all(name.startswith("vismem_") for name in layer._get_available_adapters())
