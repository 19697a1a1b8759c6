"""Memory on a model: its parts, who invokes it, switching it off, saving it, and taking it off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import Tensor, nn

from vismem_core.base import outlook
from vismem_core.base.adapters import Adapter
from vismem_core.base.backbone import Backbone
from vismem_core.base.compiled import Compiler
from vismem_core.base.tensor import writes
from vismem_core.config import KINDS, Kind, MemoryConfig
from vismem_core.errors import AttachError
from vismem_core.files import checkpoint, publish
from vismem_core.plugins import registry

from . import tokens
from . import trigger as triggers
from .controls import REPLACEMENTS, Replacement
from .former import MemoryFormer, Needs
from .query import QueryBuilder
from .trace import Trace
from .trigger import Row, Trigger

FORMATION = ("builder.", "short.", "long.")
"""How the names of what Stage I trains begin; all the rest belongs to the policy."""


@dataclass(frozen=True)
class Switches:
    """What :meth:`Memory.triggered`, ``replaced``, ``recalled`` and ``off`` change."""

    trigger: Trigger
    budget: int
    replacement: Replacement | None = None
    enabled: bool = True
    recorded: Trace | None = None


class Memory(nn.Module):
    """Latent vision memory on one model; made by :func:`vismem_core.attach`.

    Attributes:
        config: its settings.
        hook: what stands between the model's ``generate`` and memory (:mod:`vismem_core.decoding.injection`).
        tokens, builder, short, long: the four tokens, the query builder B and the formers F_s and F_l.
        policy: the policy's own LoRA, if it has one.
    """

    def __init__(self, backbone: Backbone, config: MemoryConfig) -> None:
        super().__init__()
        vars(self)["_backbone"] = backbone  # it holds the base model, which is no part of this module
        self.config, self.hook = _fitting(backbone, config), cast(Any, None)
        self._usual = Switches(triggers.parse(config.trigger), config.budget)
        # What one thread or task switches is not seen by another.
        self._here: ContextVar[Switches | None] = ContextVar("vismem_switches", default=None)
        self._traced: ContextVar[Trace | None] = ContextVar("vismem_trace", default=None)
        self._last_trace = Trace()
        self._frozen: list[nn.Parameter] = []
        self._places = (backbone.device, backbone.vision_device)
        self.policy: Adapter | None = None
        self.compiler = Compiler(backbone)
        tokenizer = _tokenizer(backbone)
        ids = tokens.delimiter_ids(tokenizer, config.delimiters)
        if not ids:
            raise AttachError(f"the tokenizer has none of the delimiters {config.delimiters}: set memory.delimiters")
        self.delimiters = frozenset(ids)
        first = tokens.first_id(tokenizer, max(_rows(backbone.embeddings), _rows(backbone.head)))
        self.tokens = tokens.MemoryTokens.like(ids[0], backbone.embeddings, backbone.head, first).to(backbone.device)
        builder = registry("query_builders").get(config.query.builder)(backbone.width, config.query)
        self.builder: QueryBuilder = builder.to(backbone.device)
        # From here on the model gets hooks, and whatever fails takes them off.
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
        if self.backbone.blind and (former.needs.vision_cache or former.needs.vision_inputs):
            former.detach()
            raise AttachError(f"former {settings.name!r} needs the vision encoder's states: {self.backbone.blind}")
        return former

    @property
    def backbone(self) -> Backbone:
        """The adapter of the model's family."""
        return vars(self)["_backbone"]  # type: ignore[no-any-return]

    @property
    def model(self) -> Any:
        """The base model."""
        return self.backbone.model

    @property
    def longest(self) -> int:
        """The most latents that one invocation adds."""
        return max(self.config.short.length, self.config.long.length)

    def former(self, kind: Kind) -> MemoryFormer:
        """F_s or F_l."""
        return self.short if kind == "short" else self.long

    def needs(self, kinds: Sequence[Kind] | None = None) -> Needs:
        """What the formers want kept while a batch is decoded; by default those that the trigger may ask for."""
        kinds = self.active_trigger.kinds if kinds is None else kinds
        own = Needs(image_places=self.config.places == "image")
        return Needs.union([own, *(self.former(kind).needs for kind in kinds)])

    def follow(self) -> None:
        """Go where the model is now, if it was moved after it was given memory."""
        now = (self.backbone.device, self.backbone.vision_device)
        if now == self._places:
            return
        moved = dict(zip(self._places, now, strict=True))
        for part in self.modules():  # towers may be apart, so not all goes to one place
            part._apply(lambda own: own.to(moved.get(own.device, own.device)), recurse=False)
        self._places = now

    def __repr__(self) -> str:
        lengths = ", ".join(f"{kind} {getattr(self.config, kind).length}" for kind in KINDS)
        return (
            f"Memory on {type(self.model).__name__} ({self.backbone.name}): latents {lengths}; trigger {self.trigger}"
        )

    def __reduce__(self) -> Any:
        raise AttachError("a memory belongs to its model and is not copied: save it, and attach it to the other model")

    # Switching

    @property
    def trigger(self) -> str:
        """Who decides about invocations; assign a spec such as ``"random:0.5"`` to change it for all callers."""
        return self.active_trigger.spec

    @trigger.setter
    def trigger(self, spec: str | Trigger) -> None:
        self._usual = replace(self._usual, trigger=_parsed(spec))

    @property
    def active_trigger(self) -> Trigger:
        """The trigger here: of :meth:`triggered`, or else :attr:`trigger`."""
        return self._switches.trigger

    @property
    def enabled(self) -> bool:
        """False where memory is :meth:`off`."""
        return self._switches.enabled

    @property
    def replacement(self) -> Replacement | None:
        """What enters instead of latents that were formed, here; see :meth:`replaced`."""
        return self._switches.replacement

    def entering(self, latents: Tensor) -> Tensor:
        """What enters in place of latents (R, N, d): they themselves, unless they are replaced."""
        return latents if self.replacement is None else self.replacement(latents)

    @property
    def trace(self) -> Trace:
        """The invocations of the caller's last ``generate`` call: of this thread or task, or else of any."""
        own = self._traced.get()
        return self._last_trace if own is None else own

    @trace.setter
    def trace(self, trace: Trace) -> None:
        self._last_trace = trace
        self._traced.set(trace)

    @property
    def _switches(self) -> Switches:
        return self._here.get() or self._usual

    @contextmanager
    def _switched(self, **values: Any) -> Iterator[None]:
        """Other switches inside the context, for the thread or task that entered it."""
        before = self._here.set(replace(self._switches, **values))
        try:
            yield
        finally:
            with suppress(ValueError):  # a generator that is closed elsewhere has nothing to put back there
                self._here.reset(before)

    def triggered(self, spec: str | Trigger, *, budget: int | None = None) -> AbstractContextManager[None]:
        """Another trigger inside the context, and another :attr:`budget` if one is given."""
        return self._switched(trigger=_parsed(spec), **({} if budget is None else {"budget": budget}))

    @property
    def budget(self) -> int:
        """Invocations allowed per answer, here; usually those of ``config.budget``."""
        return self._switches.budget

    def replaced(self, how: str | Replacement) -> AbstractContextManager[None]:
        """Other vectors in the latents' places inside the context: ``noise``, ``zero``, ``repeated`` or a function."""
        return self._switched(replacement=REPLACEMENTS[how] if isinstance(how, str) else how)

    @property
    def recorded(self) -> Trace | None:
        """What ``forward`` takes latents from, here; see :meth:`recalled`."""
        return self._switches.recorded

    def recalled(self, trace: Trace) -> AbstractContextManager[None]:
        """``forward`` takes the latents that a call recorded, as constants, instead of forming them again.

        Rows and places of the trace are those of the sequences.
        """
        return self._switched(recorded=trace)

    def off(self) -> AbstractContextManager[None]:
        """The base model, exactly, inside the context."""
        return self._switched(enabled=False)

    @contextmanager
    def acting(self, tokens: slice | Tensor | None = None) -> Iterator[None]:
        """Passes inside the context are the policy's own: its LoRA is on, if it has one.

        These are the passes after the prompt: latents, end tokens, text, invocation tokens. Prompts are read by the
        base, so that their cache serves the policy, its reference and tau_base alike and carries no gradient; memory is
        formed without it too, from a cache in which it acted.

        Args:
            tokens: the policy's own, of a packed sequence or a mask (B, T) over rows; by default all.
        """
        with self.policy.on(tokens) if self.policy else nullcontext():
            yield

    def refuses(self, row: Row) -> str | None:
        """Why ``row`` may not invoke now, if it may not: ``budget``, or ``distance`` from the last one."""
        if row.invocations >= self.budget:
            return "budget"
        near = row.invocations > 0 and row.since_end < self.config.distance
        return "distance" if near else None

    def columns(self, tokens: int) -> int:
        """The most columns of a KV cache that an answer of so many tokens takes with its memory."""
        invocations = min(self.budget, -(-tokens // (self.config.distance + 2)))
        return tokens + invocations * self.longest

    def note(self, row: Row, token: int) -> None:
        """``row`` has written a token."""
        row.step += 1
        row.boundary = token in self.delimiters
        row.since_end = 0 if token >= self.tokens.first else row.since_end + 1
        row.invocations += self.tokens.kind(token) is not None

    def freeze(self) -> None:
        """The base's parameters need no gradients from now on, until :meth:`detach`."""
        base = [own for own in self.model.parameters() if own.requires_grad]
        for parameter in base:
            parameter.requires_grad_(False)
        self._frozen += base

    def detach(self) -> None:
        """The model as it was, bit for bit: no hook and no method of ours is left."""
        for kind in KINDS:
            if hasattr(self, kind):
                self.former(kind).detach()
        if self.policy:
            self.policy.eject()
        if self.hook is not None:
            self.hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen, self.compiler.room = [], []

    # Reading and writing

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special_tokens: bool = False) -> str:
        """One row's text with the names of its memory tokens, which the tokenizer itself leaves out."""
        told = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if not all(isinstance(own, int) and 0 <= own < self.tokens.width for own in told):
            raise AttachError(f"decode takes the ids of one row, from 0 to {self.tokens.width - 1}")
        return tokens.spelt(_tokenizer(self.backbone), self.tokens.first, told, skip_special_tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which ``<ms_I>``, ``<ml_I>``, ``<ms_E>`` and ``<ml_E>`` mean memory tokens.

        The tokenizer itself takes them for text like any other: nobody's question becomes an invocation.
        """
        return tokens.read(_tokenizer(self.backbone), self.tokens.first, text)

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
        """Write ``memory.safetensors``, ``vismem.json`` and a card; see :mod:`vismem_core.files.checkpoint`."""
        checkpoint.save(Path(folder), self.trained(), self.backbone, self.config, about)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        license: str | None = None,
        message: str = "",
    ) -> str:
        """Publish this memory; arguments, result and errors are those of :func:`vismem_core.files.publish.push`.

        Of processes that hold the base together the first does so, and the others give an empty text.
        """
        with TemporaryDirectory() as folder:
            self.save(folder)
            if not writes(self.model):
                return ""
            return publish.push(folder, repo, private=private, revision=revision, license=license, message=message)


def _rows(layer: nn.Module) -> int:
    return int(layer.weight.shape[0])  # type: ignore[index]


def _fitting(backbone: Backbone, config: MemoryConfig) -> MemoryConfig:
    """The settings as this kind of model can follow them; what it cannot do is said before anything is asked of it."""
    if why := outlook.refused(backbone.model.config):
        raise AttachError(why)
    if config.long.context == "recompute" and not backbone.rereads:
        raise AttachError(
            f"model type {backbone.model.config.model_type!r} reads images with more than embeddings, so prompts are "
            "not read again: use memory.long.context=cache"
        )
    if config.places == "image":
        if outlook.counts_columns(backbone.model.config):
            raise AttachError(
                f"{backbone.model.config.model_type!r} goes by where tokens stand in the cache, not by positions: use "
                "memory.places=text"
            )
        if config.compile:
            raise AttachError("memory.places=image is not compiled: use memory.compile=false, or memory.places=text")
    if config.drop_image_after_invocation and (why := outlook.keeps_images(backbone.model.config)):
        raise AttachError(f"{why}: use memory.drop_image_after_invocation=false")
    if backbone.blind and config.short.name == "lora":
        warnings.warn(
            f"extra tokens have no way through this vision encoder ({backbone.blind}): short memory is formed of the "
            "projected visual tokens, by the former 'transformer'",
            stacklevel=2,
        )
        config = replace(config, short=replace(config.short, name="transformer"))
    return config


def _tokenizer(backbone: Backbone) -> Any:
    return getattr(backbone.processor, "tokenizer", backbone.processor)


def _parsed(spec: str | Trigger) -> Trigger:
    return spec if isinstance(spec, Trigger) else triggers.parse(spec)
