"""What memory costs: every figure is a ratio, measured in one run beside its named baseline.

The model has random weights and the shape of a published one, so nothing is downloaded. Variants take turns
(A B C A B C ...) and a figure is the median over the turns. On one CPU thread the clock counts the process's own time.

A plain decode step is the median time between two tokens of plain ``generate`` in the same turn. One invocation costs
what comes on top of the step of its token: the query, the formation, the insertion (the pass over the latents and the
end token, in full) and the loop around them.
"""

import json
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from math import isqrt
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, StoppingCriteriaList

import vismem_core as vismem
from vismem_core.base.embedded import embedded
from vismem_core.base.families import find_backbone
from vismem_core.config import FormerConfig, GrpoConfig, MemoryConfig, QueryConfig, TrainConfig
from vismem_core.decoding.replay import read_prompts
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory
from vismem_core.memory.trigger import Decision, Row, Trigger
from vismem_core.training.batches import make_batch
from vismem_core.training.invocation_grpo import InvocationGrpo
from vismem_core.training.rollout import rollouts

PER_ROW = 4
LIMITS = {"off": (1.03, None), "short encoder cache": (6, 3), "long encoder cache": (9, 5)}
BATCH_LIMIT = (1.35, 1.2)

WIDTHS = ("hidden_size", "intermediate_size")
TEXT = ("num_hidden_layers", *WIDTHS, "num_attention_heads", "num_key_value_heads", "vocab_size")
VISION = ("depth", *WIDTHS, "num_heads")
SHAPES = {
    "80m": ((12, 768, 2048, 12, 2, 4096), (4, 256, 768, 4)),
    "3b": ((36, 2048, 11008, 16, 2, 151936), (32, 1280, 3420, 16)),
    "7b": ((28, 3584, 18944, 28, 4, 152064), (32, 1280, 3420, 16)),
}
Variant = Callable[["Bench"], AbstractContextManager[Memory]]
Figures = list[dict[str, Any]]
Limit = tuple[float, float | None]


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
    return model.eval(), AutoProcessor.from_pretrained(source, min_pixels=28 * 28, max_pixels=4096 * 28 * 28)


def side(visual: int) -> int:
    """Pixels of a square picture of so many visual tokens: each is made of 2 x 2 patches of 14 pixels."""
    return 28 * isqrt(visual)


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


@dataclass
class Turn:
    """One ``generate`` call: its seconds, those of each step but the first, and what memory did in it."""

    seconds: float
    steps: list[float]
    invoked: list[int]
    inside: dict[str, float]


class Bench:
    """A model and the turns that are taken on it."""

    def __init__(self, model: Any, processor: Any, device: str, tokens: int, repeats: int) -> None:
        self.model, self.processor = model, processor
        self.device, self.tokens, self.repeats, self.side = device, tokens, repeats, side(81)

    def inputs(self, rows: int) -> Any:
        """Prompts of different lengths, each about its own picture."""
        noise = np.random.default_rng(0).integers(0, 255, (rows, self.side, self.side, 3), dtype=np.uint8)
        texts = ["what is in this picture ? list the cells " + "and " * row for row in range(rows)]
        backbone = find_backbone(self.model)(self.model, self.processor)
        return backbone.inputs(texts, [[Image.fromarray(pixels)] for pixels in noise])

    def turn(self, inputs: Any, memory: Memory | None = None) -> Turn:
        clock, inside = Clock(self.device), dict[str, float]()
        settings = {"max_new_tokens": self.tokens, "do_sample": False}
        with timed(memory, clock, inside):
            start = clock.now()
            self.model.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList([clock]))
            seconds = clock.now() - start
        invoked = [invocation.position for invocation in memory.trace.invocations] if memory else []
        return Turn(seconds, [after - before for before, after in pairwise(clock.stamps)], invoked, inside)

    def turns(self, rows: int, variants: dict[str, Variant]) -> dict[str, list[Turn]]:
        """Plain ``generate`` with nothing attached, then each variant, again and again; the first round warms up."""
        inputs, taken = self.inputs(rows), {name: list[Turn]() for name in ("plain", *variants)}
        for _ in range(self.repeats + 1):
            taken["plain"].append(self.turn(inputs))
            for name, variant in variants.items():
                with variant(self) as memory:
                    taken[name].append(self.turn(inputs, memory))
        return {name: turns[1:] for name, turns in taken.items()}


