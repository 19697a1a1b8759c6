"""What memory costs: every figure is a ratio, measured in one run beside its named baseline.

The model has random weights and the shape of a published one, so nothing is downloaded. Variants take turns
(A B C A B C ...) and a figure is the median over the turns. On one CPU thread the clock counts the process's own time.

A plain decode step is the median time between two tokens of plain ``generate`` in the same turn. One invocation costs
what comes on top of the step of its token: the query, the formation, and the insertion (the passes over the latents and
the end token, with the loop around them). ``--suite gpu`` is benchmark_gpu.py.
"""

import json
import random
from collections.abc import Sequence
from functools import partial
from itertools import product
from math import isqrt
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from benchmark_gpu import suite
from measuring import SHAPES, Bench, Clock, Room, Turn, attached, build, shares
from rich.console import Console
from rich.table import Table

from vismem_core.base.families import find_backbone
from vismem_core.config import GrpoConfig, TrainConfig
from vismem_core.decoding.replay import read_prompts
from vismem_core.files.samples import Sample
from vismem_core.memory.trigger import Decision, Row, Trigger
from vismem_core.training.batches import make_batch
from vismem_core.training.invocation_grpo import InvocationGrpo
from vismem_core.training.rollout import rollouts

PER_ROW = 4
NOISY = 0.2
"""Spread between turns, of the median, from which a figure says little."""
LIMITS = {
    "idle: off": 1.02,
    "invocation: short encoder cache": 2.5,
    "invocation: long encoder cache": 4.0,
    "batch 16: mixed encoder": 1.2,
    "batch 16: long encoder": 1.35,
    "1296 visual tokens, batch 1: never invoking": 1.0,
    "1296 visual tokens, batch 16: never invoking": 1.0,
    "1296 visual tokens, batch 1: mixed": 1.15,
    "1296 visual tokens, batch 16: mixed": 0.85,
    "1296 visual tokens: images dropped": 1.1,
    "training, 1296 visual tokens: rollouts": 0.5,
    "training, 1296 visual tokens: step": 2.2,
}
"""What a figure is to be at most, at the default sizes."""
Figures = list[dict[str, Any]]


def cost_when_idle(bench: Bench) -> Figures:
    """(a) ``generate`` with memory that does nothing over plain ``generate``."""
    variants = {"off": attached("policy", off=True), "never": attached("never"), "policy": attached("policy")}
    turns = bench.turns(1, variants)
    return [figure(f"idle: {name}", "plain generate", calls(turns, name), turns[name]) for name in variants]


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
        middle.pop("all")
        costs = [own["all"] for own in parts]
        figures.append(figure(f"invocation: {name}", "plain decode step", costs, turns[name], middle))
    return figures


def split(turn: Turn, step: float) -> dict[str, float]:
    """One invocation in steps: query, latents, and what the passes take in which these and the end token enter."""
    count = len(turn.invoked) * step
    own, following = (sum(turn.steps[place + later] for place in turn.invoked) / count for later in (0, 1))
    parts = {name: turn.inside.get(name, 0.0) / count for name in ("query", "formation")}
    if not parts["formation"]:  # it rode in the token's own pass
        parts["formation"] = own - 1 - parts["query"]
    cost = own - 1 + following
    return {"all": cost, **parts, "insertion": cost - sum(parts.values())}


def cost_in_a_batch(bench: Bench, batch: int) -> Figures:
    """(c) A batch whose rows invoke four times each, no two rows at the same step, over the plain batch."""
    choices = list(product(("short", "long", "mixed"), ("encoder", "cross")))
    variants = {f"{kind} {builder}": attached(apart(bench.tokens, batch, kind), builder) for kind, builder in choices}
    turns = bench.turns(batch, variants)
    return [figure(f"batch {batch}: {name}", "plain batch", calls(turns, name), turns[name]) for name in variants]


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


