"""What the benchmarks measure with: random models of published shapes, clocks, turns of ``generate``, peaks."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, update_wrapper
from itertools import pairwise
from math import isqrt
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, StoppingCriteriaList

import vismem_core as vismem
from vismem_core.base.embedded import embedded
from vismem_core.base.families import find_backbone
from vismem_core.config import FormerConfig, MemoryConfig, QueryConfig
from vismem_core.decoding.loop import Decoder
from vismem_core.decoding.processors import Processors
from vismem_core.memory.memory import Memory
from vismem_core.memory.trigger import Trigger

WIDTHS = ("hidden_size", "intermediate_size")
TEXT = ("num_hidden_layers", *WIDTHS, "num_attention_heads", "num_key_value_heads", "vocab_size")
VISION = ("depth", *WIDTHS, "num_heads")
SHAPES = {
    "80m": ((12, 768, 2048, 12, 2, 4096), (4, 256, 768, 4)),
    "3b": ((36, 2048, 11008, 16, 2, 151936), (32, 1280, 3420, 16)),
    "7b": ((28, 3584, 18944, 28, 4, 152064), (32, 1280, 3420, 16)),
}
QUESTION = "what is in this picture ? list the cells "
CHOICE = ((Decoder, "_choices"), (Processors, "__call__"), (Decoder, "_select"))
"""The methods in which the next tokens are chosen."""
PROCESS = Path("/proc/self")
Variant = Callable[["Bench"], AbstractContextManager[Memory]]


def build(shape: str, changes: list[str], device: str, dtype: str) -> tuple[Any, Any]:
    """A random Qwen2.5-VL that never ends an answer, and the embedded model's processor."""
    source = embedded("qwen2_5_vl")[1].model
    config = AutoConfig.from_pretrained(source).to_dict()
    text, vision = config["text_config"], config["vision_config"]
    text.pop("layer_types", None)
    text |= dict(zip(TEXT, SHAPES[shape][0], strict=True))
    vision |= dict(zip(VISION, SHAPES[shape][1], strict=True)) | {"window_size": 112}
    for name, _, value in (change.partition("=") for change in changes):
        tower, _, size = name.partition(".")
        config[f"{tower}_config"][size] = int(value)
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half - half * 3 // 8 * 2, half * 3 // 8, half * 3 // 8]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    vision |= {"out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [vision["depth"] - 1]}
    config = AutoConfig.for_model(**config)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    size = {"shortest_edge": 28 * 28, "longest_edge": 4096 * 28 * 28}  # pixels of a whole image
    return model.eval(), AutoProcessor.from_pretrained(source, size=size)


