"""What memory costs: every figure is a ratio, measured in one run beside its named baseline.

The model has random weights and published shapes, so nothing is downloaded. Variants take turns (A B C A B C ...),
and each figure is the median over the turns. On one CPU thread the clock counts the process's own time.

A plain decode step is the median time between two tokens of plain ``generate`` in the same turn. One invocation costs
all that is not such a step: the query, the formation, the insertion (the pass over the latents and the end token, in
full), and the loop around them.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
)

import vismem_core as vismem
from vismem_core.bases import embedded
from vismem_core.config import FormerConfig, Kind, MemoryConfig, QueryConfig
from vismem_core.memory import Memory, find_backbone
from vismem_core.trigger import Decision, Row, Trigger

INVOCATIONS = 4
PARTS = ("query", "formation", "insertion", "loop")
PATCH = 14


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2.5-VL; an image of ``patches`` x ``patches`` gives a quarter as many visual tokens."""

    layers: int = 12
    hidden: int = 768
    intermediate: int = 2048
    heads: int = 12
    kv_heads: int = 2
    vocab: int = 4096
    vision_layers: int = 4
    vision_hidden: int = 256
    vision_intermediate: int = 768
    vision_heads: int = 4
    patches: int = 18


TOWER = {"vision_layers": 32, "vision_hidden": 1280, "vision_intermediate": 3420, "vision_heads": 16}
SHAPES = {
    "80m": Shape(),
    "3b": Shape(36, 2048, 11008, 16, 2, 151936, **TOWER),
    "7b": Shape(28, 3584, 18944, 28, 4, 152064, **TOWER),
}


def build(shape: Shape, device: str, dtype: str) -> tuple[Any, Any]:
    """A random Qwen2.5-VL of that shape, which never ends an answer, and the embedded model's processor."""
    processor = AutoProcessor.from_pretrained(embedded("qwen2_5_vl")[1].model)
    ids = processor.tokenizer.convert_tokens_to_ids
    half = shape.hidden // shape.heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": max(shape.vocab, len(processor.tokenizer)),
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "patch_size": PATCH,
            "fullatt_block_indexes": list(range(shape.vision_layers))[7::8] or [shape.vision_layers - 1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))
    return model.eval(), processor


class Clock(StoppingCriteria):  # type: ignore[misc]
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


@dataclass
class Turn:
    """One ``generate`` call: its seconds, those of every step but the first, and what memory did in it."""

    seconds: float
    steps: list[float]
    invoked: list[int] = field(default_factory=list)
    inside: dict[str, float] = field(default_factory=dict)