@contextmanager
def timed(memory: Memory | None, clock: Clock, inside: dict[str, float]) -> Iterator[None]:
    """Add up the seconds inside the query builder and the formers."""
    parts = [("query", memory.builder), ("formation", memory.short), ("formation", memory.long)] if memory else []
    begun: list[float] = []

    def leave(name: str, *_: Any) -> None:
        inside[name] = inside.get(name, 0.0) + clock.now() - begun.pop()

    handles = [part.register_forward_pre_hook(lambda *_: begun.append(clock.now())) for _, part in parts]
    handles += [part.register_forward_hook(partial(leave, name)) for name, part in parts]
    yield
    for handle in handles:
        handle.remove()


def attached(trigger: str | Trigger, builder: str = "encoder", context: str = "cache", off: bool = False) -> Variant:
    """Memory that invokes when ``trigger`` says so; left to itself, this policy never would."""

    @contextmanager
    def variant(bench: Bench) -> Iterator[Memory]:
        config = MemoryConfig(
            query=QueryConfig(builder=builder),
            short=FormerConfig(length=8, context=context),
            long=FormerConfig(length=16, context=context),
            distance=1,
        )
        memory = vismem.attach(bench.model, bench.processor, config=config)
        memory.tokens.head.data.zero_()
        memory.trigger = trigger
        with memory.off() if off else nullcontext():
            yield memory
        memory.detach()

    return variant


def cost_when_idle(bench: Bench) -> Figures:
    """(a) ``generate`` with memory that does nothing over plain ``generate``."""
    variants = {"off": attached("policy", off=True), "never": attached("never"), "policy": attached("policy")}
    turns = bench.turns(1, variants)
    return [whole(f"idle: {name}", "plain generate", turns, name, LIMITS.get(name)) for name in variants]


