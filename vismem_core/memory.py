"""Attaching memory to a live model, switching it off, saving it, and taking it off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import trigger as triggers
from .adapters import Adapter
from .backbone import Backbone
from .config import KINDS, Kind, MemoryConfig
from .controls import REPLACEMENTS, Replacement
from .errors import AttachError
from .former import MemoryFormer, Needs
from .injection import ATTRIBUTE, InjectionHook
from .plugins import registry
from .query import QueryBuilder
from .tokens import MemoryTokens, delimiter_ids, first_id
from .trace import Trace
from .trigger import Row, Trigger

FORMATION = ("builder.", "short.", "long.")
"""How the names of what Stage I trains begin; all the rest belongs to the policy."""
ROOM = 3
"""Ids an invocation needs before ``max_length``: its two tokens and one that can profit from it."""


class Memory(nn.Module):
    """Latent vision memory on one model; made by :func:`attach`.

    Attributes:
        config: its settings.
        tokens, builder, short, long: the four tokens, the query builder B and the formers F_s and F_l.
        policy: the policy's own LoRA, if it has one.
        trace: the invocations of the last ``generate`` call.
        replacement: what enters instead of latents that were formed; see :mod:`vismem_core.controls`.
    """

    def __init__(self, backbone: Backbone, config: MemoryConfig) -> None:
        super().__init__()
        vars(self)["_backbone"] = backbone  # it holds the base model, which is no part of this module
        self.config, self.trace = config, Trace()
        self.replacement: Replacement | None = None
        self.policy: Adapter | None = None
        tokenizer = getattr(backbone.processor, "tokenizer", backbone.processor)
        ids = delimiter_ids(tokenizer, config.delimiters)
        if not ids:
            raise AttachError(f"the tokenizer has none of the delimiters {config.delimiters}: set memory.delimiters")
        self.delimiters = frozenset(ids)
        self.active_trigger = triggers.parse(config.trigger)
        first = first_id(tokenizer, max(_rows(backbone.embeddings), _rows(backbone.head)))
        self.tokens = MemoryTokens.like(ids[0], backbone.embeddings, backbone.head, first).to(backbone.device)
        builder = registry("query_builders").get(config.query.builder)(backbone.width, config.query)
        self.builder: QueryBuilder = builder.to(backbone.device)
        self.hook = InjectionHook(self, backbone.model, tokenizer)
        try:
            self.short = self._make("short")
            self.long = self._make("long")
            if config.policy.trains == "lora":
                targets, own = backbone.lora_targets["long"], config.policy
                self.policy = Adapter(backbone.model, "policy", targets, own.rank, own.alpha, 0.0)
        except BaseException:
            self.detach()
            raise
        self.eval()

    def _make(self, kind: Kind) -> MemoryFormer:
        settings = getattr(self.config, kind)
        former = registry("formers").get(settings.name)(kind, self.backbone, settings)
        if not isinstance(former, MemoryFormer):
            raise AttachError(f"former {settings.name!r} gave {type(former).__name__} instead of a MemoryFormer")
        return former

    @property
    def backbone(self) -> Backbone:
        """The adapter of the model's family."""
        return vars(self)["_backbone"]  # type: ignore[no-any-return]

    @property
    def model(self) -> Any:
        """The base model."""
        return self.backbone.model

    def former(self, kind: Kind) -> MemoryFormer:
        """F_s or F_l."""
        return self.short if kind == "short" else self.long

    def needs(self) -> Needs:
        """What the formers want kept while a batch is decoded."""
        kinds = self.active_trigger.kinds
        return Needs.union(self.former(kind).needs for kind in kinds)

    def __repr__(self) -> str:
        lengths = ", ".join(f"{kind} {getattr(self.config, kind).length}" for kind in KINDS)
        return (
            f"Memory on {type(self.model).__name__} ({self.backbone.name}): latents {lengths}; trigger {self.trigger}"
        )

    # Switching

    @property
    def trigger(self) -> str:
        """Who decides about invocations; assign a spec such as ``"random:0.5"`` to change it."""
        return self.active_trigger.spec

    @trigger.setter
    def trigger(self, spec: str | Trigger) -> None:
        self.active_trigger = spec if isinstance(spec, Trigger) else triggers.parse(spec)

    @contextmanager
    def triggered(self, spec: str | Trigger) -> Iterator[None]:
        """Another trigger inside the context."""
        before = self.active_trigger
        self.trigger = spec
        try:
            yield
        finally:
            self.active_trigger = before

    @contextmanager
    def replaced(self, how: str | Replacement) -> Iterator[None]:
        """Other vectors in the latents' places inside the context: ``noise``, ``zero``, ``repeated`` or a function."""
        before = self.replacement
        self.replacement = REPLACEMENTS[how] if isinstance(how, str) else how
        try:
            yield
        finally:
            self.replacement = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base model, exactly, inside the context."""
        before, self.hook.enabled = self.hook.enabled, False
        try:
            yield
        finally:
            self.hook.enabled = before

    @contextmanager
    def acting(self, tokens: slice | None = None) -> Iterator[None]:
        """Passes inside the context are the policy's own: its LoRA is on, if it has one.

        These are the passes after the prompt: latents, end tokens, text, invocation tokens. Prompts are read by the
        base, so that their cache serves the policy, its reference and tau_base alike and carries no gradient; memory is
        formed without it too, from a cache in which it acted.

        Args:
            tokens: of a packed sequence, the policy's own; by default all.
        """
        with self.policy.on(tokens) if self.policy else nullcontext():
            yield

    def allows(self, row: Row, room: int | None) -> bool:
        """Whether ``row`` may invoke now: its budget, its distance from the last one, and ids left to write."""
        distant = row.invocations == 0 or row.since_end >= self.config.distance
        return distant and row.invocations < self.config.budget and (room is None or room >= ROOM)

    def detach(self) -> None:
        """The model as it was, bit for bit: modules, flags, hooks, vocabulary."""
        for kind in KINDS:
            if hasattr(self, kind):
                self.former(kind).detach()
        if self.policy:
            self.policy.eject()
        self.hook.remove()

    # Trained state

    def trained(self) -> dict[str, nn.Parameter]:
        """All trained tensors by name, those inside the base model's adapters included."""
        tensors = dict(self.named_parameters())
        for kind in KINDS:
            adapters = self.former(kind).adapter_parameters()
            tensors |= {f"{kind}.adapter.{name}": tensor for name, tensor in adapters.items()}
        if self.policy:
            tensors |= {f"policy.adapter.{name}": tensor for name, tensor in self.policy.parameters().items()}
        return tensors

    def save(self, folder: str | Path, **about: Any) -> None:
        """Write ``memory.safetensors`` and ``vismem.json``; see :mod:`vismem_core.checkpoint`."""
        from .checkpoint import save

        save(self, Path(folder), about)