class Clock(StoppingCriteria):
    """A criterion that stops nothing and stamps the time once per token."""

    def __init__(self, device: str) -> None:
        self.cuda, self.stamps = device.startswith("cuda"), list[float]()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.process_time() if not self.cuda and torch.get_num_threads() == 1 else time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.stamps.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Room:
    """Bytes in use: of the GPU, or of this process (0 where the system does not tell: it is not Linux)."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif PROCESS.is_dir():
            (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here on
        self.before = torch.cuda.memory_allocated() if self.cuda else self._told("VmRSS")

    def peak(self) -> float:
        """The most since this object was made."""
        return float(torch.cuda.max_memory_allocated() if self.cuda else self._told("VmHWM"))

    @staticmethod
    def _told(name: str) -> float:
        lines = (PROCESS / "status").read_text(encoding="ascii").splitlines() if PROCESS.is_dir() else [f"{name}: 0 kB"]
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@dataclass
class Turn:
    """One ``generate`` call.

    Attributes:
        seconds: of all of it.
        steps: seconds of each step but the first.
        invoked: positions of the invocation tokens.
        inside: seconds in the language model, the query builder, the formers and the choice of tokens.
        peak: bytes over the loaded base.
    """

    seconds: float
    steps: list[float]
    invoked: list[int]
    inside: dict[str, float]
    peak: float

    @property
    def decoding(self) -> float:
        """Seconds of all tokens but the first, with which the prompt is read."""
        return sum(self.steps)


class Bench:
    """A model and the turns that are taken on it.

    Attributes:
        visual: visual tokens of each prompt; 0 leaves the picture out.
        options: what ``generate`` is called with besides.
        watched: whether turns tell where their time goes. On a GPU that makes them wait where they need not.
    """

    def __init__(self, model: Any, processor: Any, device: str, tokens: int, repeats: int, visual: int = 81) -> None:
        self.model, self.processor = model, processor
        self.device, self.tokens, self.repeats, self.visual = device, tokens, repeats, visual
        self.options: dict[str, Any] = {}
        self.watched = not device.startswith("cuda")
        self.loaded = Room(device).before

    def pictures(self, count: int) -> list[Image.Image]:
        """Squares of noise: a visual token is made of 2 x 2 patches of 14 pixels."""
        side = 28 * isqrt(self.visual)
        noise = np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8)
        return [Image.fromarray(pixels) for pixels in noise]

    def inputs(self, rows: int) -> Any:
        """Prompts of different lengths, each about its own picture."""
        texts = [QUESTION + "and " * row for row in range(rows)]
        images = [[own] for own in self.pictures(rows)] if self.visual else [[] for _ in texts]
        backbone = find_backbone(self.model)(self.model, self.processor)
        return backbone.inputs(texts, images).to(self.device)

    def turn(self, inputs: Any, memory: Memory | None = None, **options: Any) -> Turn:
        clock, inside = Clock(self.device), dict[str, float]()
        settings = {"max_new_tokens": self.tokens, "do_sample": False} | self.options | options
        room = Room(self.device)
        with timed(memory, clock, inside) if self.watched else nullcontext():
            start = clock.now()
            self.model.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList([clock]))
            seconds = clock.now() - start
        invoked = [invocation.position for invocation in memory.trace.invocations] if memory else []
        steps = [after - before for before, after in pairwise(clock.stamps)]
        return Turn(seconds, steps, invoked, inside, room.peak() - self.loaded)

    def turns(self, rows: int, variants: dict[str, Variant], **options: Any) -> dict[str, list[Turn]]:
        """Plain ``generate`` with nothing attached, then each variant, again and again; the first round warms up."""
        inputs, taken = self.inputs(rows), {name: list[Turn]() for name in ("plain", *variants)}
        for _ in range(self.repeats + 1):
            taken["plain"].append(self.turn(inputs, **options))
            for name, variant in variants.items():
                with variant(self) as memory:
                    taken[name].append(self.turn(inputs, memory, **options))
        return {name: turns[1:] for name, turns in taken.items()}


@contextmanager
def timed(memory: Memory | None, clock: Clock, inside: dict[str, float]) -> Iterator[None]:
    """Add up the seconds inside the language model, the query builder, the formers, and where tokens are chosen."""
    parts = [("query", memory.builder), ("formation", memory.short), ("formation", memory.long)] if memory else []
    begun: list[float] = []

    def enter(*_: Any) -> None:
        begun.append(clock.now())

    def leave(name: str, *_: Any) -> None:
        inside[name] = inside.get(name, 0.0) + clock.now() - begun.pop()

    def watched(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        enter()
        result = own(*args, **kwargs)
        leave("choice")
        return result

    before = [getattr(owner, name) for owner, name in CHOICE]
    handles: list[Any] = []
    for name, part in parts:
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(partial(leave, name))]
    if memory:
        decoder = memory.backbone.decoder
        handles += [decoder.register_forward_pre_hook(enter), decoder.register_forward_hook(partial(leave, "model"))]
        for (owner, name), own in zip(CHOICE, before, strict=True):
            setattr(owner, name, _method(watched, own))
    try:
        yield
    finally:
        for (owner, name), own in zip(CHOICE, before, strict=True):
            setattr(owner, name, own)
        for handle in handles:
            handle.remove()


def _method(watched: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watched(own, self, *args, **kwargs)

    return update_wrapper(method, own)


def attached(
    trigger: str | Trigger, builder: str = "encoder", context: str = "cache", off: bool = False, **settings: Any
) -> Variant:
    """Memory that invokes when ``trigger`` says so; left to itself, this policy never would."""

    @contextmanager
    def variant(bench: Bench) -> Iterator[Memory]:
        config = MemoryConfig(
            query=QueryConfig(builder=builder),
            short=FormerConfig(length=8, context=context),
            long=FormerConfig(length=16, context=context),
            distance=1,
            **settings,
        )
        memory = vismem.attach(bench.model, bench.processor, config=config)
        memory.tokens.head.data.zero_()
        memory.trigger = trigger
        with memory.off() if off else nullcontext():
            yield memory
        memory.detach()

    return variant


def shares(turns: list[Turn]) -> dict[str, float]:
    """Where the time of whole calls went, as shares of it."""
    told: dict[str, float] = {}
    for name in ("model", "query", "formation", "choice"):
        told[name] = median(turn.inside.get(name, 0.0) / turn.seconds for turn in turns)
    return told | {"rest": 1 - sum(told.values())}
