"""What ``attach`` puts on a model and ``detach`` takes off."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

from vismem_core.errors import AttachError
from vismem_core.memory.memory import Memory
from vismem_core.memory.tokens import forget, teach
from vismem_core.memory.trace import Trace

from .loop import Decoder
from .session import Session
from .turn import TURN

BATCHED = ("generate_batch", "continuous_batching_context_manager", "init_continuous_batching")
"""Methods that generate by a loop and a cache of transformers' own, for many requests at once."""
ATTRIBUTE = "vismem_memory"
"""The attribute by which a model knows its memory."""


class InjectionHook:
    """The ordinary ``model.generate`` invokes memory, the embedding and the tokenizer know the four tokens."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.model = memory, memory.model
        self.tokenizer = getattr(memory.backbone.processor, "tokenizer", memory.backbone.processor)
        model = self.model
        self._generate = model.generate
        self._had_own_generate = "generate" in vars(model)
        teach(self.tokenizer, memory.tokens.first)
        gate = _Gate(True)
        self._handles = [
            *memory.tokens.lay_over(memory.backbone.embeddings),
            model.register_forward_pre_hook(gate.enter, prepend=True),
            model.register_forward_hook(gate.leave, always_call=True),
        ]
        model.generate = _Generate(self)
        self._batched = [name for name in BATCHED if hasattr(model, name) and name not in vars(model)]
        for name in self._batched:
            setattr(model, name, _Refused(memory, name))
        vars(model)[ATTRIBUTE] = _Known(memory)

    def remove(self) -> None:
        """Put everything back: the same objects, flags and vocabulary as before. A second call does nothing."""
        known = vars(self.model).get(ATTRIBUTE)
        if known is None or known.memory is not self.memory:
            return
        for handle in self._handles:
            handle.remove()
        forget(self.tokenizer)
        for name in self._batched:
            delattr(self.model, name)
        del self.model.generate
        if self._had_own_generate:
            self.model.generate = self._generate
        del vars(self.model)[ATTRIBUTE]

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with memory; same arguments, same results.

        Calls from several threads take turns: what listens to the model while memory is formed hears all of it.
        """
        with TURN.call():
            return self._called(*args, **kwargs)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        memory = self.memory
        memory.trace = Trace()
        named = dict(zip(inspect.signature(self._generate).parameters, args, strict=False)) | kwargs
        ids = named.get("input_ids", named.get("inputs"))
        told = ids is not None and not ids.is_floating_point() and bool(memory.tokens.contains(ids).any())
        if told and not memory.enabled:
            raise AttachError("the prompt holds memory tokens, which the base model does not know: strip them")
        # A prompt that holds memory tokens needs logits as wide as its ids, even if no more are to come.
        if not memory.enabled or not (memory.active_trigger.active or told):
            return self._generate(*args, **kwargs)
        self._check(named)
        memory.follow()
        session = Session(memory.backbone, memory.needs())
        decoder = Decoder(memory, session, memory.active_trigger, memory.trace, named.get("streamer"))
        result = self.decode(decoder, **self._stopping(named))
        if isinstance(result, ModelOutput):
            result.memory = decoder.trace  # for callers whose calls are not in one thread or task
        return result

    def decode(self, decoder: Decoder, **arguments: Any) -> Any:
        """The base's ``generate`` with another decoding loop, whose session listens from the prefill on."""
        with TURN.call(), decoder.session.listen():
            return self._generate(**arguments, custom_generate=decoder)

    def _check(self, named: dict[str, Any]) -> None:
        for argument in ("assistant_model", "custom_generate", "prompt_lookup_num_tokens"):
            if named.get(argument) is not None:
                raise AttachError(f"memory does not work with generate({argument}=...): use memory.off() for this call")
        if "paged" in (self._setting(named, "cache_implementation") or ""):
            raise AttachError("memory does not work with continuous batching: use memory.off() for this call")

    def _setting(self, named: dict[str, Any], name: str) -> Any:
        """A setting of this call, from where ``generate`` would take it."""
        given = named.get("generation_config")
        own = named.get(name, getattr(given, name, None))
        return getattr(self.model.generation_config, name, None) if own is None else own

    def _stopping(self, named: dict[str, Any]) -> dict[str, Any]:
        """``generate`` keeps the tokenizer from custom loops, so stop strings become a criterion here."""
        tokenizer, strings = named.pop("tokenizer", None), self._setting(named, "stop_strings")
        if tokenizer is None or strings is None:
            return named
        criteria = StoppingCriteriaList(
            [*(named.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
        )
        return named | {"stop_strings": None, "stopping_criteria": criteria}


class _Generate:
    """``model.generate`` while memory is attached; copied or stored with the model, it is the class's own again."""

    def __init__(self, hook: InjectionHook) -> None:
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook.generate(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_method, (self.hook.model, "generate")


class _Refused:
    """A way of generating that memory cannot take part in; with memory off it is the model's own."""

    def __init__(self, memory: Memory, name: str) -> None:
        self.memory, self.name = memory, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = getattr(type(self.memory.model), self.name)
        if self.memory.enabled:
            raise AttachError(f"memory does not work with {self.name}(): use generate(), or memory.off() for this call")
        return own(self.memory.model, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_method, (self.memory.model, self.name)


class _Gate:
    """Hooks on the model: a pass of its own, by another thread, waits until a call with memory is over."""

    def __init__(self, attached: bool) -> None:
        self.attached = attached

    def enter(self, model: Any, args: Any) -> None:
        if self.attached:
            TURN.enter()

    def leave(self, model: Any, args: Any, output: Any) -> None:
        if self.attached:
            TURN.leave()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Gate, (False,)


class _Known:
    """How a model knows its memory; a copy of the model has none."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _own_method(model: Any, name: str) -> Any:
    return MethodType(getattr(type(model), name), model)