def attach(
    model: Any,
    processor: Any,
    source: str | Path | None = None,
    *,
    config: MemoryConfig | None = None,
    backbone: str | None = None,
    seed: int = 0,
    any_base: bool = False,
) -> Memory:
    """Give a model latent vision memory: its ordinary ``generate`` invokes it from now on.

    Args:
        model: a loaded vision-language model; its weights are not written.
        processor: its processor.
        source: folder or hub id of a trained memory; without it memory is untrained.
        config: its settings; by default those that a trained memory was saved with, or else :class:`MemoryConfig`'s.
        backbone: registered name; found from the model if not given.
        seed: of the initial values.
        any_base: load a memory that was trained on other weights of the same shape.

    Raises:
        AttachError: if these are no model and processor, no backbone knows the model, memory is attached already, or
            weights are offloaded.
        CheckpointError: if ``source`` does not fit the model.
    """
    from . import checkpoint

    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise AttachError(f"attach(model, processor): the model is one of transformers, no {type(model).__name__}")
    if not hasattr(getattr(processor, "tokenizer", processor), "get_vocab"):
        raise AttachError(
            f"attach(model, processor): the processor has a tokenizer, {type(processor).__name__} has none"
        )
    if ATTRIBUTE in vars(model):
        raise AttachError("this model has memory attached already: memory.detach() first")
    away = next((name for name, own in model.named_parameters() if own.is_meta), None)
    if away is not None:
        raise AttachError(f"{away} is offloaded: memory needs all weights on devices; load fewer bits or use more GPUs")
    family = find_backbone(model, backbone)
    adapter = family(model, processor)
    stored = checkpoint.read(source, adapter, any_base=any_base) if source is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        memory = Memory(adapter, config or (stored.config if stored else MemoryConfig()))
    if stored:
        try:
            stored.fill(memory)
        except BaseException:
            memory.detach()
            raise
    return memory


def find_backbone(model: Any, name: str | None = None) -> type[Backbone]:
    """The registered backbone of that name, or the first that knows ``model``, fallbacks last."""
    backbones = registry("backbones")
    order = sorted(backbones.entries(), key=lambda entry: bool(entry.facts.get("fallback")))
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for candidate in [name] if name else [entry.name for entry in order]:
        family: type[Backbone] = backbones.get(candidate)
        if family.matches(model):
            return family
    raise AttachError(
        f"backbone {name!r} does not know model type {model_type!r}"
        if name
        else f"no backbone knows model type {model_type!r}; known: {', '.join(backbones.names())}"
    )


def _rows(layer: nn.Module) -> int:
    return int(layer.weight.shape[0])  # type: ignore[index]
