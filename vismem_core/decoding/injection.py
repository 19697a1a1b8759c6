"""What ``attach`` puts on a model and ``detach`` takes off."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

from vismem_core.base.adapters import foreign
from vismem_core.errors import AttachError
from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Trace

from .forward import forward
from .loop import Decoder
from .processors import of_text
from .session import Session
from .turn import TURN

REFUSED = ("generate_batch", "continuous_batching_context_manager", "init_continuous_batching")
"""Methods that generate by a loop and a cache of transformers' own, for many requests at once."""
ATTRIBUTE = "vismem_memory"
"""The attribute by which a model knows its memory."""
OFF = "use memory.off() for this call"
_LOOKED: ContextVar[bool] = ContextVar("vismem_looked", default=False)
"""Whether the ids of this pass have been looked at."""


class InjectionHook:
    """The model's ``generate`` and ``forward`` know memory, and so do its embedding and what reads their results."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.model = memory, memory.model
        model, gate = self.model, _Gate(True)
        self._handles = [
            *(handle for own in memory.backbone.embedders.items() for handle in memory.tokens.lay_over(*own)),
            *(memory.tokens.leave_out(*own) for own in memory.backbone.further_tables.items()),
            model.register_forward_pre_hook(gate.enter, prepend=True),
            model.register_forward_hook(gate.leave, always_call=True),
        ]
        inside = getattr(model, "base_model", model)
        if inside is not model:
            guard = _Guard(self._past_forward)
            self._handles.append(inside.register_forward_pre_hook(guard, with_kwargs=True))
        self._told: set[str] = set()
        self._methods = [_Method(model, name, instead) for name, instead in self._instead() if hasattr(model, name)]
        vars(model)[ATTRIBUTE] = _Known(memory)

    def _instead(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """The model's methods that are others while memory is attached."""
        yield "generate", self.generate
        yield "forward", self.forward
        yield "compute_transition_scores", self.transition_scores
        yield "resize_token_embeddings", self._unresized
        yield "_prepare_generation_config", self._prepare
        for name in REFUSED:
            yield name, self._refused(name)

    def remove(self) -> None:
        """Put everything back: the same methods and hooks as before. A second call does nothing."""
        known = vars(self.model).get(ATTRIBUTE)
        if known is None or known.memory is not self.memory:
            return
        for handle in self._handles:
            handle.remove()
        for method in self._methods:
            method.remove()
        del vars(self.model)[ATTRIBUTE]

    # Generating

    @torch.no_grad()
    def generate(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` with memory; same arguments, same results.

        Memory tokens in a prompt are read as tokens: what was formed there in another call is not formed again.
        Logits and scores are ``memory.tokens.width`` wide: the base's columns, then the four tokens'. A result that is
        no tensor has the call's trace as ``memory``. Calls from several threads take turns: what listens to the model
        while memory is formed hears all of it.
        """
        with TURN.call():
            return self._called(own, *args, **kwargs)

    def _called(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        memory = self.memory
        memory.trace = Trace()
        named = dict(zip(inspect.signature(own).parameters, args, strict=False)) | kwargs
        ids = named.get("input_ids", named.get("inputs"))
        told = ids is not None and not ids.is_floating_point() and bool(memory.tokens.contains(ids).any())
        if told and not memory.enabled:
            raise AttachError("the prompt holds memory tokens, which the base model does not know: take them out")
        for row in ids.tolist() if told and ids is not None else ():
            if (odd := memory.tokens.unpaired(row)) is not None:
                raise AttachError(f"the prompt: {odd}")
        if not memory.enabled:
            memory.trace.blocked["off"] += 1
        # A prompt that holds memory tokens needs logits as wide as its ids, even if no more are to come.
        if not memory.enabled:
            return own(*args, **kwargs)
        if not (memory.active_trigger.active or told):
            return _with_trace(own(*args, **kwargs), memory.trace)
        if self._setting(named, "is_assistant"):
            memory.trace.blocked["drafts"] += 1
            return own(*args, **kwargs)
        self._check(named)
        memory.follow()
        session = Session(memory.backbone, memory.needs())
        decoder = Decoder(memory, session, memory.active_trigger, memory.trace, named.get("streamer"))
        result = self.decode(decoder, **self._stopping(named))
        return _with_trace(result, decoder.trace)

    def decode(self, decoder: Decoder, **arguments: Any) -> Any:
        """The base's ``generate`` with another decoding loop, whose session listens from the prefill on."""
        generate = self._methods[0].own
        if allowed := arguments.get("prefix_allowed_tokens_fn"):
            arguments["prefix_allowed_tokens_fn"] = of_text(allowed, self.memory.tokens)
        with TURN.call(), decoder.session.listen():
            return generate(**arguments, custom_generate=decoder)

    def _check(self, named: dict[str, Any]) -> None:
        for argument in ("assistant_model", "custom_generate", "prompt_lookup_num_tokens"):
            if named.get(argument) is not None:
                raise AttachError(f"memory does not work with generate({argument}=...): {OFF}")
        if "paged" in (self._setting(named, "cache_implementation") or ""):
            raise AttachError(f"memory does not work with continuous batching: {OFF}")

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

    def _prepare(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A ``generate`` that was called on the class comes by here, and no memory takes part in it."""
        if not TURN.taken and self.memory.enabled:
            self.memory.trace = Trace(blocked=Counter(bypassed=1))
            self._warn(f"{self.memory.trace.why()}: call model.generate")
        return own(*args, **kwargs)

    def _refused(self, name: str) -> Callable[..., Any]:
        def refuse(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.memory.enabled:
                raise AttachError(f"memory does not work with {name}(): use generate(), or memory.off() for this call")
            return own(*args, **kwargs)

        return refuse

    # What comes after, and before

    def forward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``model.forward``; on sequences that hold memory tokens with memory (:mod:`vismem_core.decoding.forward`)."""
        if TURN.taken or not self._holds(args, kwargs):  # taken: the pass is a call's own
            before = _LOOKED.set(True)
            try:
                return own(*args, **kwargs)
            finally:
                _LOOKED.reset(before)
        self._tell()
        named = dict(zip(inspect.signature(own).parameters, args, strict=False)) | kwargs
        return forward(self.memory, **named)

    def _holds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        ids = kwargs.get("input_ids", args[0] if args else None)
        return isinstance(ids, Tensor) and bool(self.memory.tokens.contains(ids).any())

    def _past_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trainers that call what is inside the model would feed memory tokens without their latents."""
        if not (_LOOKED.get() or TURN.taken) and self._holds(args, kwargs):
            raise AttachError(
                f"memory tokens came to {type(module).__name__} past model.forward, where latents enter: call the "
                "model, and give trainers vismem_core.trainable(memory)"
            )

    def _tell(self) -> None:
        """A trainer that can train nothing hears of it once."""
        if not (self.model.training and torch.is_grad_enabled()):
            return
        trains = [name for name, own in self.model.named_parameters() if own.requires_grad]
        if all(map(foreign, trains)) and trains:
            return
        what = "the base's own parameters train here" if trains else "no parameter of this model trains"
        self._warn(
            f"{what}, and its memory's are not among them: to train memory, give the trainer "
            "vismem_core.trainable(memory) instead of the model"
        )

    def _warn(self, told: str) -> None:
        """Say it once."""
        if told not in self._told:
            self._told.add(told)
            warnings.warn(told, stacklevel=7)

    def transition_scores(
        self,
        own: Callable[..., Any],
        sequences: Tensor,
        scores: tuple[Tensor, ...],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """``model.compute_transition_scores``, which takes all scores for as wide as the base's vocabulary."""
        if scores[0].shape[-1] != self.memory.tokens.width or beam_indices is not None:
            return own(sequences, scores, beam_indices, normalize_logits)  # type: ignore[no-any-return]
        steps = torch.stack(scores, dim=1)
        steps = steps.log_softmax(-1) if normalize_logits else steps
        return steps.gather(2, sequences[:, -len(scores) :, None]).squeeze(2)

    def _unresized(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("new_num_tokens", args[0] if args else None)
        if wanted in (None, self.memory.backbone.embeddings.weight.shape[0]):
            return own(*args, **kwargs)
        raise AttachError("the memory tokens' ids follow the model's vocabulary: memory.detach() before resizing it")


class _Method:
    """One of a model's methods while memory is attached; copied or stored with the model, it is the model's own.

    Attributes:
        own: what it was before.
    """

    def __init__(self, model: Any, name: str, instead: Callable[..., Any]) -> None:
        self.model, self.name = model, name
        self.own, self._before = getattr(model, name), vars(model).get(name)
        self._instead: Callable[..., Any] | None = instead
        update_wrapper(self, self.own)  # its signature tells trainers what they may pass
        setattr(model, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs) if self._instead is None else self._instead(self.own, *args, **kwargs)

    def remove(self) -> None:
        """Put the model's own back. Where another program has put its own around this one, it is passed through."""
        self._instead = None
        if vars(self.model).get(self.name) is not self:
            return
        delattr(self.model, self.name)
        if self._before is not None:
            setattr(self.model, self.name, self._before)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._before is not None:
            return _itself, (self._before,)
        return _own_method, (self.model, self.name)


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


class _Guard:
    """A hook with keyword arguments; copied or stored with the model, it does nothing."""

    def __init__(self, guard: Callable[..., None] | None) -> None:
        self.guard = guard

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.guard is not None:
            self.guard(module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Guard, (None,)


class _Known:
    """How a model knows its memory; a copy of the model has none."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _with_trace(result: Any, trace: Trace) -> Any:
    """For callers whose calls are not in one thread or task."""
    if isinstance(result, ModelOutput):
        result.memory = trace
    return result


def _itself(own: Any) -> Any:
    return own


def _own_method(model: Any, name: str) -> Any:
    return MethodType(getattr(type(model), name), model)