def cost_of_training(bench: Bench, group: int = 16) -> Figures:
    """(d) One prompt's group of rollouts, and a whole step of Stage II, over plain ``generate`` of as many rows."""
    sample = Sample("one", tuple(bench.pictures(1)), "what is in this picture ?", "bag")
    settings = {"max_new_tokens": bench.tokens, "do_sample": True, "num_return_sequences": group}
    clock = Clock(bench.device)
    taken: dict[str, list[float]] = {"plain": [], "rollouts": [], "step": []}
    invoked = 0
    peaks: list[float] = []
    for turn in range(bench.repeats + 1):
        inputs = find_backbone(bench.model)(bench.model, bench.processor).inputs([sample.prompt], [sample.images])
        start = clock.now()
        bench.model.generate(**inputs.to(bench.device), **settings)
        plain = clock.now() - start
        room = Room(bench.device)
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
            invoked = sum(len(own.latents) for own in told)
            peaks.append((room.peak() - bench.loaded) / 1e6)
        for name, seconds in (("plain", plain), ("rollouts", rolled), ("step", step)):
            taken[name].append(seconds)
    over = f"plain generate of {group} rows"
    weights = sum(own.numel() * own.element_size() for own in bench.model.parameters())
    memory_figures = {"peak over base (MB)": max(peaks), "base (MB)": weights / 1e6}
    figures = []
    for name, parts in (("rollouts", {}), ("step", memory_figures)):
        ratios = [own / plain for own, plain in zip(taken[name][1:], taken["plain"][1:], strict=True)]
        told_as = f"training, {isqrt(bench.visual) ** 2} visual tokens: {name}"
        figures.append(figure(told_as, over, ratios, invoked, parts))
    return figures


def cost_by_context(bench: Bench, contexts: Sequence[int], batches: Sequence[int]) -> Figures:
    """(e) Decoding alone, the prompts' pass taken off, over that of plain ``generate``, by what the cache holds."""
    figures = []
    for visual, rows in product(contexts, batches):
        bench.visual = visual
        variants = {"never invoking": attached("policy"), "mixed": attached(apart(bench.tokens, rows, "mixed"))}
        turns = bench.turns(rows, variants)
        for name in variants:
            ratios = [own.decoding / plain.decoding for own, plain in zip(turns[name], turns["plain"], strict=True)]
            parts = {"whole call": median(calls(turns, name)), **shares(turns[name])}
            for whose, own in (("peak (MB)", name), ("plain's", "plain")):
                parts[whose] = max(turn.peak for turn in turns[own]) / 1e6
            told = f"{isqrt(visual) ** 2} visual tokens, batch {rows}: {name}"
            figures.append(figure(told, "plain decoding", ratios, turns[name], parts))
    return figures


def cost_without_images(bench: Bench, contexts: Sequence[int]) -> Figures:
    """(f) Steps after the images have left the cache, over plain ``generate``'s about prompts without images."""
    figures = []
    schedule, begin = "schedule:0=short", 4
    for visual in contexts:
        taken: dict[str, list[float]] = {"text": [], "kept": [], "dropped": []}
        for turn in range(bench.repeats + 1):
            bench.visual = 0
            turns = {"text": bench.turn(bench.inputs(1))}
            bench.visual = visual
            inputs = bench.inputs(1)
            for name, drops in (("kept", False), ("dropped", True)):
                with attached(schedule, drop_image_after_invocation=drops)(bench) as memory:
                    turns[name] = bench.turn(inputs, memory)
            for name, own in turns.items():
                taken[name] += [median(own.steps[begin:])] if turn else []
        for name in ("kept", "dropped"):
            ratios = [own / text for own, text in zip(taken[name], taken["text"], strict=True)]
            told = f"{isqrt(visual) ** 2} visual tokens: images {name}"
            figures.append(figure(told, "plain step without images", ratios, 1))
    return figures


def calls(turns: dict[str, list[Turn]], name: str) -> list[float]:
    """A variant's seconds over those of plain ``generate`` in the same turn."""
    return [turn.seconds / plain.seconds for turn, plain in zip(turns[name], turns["plain"], strict=True)]


def figure(
    name: str, over: str, ratios: list[float], turns: list[Turn] | int, parts: dict[str, float] | None = None
) -> dict[str, Any]:
    """One line of the report; the ratio is the median of the turns' own, ``turns`` or the number of invocations."""
    said = {"figure": name, "over": over, "ratio": median(ratios), "least": min(ratios), "most": max(ratios)}
    invoked = turns if isinstance(turns, int) else len(turns[0].invoked)
    return {**said, "limit": LIMITS.get(name), "invocations": invoked, "parts": parts or {}}


