"""What one GPU can tell of memory in a few minutes: ``python examples/benchmark.py --suite gpu --device cuda``.

Random weights of published shapes, answers of fixed length. Every line has plain ``generate`` beside it, under the same
settings: eager with its default cache, and compiled on a static one. Times are of decoding, the prompt's pass taken
off; peaks are over the loaded base. Lines that the time does not allow are named as left out.
"""

import gc
import json
import platform
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from measuring import Bench, Clock, Room, Turn, attached, build, shares
from rich.console import Console
from rich.progress import track

from vismem_core.config import GrpoConfig, TrainConfig
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory
from vismem_core.memory.trigger import Decision, Row, Trigger
from vismem_core.training.batches import make_batch
from vismem_core.training.formation_grpo import FormationGrpo
from vismem_core.training.invocation_grpo import InvocationGrpo

MODES: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"cache_implementation": "static"}}
TURNS = 4
GROUP = 16
Line = dict[str, Any]


def suite(
    shapes: Sequence[str],
    changes: list[str],
    device: str,
    dtype: str,
    tokens: int,
    batches: Sequence[int],
    visual: int,
    minutes: float,
    output: Path | None,
) -> None:
    """Measure, print, and write one JSON file."""
    begin, lines, left = time.monotonic(), list[Line](), list[str]()
    for shape in shapes:
        model, processor = build(shape, changes, device, dtype)
        bench = Bench(model, processor, device, tokens, TURNS, visual)
        told = {"shape": shape, "parameters (M)": round(sum(own.numel() for own in model.parameters()) / 1e6)}
        for name, measure in track(list(_measures(bench, batches)), description=shape, console=Console(stderr=True)):
            if time.monotonic() - begin > 60 * minutes:
                left.append(f"{shape}: {name}")
                continue
            try:
                lines += [{**told, **line} for line in measure()]
            except torch.OutOfMemoryError:
                left.append(f"{shape}: {name} (out of memory)")
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
        del bench, model
    setting = {"device": _device(device), "dtype": dtype, "new tokens": tokens, "visual tokens": visual}
    setting |= {"torch": torch.__version__, "transformers": transformers.__version__}
    report = json.dumps({"setting": setting, "lines": lines, "left_out": left}, indent=1)
    print(report)
    if output is not None:
        output.write_text(report + "\n", encoding="utf-8")


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()


def _measures(bench: Bench, batches: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """In the order of what one wants to know first."""
    decoding: list[tuple[str, Any]] = [
        (f"batch {rows}, {mode}", lambda rows=rows, mode=mode: _decoding(bench, rows, mode))
        for rows in batches
        for mode in MODES
    ]
    training: list[tuple[str, Any]] = [
        (f"a step of {stage.__name__}", lambda stage=stage: _training(bench, stage))
        for stage in (FormationGrpo, InvocationGrpo)
    ]
    yield from [*decoding[:4], *training, *decoding[4:]]


def _decoding(bench: Bench, rows: int, mode: str) -> list[Line]:
    """Plain ``generate``, memory that never invokes, and rows that invoke twice each, at different steps."""
    options, inputs = MODES[mode], bench.inputs(rows)
    plain = _turns(bench, inputs, None, options, TURNS // 2)
    turns, inside = dict[str, list[Turn]](), dict[str, dict[str, float]]()
    for name, variant in {"never invoking": attached("policy"), "mixed": attached(_twice(bench.tokens))}.items():
        with variant(bench) as memory:  # for all turns, since each attachment is compiled anew
            turns[name] = _turns(bench, inputs, memory, options, TURNS)
            inside[name] = _inside(bench, inputs, memory, options)
    plain += _turns(bench, inputs, None, options, TURNS - TURNS // 2)
    step = median(own.decoding / len(own.steps) for own in plain)
    lines: list[Line] = [{"what": f"batch {rows}, {mode}: plain", **_told(plain, plain)}]
    for name, own in turns.items():
        line = {"what": f"batch {rows}, {mode}: {name}", **_told(own, plain), "where": inside[name]}
        if count := len(own[0].invoked):
            extra = median(turn.decoding for turn in own) - median(turn.decoding for turn in plain)
            line |= {"invocations": count, "plain steps per invocation": extra / step / count}
        lines.append(line)
    return lines


def _turns(bench: Bench, inputs: Any, memory: Memory | None, options: dict[str, Any], count: int) -> list[Turn]:
    """So many turns, after two in which everything is compiled and recorded."""
    return [bench.turn(inputs, memory, **options) for _ in range(2 + count)][2:]


def _inside(bench: Bench, inputs: Any, memory: Memory, options: dict[str, Any]) -> dict[str, float]:
    """Where the time goes, in a turn of its own."""
    bench.watched, before = True, bench.watched
    found = shares([bench.turn(inputs, memory, **options)])
    bench.watched = before
    return found


def _told(turns: list[Turn], plain: list[Turn]) -> Line:
    ratios = [own.decoding / other.decoding for own, other in zip(turns, plain, strict=True)]
    return {
        "ms per step": 1000 * median(own.decoding / len(own.steps) for own in turns),
        "ratio": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "whole call (s)": median(own.seconds for own in turns),
        "whole call ratio": median(own.seconds / other.seconds for own, other in zip(turns, plain, strict=True)),
        "peak (MB)": max(own.peak for own in turns) / 1e6,
    }


def _twice(tokens: int) -> Trigger:
    numbers: dict[int, int] = {}

    def decide(row: Row) -> Decision:
        number = numbers.setdefault(row.seed, len(numbers))
        first = random.Random(number).randrange(2, tokens // 2 - 2)
        kinds: tuple[Decision, Decision] = ("short", "long") if number % 2 else ("long", "short")
        return kinds[0] if row.step == first else kinds[1] if row.step == first + tokens // 2 - 2 else "none"

    return Trigger(decide)


def _training(bench: Bench, stage: type[FormationGrpo] | type[InvocationGrpo]) -> list[Line]:
    """A group's whole step over plain ``generate`` of as many rows."""
    sample = Sample("one", tuple(bench.pictures(1)), "what is in this picture ?", "bag")
    grpo = GrpoConfig(group=GROUP, max_new_tokens=bench.tokens, settled=1.0, checkpointing=True)
    clock, steps, plain, peaks = Clock(bench.device), list[float](), list[float](), list[float]()
    for turn in range(TURNS):
        inputs = bench.inputs(1)
        start = clock.now()
        bench.model.generate(**inputs, max_new_tokens=bench.tokens, do_sample=True, num_return_sequences=GROUP)
        plain.append(clock.now() - start)
        room = Room(bench.device)
        with attached("policy")(bench) as memory:
            one = stage(memory, TrainConfig(grpo=grpo))
            optimizer = torch.optim.AdamW([own for _, own, _ in one.parameters()], lr=1e-5)
            start = clock.now()
            one.accumulate(make_batch(memory.backbone, [sample]), str(turn), 0.5)
            optimizer.step()
            one.stepped()
            steps.append(clock.now() - start)
            peaks.append(room.peak() - bench.loaded)
    ratios = [own / other for own, other in zip(steps[1:], plain[1:], strict=True)]
    name = f"a step of {stage.__name__}, group of {GROUP}"
    told = {"what": name, "seconds": median(steps[1:]), "ratio": median(ratios), "least": min(ratios)}
    return [{**told, "most": max(ratios), "peak (MB)": max(peaks) / 1e6}]
