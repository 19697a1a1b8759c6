"""What ``attach`` puts on a model and ``detach`` takes off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .decoding import Decoder
from .errors import AttachError
from .session import Session
from .tokens import taught
from .trace import Trace

if TYPE_CHECKING:
    from .memory import Memory

ATTRIBUTE = "vismem_memory"
"""The attribute by which a model knows its memory."""


class InjectionHook:
    """The ordinary ``model.generate`` invokes memory, the embedding and the tokenizer know the four tokens.

    Attributes:
        enabled: with False, ``generate`` is the base model's own.
    """

    def __init__(self, memory: Memory, model: Any, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "_tokenizer", None)
        if backend is None or not hasattr(backend, "to_str"):
            raise AttachError(f"memory needs a fast tokenizer (the tokenizers library), not {type(tokenizer).__name__}")
        informed = taught(backend, memory.tokens.first)
        self.memory, self.model, self.tokenizer, self.enabled = memory, model, tokenizer, True
        self._generate = model.generate
        self._had_own_generate = "generate" in vars(model)
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._backend = backend
        # From here on the model changes; nothing below can fail.
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        tokenizer._tokenizer = informed
        self._handles = memory.tokens.lay_over(memory.backbone.embeddings)
        model.generate = self.generate
        vars(model)[ATTRIBUTE] = memory

    def remove(self) -> None:
        """Put everything back: the same objects, flags and vocabulary as before."""
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self.tokenizer._tokenizer = self._backend
        del self.model.generate
        if self._had_own_generate:
            self.model.generate = self._generate
        del vars(self.model)[ATTRIBUTE]

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with memory; same arguments, same results."""
        memory = self.memory
        memory.trace = Trace()
        self._check(args, kwargs)
        if not self.enabled or not memory.active_trigger.active:
            return self._generate(*args, **kwargs)
        session = Session(memory.backbone, memory.needs())
        decoder = Decoder(memory, session, memory.active_trigger, memory.trace, kwargs.get("streamer"))
        with session.listen():
            return self._generate(*args, **kwargs, custom_generate=decoder)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if not self.enabled:
            if ids is not None and not ids.is_floating_point() and self.memory.tokens.contains(ids).any():
                raise AttachError("the prompt holds memory tokens, which the base model does not know: strip them")
            return
        for argument in ("assistant_model", "custom_generate", "prompt_lookup_num_tokens"):
            if kwargs.get(argument) is not None:
                raise AttachError(f"memory does not work with generate({argument}=...): use memory.off() for this call")