def show(report: dict[str, Any]) -> None:
    """The figures as a table; a cross marks what is over its limit."""
    table = Table(title=", ".join(f"{name} {value}" for name, value in report["setting"].items()))
    for name in report["figures"][0]:
        table.add_column(name)
    for own in report["figures"]:
        ratio, parts = f"{own['ratio']:.2f}", " ".join(f"{name} {value:.2f}" for name, value in own["parts"].items())
        if own["limit"]:
            ratio += " [green]✓[/]" if own["ratio"] <= own["limit"] else " [red]✗[/]"
        spread = {name: f"{own[name]:.2f}" for name in ("least", "most")}
        cells = {**own, "ratio": ratio, "parts": parts, **spread}.values()
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    Console().print(table)
    if report["noisy"]:
        told = ", ".join(report["noisy"])
        Console().print(f"The machine is too noisy to say: turns differ by more than {NOISY:.0%} for {told}.")


def main(
    shape: Annotated[str, typer.Option(help=f"The shape of the model: {', '.join(SHAPES)}.")] = "80m",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One size, as in text.num_hidden_layers=2.")] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Which figures: a (idle), b (one invocation), c (batch), d (training), e (by context), f (no images)."
        ),
    ] = "abcd",
    tokens: Annotated[int, typer.Option(help="New tokens per answer.", min=16)] = 128,
    batch: Annotated[int, typer.Option(help="Rows in figure c.", min=2)] = 16,
    visual: Annotated[int, typer.Option(help="Visual tokens of a prompt in figures a to d.", min=4)] = 81,
    contexts: Annotated[str, typer.Option(help="Visual tokens of a prompt in figures e and f.")] = "81,324,1296",
    batches: Annotated[str, typer.Option(help="Rows in figure e.")] = "1,4,16,64",
    repeats: Annotated[int, typer.Option(help="Turns of each variant.", min=1)] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    suite_: Annotated[
        Literal["ratios", "gpu"],
        typer.Option("--suite", help="The figures above, or what one GPU can tell in --minutes, eager and compiled."),
    ] = "ratios",
    minutes: Annotated[float, typer.Option(help="Time that --suite gpu may take.")] = 8.0,
    output: Annotated[Path | None, typer.Option(help="File for the JSON of --suite gpu.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """What memory costs on a random Qwen2.5-VL, in ratios measured side by side.

    Example: python examples/benchmark.py --only b --repeats 3
    """
    if odd := set(only) - set("abcdef"):
        raise typer.BadParameter(f"there are figures a to f, and no {', '.join(sorted(odd))}", param_hint="--only")
    if shape not in SHAPES:
        raise typer.BadParameter(f"one of {', '.join(SHAPES)}", param_hint="--shape")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter("one of float32, bfloat16, float16", param_hint="--dtype")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU here", param_hint="--device")
    torch.set_num_threads(threads)
    if suite_ == "gpu":
        try:
            if output is not None:  # before anything is measured
                output.parent.mkdir(parents=True, exist_ok=True)
                output.touch()
        except OSError as error:
            raise typer.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from error
        shapes = [shape] if shape != "80m" or set_ else ["3b", "7b"]
        suite(shapes, set_ or [], device, dtype, tokens, _numbers(batches), visual, minutes, output)
        return
    model, processor = build(shape, set_ or [], device, dtype)
    bench = Bench(model, processor, device, tokens, repeats, visual)
    parts = {"a": cost_when_idle, "b": cost_of_an_invocation, "c": partial(cost_in_a_batch, batch=batch)}
    parts["d"] = cost_of_training
    parts["e"] = partial(cost_by_context, contexts=_numbers(contexts), batches=_numbers(batches))
    parts["f"] = partial(cost_without_images, contexts=_numbers(contexts))
    millions = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)
    setting = {"parameters (M)": millions, "dtype": dtype, "device": device, "threads": threads, "new tokens": tokens}
    setting |= {"prompt": bench.inputs(1)["input_ids"].shape[1], "repeats": repeats}
    figures: Figures = []
    for number, letter in enumerate(only, 1):  # a line, since what moves beside a measurement disturbs it
        Console(stderr=True).print(f"measuring {letter}, {number} of {len(only)}")
        figures += parts[letter](bench)
    noisy = [own["figure"] for own in figures if own["most"] - own["least"] > NOISY * own["ratio"]]
    report = {"setting": setting, "figures": figures, "noisy": noisy}
    print(json.dumps(report)) if json_ else show(report)


def _numbers(told: str) -> list[int]:
    try:
        return [int(number) for number in told.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"numbers with commas between them, such as 81,324; not {told!r}") from error


if __name__ == "__main__":
    typer.run(main)