class Bench:
    """A model, prompts about 81-token images, and turns over them."""

    def __init__(self, shape: Shape, device: str, dtype: str, tokens: int, repeats: int) -> None:
        self.model, self.processor = build(shape, device, dtype)
        self.shape, self.device, self.tokens, self.repeats = shape, device, tokens, repeats

    def inputs(self, rows: int) -> Any:
        """Prompts of different lengths, each about its own picture."""
        side, noise = self.shape.patches * PATCH, np.random.default_rng(0)
        pictures = [Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(rows)]
        texts = ["what is in this picture ? list the cells " + "and " * row for row in range(rows)]
        return find_backbone(self.model)(self.model, self.processor).inputs(texts, [[own] for own in pictures])

    def turn(self, inputs: Any, memory: Memory | None = None) -> Turn:
        clock, inside = Clock(self.device), dict[str, float]()
        with timed(memory, clock, inside):
            start = clock.now()
            self.model.generate(
                **inputs,
                max_new_tokens=self.tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
            seconds = clock.now() - start
        steps = [after - before for before, after in zip(clock.stamps, clock.stamps[1:], strict=False)]
        assert len(steps) == self.tokens - 1
        invoked = [invocation.position for invocation in memory.trace.invocations] if memory else []
        return Turn(seconds, steps, invoked, inside)

    def turns(self, rows: int, variants: dict[str, Variant]) -> dict[str, list[Turn]]:
        """All variants in turn, and ``plain`` before anything is attached; a first round warms up and is dropped."""
        inputs, taken = self.inputs(rows), {name: list[Turn]() for name in ("plain", *variants)}
        for _ in range(self.repeats + 1):
            taken["plain"].append(self.turn(inputs))
            for name, variant in variants.items():
                with variant(self) as memory:
                    taken[name].append(self.turn(inputs, memory))
        return {name: turns[1:] for name, turns in taken.items()}


Variant = Callable[[Bench], Any]
"""A context in which memory is attached in some way."""


@contextmanager
def timed(memory: Memory | None, clock: Clock, inside: dict[str, float]) -> Iterator[None]:
    """Add up the seconds inside the query builder and the formers."""
    parts = [("query", memory.builder), ("formation", memory.short), ("formation", memory.long)] if memory else []
    begun: list[float] = []

    def leave(name: str) -> Callable[..., None]:
        def add(*_: Any) -> None:
            inside[name] = inside.get(name, 0.0) + clock.now() - begun.pop()

        return add

    handles = [part.register_forward_pre_hook(lambda *_: begun.append(clock.now())) for _, part in parts]
    handles += [part.register_forward_hook(leave(name)) for name, part in parts]
    yield
    for handle in handles:
        handle.remove()


def attached(trigger: str | Trigger, builder: str = "encoder", context: str = "cache", off: bool = False) -> Variant:
    """Memory that invokes when ``trigger`` says so; left to itself, this policy never would."""

    @contextmanager
    def variant(bench: Bench) -> Iterator[Memory]:
        config = MemoryConfig(
            query=QueryConfig(builder=builder, width=bench.shape.hidden),
            short=FormerConfig(length=8, context=context),  # type: ignore[arg-type]
            long=FormerConfig(length=16, context=context),  # type: ignore[arg-type]
            distance=1,
        )
        memory = vismem.attach(bench.model, bench.processor, config=config)
        memory.tokens.head.data.zero_()
        memory.trigger = trigger  # type: ignore[assignment]
        memory.hook.enabled = not off
        yield memory
        memory.detach()

    return variant


def cost_when_idle(bench: Bench) -> list[dict[str, Any]]:
    """(a) ``generate`` with memory that does nothing over plain ``generate``."""
    variants = {"off": attached("policy", off=True), "never": attached("never"), "policy": attached("policy")}
    turns = bench.turns(1, variants)
    return [whole("idle", name, "plain generate", turns, limit={"off": 1.03}.get(name)) for name in variants]


def cost_of_an_invocation(bench: Bench) -> list[dict[str, Any]]:
    """(b) One invocation in plain decode steps, and its parts."""
    rows, places = [], [bench.tokens * (2 * k + 1) // (2 * INVOCATIONS) for k in range(INVOCATIONS)]
    choices = list(product(("short", "long"), ("encoder", "cross"), ("cache", "recompute")))
    schedules = {kind: "schedule:" + ",".join(f"{place}={kind}" for place in places) for kind in ("short", "long")}
    variants = {" ".join(own): attached(schedules[own[0]], own[1], own[2]) for own in choices}
    turns = bench.turns(1, variants)
    limits = {"short encoder cache": (6, 3), "long encoder cache": (9, 5)}
    for name in variants:
        pairs = zip(turns[name], turns["plain"], strict=True)
        parts = [split(turn, median(plain.steps)) for turn, plain in pairs]
        middle = {part: median(own[part] for own in parts) for part in parts[0]}
        limit, aim = limits.get(name, (None, None))
        invoked = len(turns[name][0].invoked)
        rows.append({"figure": "invocation", "variant": name, "over": "plain decode step", **middle})
        rows[-1] |= {"limit": limit, "aim": aim, "invocations": invoked}
    return rows


def split(turn: Turn, step: float) -> dict[str, float]:
    """What one invocation adds, in plain steps: the query and the latents are formed in the step after its token."""
    count = len(turn.invoked) * step
    forming = sum(turn.steps[place] - step for place in turn.invoked) / count
    parts = {name: turn.inside[name] / count for name in ("query", "formation")}
    parts["insertion"] = sum(turn.steps[place + 1] for place in turn.invoked) / count
    return {"ratio": forming + parts["insertion"], **parts, "loop": forming - parts["query"] - parts["formation"]}


def cost_in_a_batch(bench: Bench, batch: int) -> list[dict[str, Any]]:
    """(c) A batch whose rows invoke at different steps over the plain batch."""
    variants = {
        f"{kinds} {when}": attached(staggered(bench.tokens, batch, kinds, when))
        for kinds, when in product(("short", "long", "mixed"), ("apart", "random"))
    }
    turns = bench.turns(batch, variants)
    over = f"plain generate, batch {batch}"
    return [whole("batch", name, over, turns, 1.35, 1.2) for name in variants]


def staggered(tokens: int, batch: int, kinds: str, when: str) -> Trigger:
    """Four invocations per row: ``apart`` no two rows at the same step, ``random`` wherever the row's seed says."""
    period, numbers = tokens // INVOCATIONS, dict[int, int]()

    def place(row: Row, number: int, turn: int) -> int:
        if when == "apart":
            return number * (period - 3) // batch
        return random.Random(f"{row.seed}/{turn}").randrange(period - 3)

    def decide(row: Row) -> Decision:
        number = numbers.setdefault(row.seed, len(numbers))
        turn, step = divmod(row.step, period)
        if step != place(row, number, turn):
            return "none"
        alternating: tuple[Kind, Kind] = ("short", "long")
        return alternating[(number + turn) % 2] if kinds == "mixed" else kinds  # type: ignore[return-value]

    return Trigger(decide)


def whole(
    figure: str,
    variant: str,
    over: str,
    turns: dict[str, list[Turn]],
    limit: float | None = None,
    aim: float | None = None,
) -> dict[str, Any]:
    """The median ratio of a variant's seconds to those of plain ``generate`` in the same turn."""
    ratios = [turn.seconds / plain.seconds for turn, plain in zip(turns[variant], turns["plain"], strict=True)]
    spread = {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}
    invoked = len(turns[variant][0].invoked)
    return {"figure": figure, "variant": variant, "over": over, **spread, "limit": limit, "aim": aim} | {
        "invocations": invoked
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The figures as a table; a cross marks what is over its limit."""
    table = Table(title="cost of memory", caption=", ".join(f"{k} {v}" for k, v in report["setting"].items()))
    for name in ("figure", "variant", "over", "ratio", "limit (aim)", "parts or spread", "invocations"):
        table.add_column(name)
    for own in report["figures"]:
        ratio, limit = own["ratio"], own["limit"]
        verdict = "" if limit is None else f"{limit}" + (f" ({own['aim']})" if own["aim"] else "")
        mark = "" if limit is None else " [green]✓" if ratio <= limit else " [red]✗"
        parts = [f"{part} {own[part]:.2f}" for part in ("least", "most", *PARTS) if part in own]
        cells = (own["figure"], own["variant"], own["over"], f"{ratio:.3f}{mark}", verdict, " ".join(parts))
        table.add_row(*cells, str(own["invocations"]))
    console.print(table)


def main(
    shape: Annotated[str, typer.Option(help=f"Sizes to start from: {', '.join(SHAPES)}.")] = "80m",
    set_: Annotated[list[str], typer.Option("--set", help="Another size, as in --set layers=2.")] = [],  # noqa: B006
    only: Annotated[str, typer.Option(help="Some of a (idle), b (one invocation), c (batch).")] = "abc",
    tokens: Annotated[int, typer.Option(help="New tokens per answer.", min=16)] = 128,
    batch: Annotated[int, typer.Option(help="Rows in figure c.", min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="Turns; each figure is a median over them.", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """What memory costs, in ratios measured side by side.

    Example: python examples/benchmark.py --only b --repeats 3
    """
    torch.set_num_threads(threads)
    sizes = {name: int(value) for name, _, value in (text.partition("=") for text in set_)}
    bench = Bench(replace(SHAPES[shape], **sizes), device, dtype, tokens, repeats)
    figures = {"a": cost_when_idle, "b": cost_of_an_invocation, "c": partial(cost_in_a_batch, batch=batch)}
    parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    setting = {"parameters": parameters, "dtype": dtype, "device": device, "threads": threads, "tokens": tokens}
    setting |= {"repeats": repeats, "prompt": bench.inputs(1)["input_ids"].shape[1], "torch": torch.__version__}
    rows = [row for letter in only for row in figures[letter](bench)]
    report = {"setting": setting, "shape": asdict(bench.shape), "figures": rows}
    if json_:
        print(json.dumps(report))
    else:
        show(report, Console())


if __name__ == "__main__":
    typer.run(main)