def cost_of_an_invocation(bench: Bench) -> Figures:
    """(b) One invocation in plain decode steps, and its parts."""
    places = [bench.tokens * (2 * k + 1) // (2 * PER_ROW) for k in range(PER_ROW)]
    schedules = {kind: "schedule:" + ",".join(f"{place}={kind}" for place in places) for kind in ("short", "long")}
    choices = list(product(schedules, ("encoder", "cross"), ("cache", "recompute")))
    turns = bench.turns(1, {" ".join(own): attached(schedules[own[0]], *own[1:]) for own in choices})
    figures = []
    for name in map(" ".join, choices):
        parts = [split(turn, median(plain.steps)) for turn, plain in zip(turns[name], turns["plain"], strict=True)]
        middle = {part: median(own[part] for own in parts) for part in parts[0]}
        cost = middle.pop("all")
        figures.append(figure(f"invocation: {name}", "plain decode step", cost, middle, turns[name], LIMITS.get(name)))
    return figures


def split(turn: Turn, step: float) -> dict[str, float]:
    """One invocation in steps: query and latents are formed after the pass of its token, inserted in the next one."""
    count = len(turn.invoked) * step
    forming = sum(turn.steps[place] - step for place in turn.invoked) / count
    parts = {name: turn.inside.get(name, 0.0) / count for name in ("query", "formation")}
    if not parts["formation"]:  # it rode in the token's own pass
        parts["formation"] = forming - parts["query"]
    parts["insertion"] = sum(turn.steps[place + 1] for place in turn.invoked) / count
    return {"all": forming + parts["insertion"], **parts, "loop": forming - parts["query"] - parts["formation"]}


def cost_in_a_batch(bench: Bench, batch: int) -> Figures:
    """(c) A batch whose rows invoke four times each, no two rows at the same step, over the plain batch."""
    choices = list(product(("short", "long", "mixed"), ("encoder", "cross")))
    variants = {f"{kind} {builder}": attached(apart(bench.tokens, batch, kind), builder) for kind, builder in choices}
    turns = bench.turns(batch, variants)
    return [whole(f"batch {batch}: {name}", "plain batch", turns, name, BATCH_LIMIT) for name in variants]


def apart(tokens: int, batch: int, kind: str) -> Trigger:
    """Each row at its own step of every quarter of the answer, as far as the quarter has steps for all rows."""
    period, numbers = tokens // PER_ROW, dict[int, int]()
    steps = list(range(period - 3))
    random.Random(0).shuffle(steps)

    def decide(row: Row) -> Decision:
        number = numbers.setdefault(row.seed, len(numbers))
        turn, step = divmod(row.step, period)
        if turn >= PER_ROW or step != steps[number % len(steps)]:
            return "none"
        return {"short": "short", "long": "long"}.get(kind, ("short", "long")[(number + turn) % 2])

    return Trigger(decide)


def cost_by_context(bench: Bench, contexts: Sequence[int], batches: Sequence[int]) -> Figures:
    """(e) Decoding alone, the prompts' pass taken off, over that of plain ``generate``, by what the cache holds."""
    figures = []
    for visual, rows in product(contexts, batches):
        bench.side = side(visual)
        variants = {"never invoking": attached("policy"), "mixed": attached(apart(bench.tokens, rows, "mixed"))}
        turns = bench.turns(rows, variants)
        for name in variants:
            ratios = [sum(own.steps) / sum(plain.steps) for own, plain in zip(turns[name], turns["plain"], strict=True)]
            calls = [own.seconds / plain.seconds for own, plain in zip(turns[name], turns["plain"], strict=True)]
            parts = {"least": min(ratios), "most": max(ratios), "whole call": median(calls)}
            told = f"{isqrt(visual) ** 2} visual tokens, batch {rows}: {name}"
            figures.append(figure(told, "plain decoding", median(ratios), parts, turns[name], None))
    return figures


def cost_of_training(bench: Bench, group: int = 16) -> Figures:
    """(d) One prompt's group of rollouts, and a whole step of Stage II, over plain ``generate`` of as many rows."""
    noise = np.random.default_rng(0).integers(0, 255, (bench.side, bench.side, 3), dtype=np.uint8)
    sample = Sample("one", (Image.fromarray(noise),), "what is in this picture ?", "bag")
    settings = {"max_new_tokens": bench.tokens, "do_sample": True, "num_return_sequences": group}
    clock, loaded = Clock(bench.device), used(bench.device)
    taken: dict[str, list[float]] = {"plain": [], "rollouts": [], "step": []}
    shares: dict[str, float] = {}
    for turn in range(bench.repeats + 1):
        inputs = find_backbone(bench.model)(bench.model, bench.processor).inputs([sample.prompt], [sample.images])
        start = clock.now()
        bench.model.generate(**inputs, **settings)
        plain = clock.now() - start
        with attached("policy")(bench) as memory:
            stage = InvocationGrpo(
                memory, TrainConfig(grpo=GrpoConfig(group=group, max_new_tokens=bench.tokens, alpha=0.3))
            )
            optimizer = torch.optim.AdamW([own for _, own, _ in stage.parameters()], lr=1e-5)
            start = clock.now()
            batch = make_batch(memory.backbone, [sample])
            prompts = read_prompts(memory, batch.inputs)
            deals = stage.deals(batch, str(turn))
            told = rollouts(memory, prompts, [0] * group, list(range(group)), stage.sampling, deals=deals)
            rolled = clock.now() - start
            start = clock.now()
            stage.accumulate(batch, str(turn), 0.5)
            optimizer.step()
            stage.stepped()
            step = clock.now() - start
            shares = {"invocations": sum(len(own.latents) for own in told)}
        for name, seconds in (("plain", plain), ("rollouts", rolled), ("step", step)):
            taken[name].append(seconds)
    over = f"plain generate of {group} rows"
    weights = sum(own.numel() * own.element_size() for own in bench.model.parameters())
    memory_figures = {"peak over base (MB)": (used(bench.device, peak=True) - loaded) / 1e6, "base (MB)": weights / 1e6}
    figures = []
    for name, limit, parts in (("rollouts", 1.4, shares), ("step", 4.5, memory_figures)):
        ratios = [own / plain for own, plain in zip(taken[name][1:], taken["plain"][1:], strict=True)]
        about = {"figure": f"training: {name}", "over": over, "ratio": median(ratios), "limit": limit, "aim": None}
        figures.append({**about, "invocations": int(shares["invocations"]), "parts": parts})
    return figures


def used(device: str, peak: bool = False) -> float:
    """Bytes in use now, or at most so far."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def whole(name: str, over: str, turns: dict[str, list[Turn]], variant: str, limit: Limit | None) -> dict[str, Any]:
    """A variant's seconds over those of plain ``generate`` in the same turn."""
    ratios = [turn.seconds / plain.seconds for turn, plain in zip(turns[variant], turns["plain"], strict=True)]
    return figure(name, over, median(ratios), {"least": min(ratios), "most": max(ratios)}, turns[variant], limit)


def figure(
    name: str, over: str, ratio: float, parts: dict[str, float], turns: list[Turn], limit: Limit | None
) -> dict[str, Any]:
    """One line of the report."""
    highest, aim = limit or (None, None)
    said = {"figure": name, "over": over, "ratio": ratio, "limit": highest, "aim": aim}
    return {**said, "invocations": len(turns[0].invoked), "parts": parts}


def show(report: dict[str, Any]) -> None:
    """The figures as a table; a cross marks what is over its limit."""
    table = Table(title=", ".join(f"{name} {value}" for name, value in report["setting"].items()))
    for name in report["figures"][0]:
        table.add_column(name)
    for own in report["figures"]:
        ratio, parts = f"{own['ratio']:.2f}", " ".join(f"{name} {value:.2f}" for name, value in own["parts"].items())
        if own["limit"]:
            ratio += " [green]✓[/]" if own["ratio"] <= own["limit"] else " [red]✗[/]"
        cells = {**own, "ratio": ratio, "parts": parts}.values()
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    Console().print(table)


def main(
    shape: Annotated[str, typer.Option(help=f"The shape of the model: {', '.join(SHAPES)}.")] = "80m",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One size, as in text.num_hidden_layers=2.")] = None,
    only: Annotated[
        str,
        typer.Option(help="Which figures: a (idle), b (one invocation), c (batch), d (training), e (by context)."),
    ] = "abcd",
    tokens: Annotated[int, typer.Option(help="New tokens per answer.", min=16)] = 128,
    batch: Annotated[int, typer.Option(help="Rows in figure c.", min=2)] = 16,
    visual: Annotated[int, typer.Option(help="Visual tokens of a prompt in figures a to d.", min=4)] = 81,
    contexts: Annotated[str, typer.Option(help="Visual tokens of a prompt in figure e.")] = "81,324,1296",
    batches: Annotated[str, typer.Option(help="Rows in figure e.")] = "1,16",
    repeats: Annotated[int, typer.Option(help="Turns of each variant.", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """What memory costs on a random Qwen2.5-VL, in ratios measured side by side.

    Example: python examples/benchmark.py --only b --repeats 3
    """
    torch.set_num_threads(threads)
    model, processor = build(shape, set_ or [], device, dtype)
    bench = Bench(model, processor, device, tokens, repeats)
    bench.side = side(visual)
    parts = {"a": cost_when_idle, "b": cost_of_an_invocation, "c": partial(cost_in_a_batch, batch=batch)}
    parts["d"] = cost_of_training
    parts["e"] = partial(cost_by_context, contexts=_numbers(contexts), batches=_numbers(batches))
    millions = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)
    setting = {"parameters (M)": millions, "dtype": dtype, "device": device, "threads": threads, "new tokens": tokens}
    setting |= {"prompt": bench.inputs(1)["input_ids"].shape[1], "repeats": repeats}
    report = {"setting": setting, "figures": [own for letter in only for own in parts[letter](bench)]}
    print(json.dumps(report)) if json_ else show(report)


def _numbers(told: str) -> list[int]:
    return [int(number) for number in told.split(",")]


if __name__ == "__main__":
    typer.run(main)
