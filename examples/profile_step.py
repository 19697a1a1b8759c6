"""What a GPU would wait for: the share of a Stage II step that is kernels, and what the host takes to launch them.

A step is taken on one CPU thread, some times plainly and twice under torch.profiler, and the quickest counts. Seconds
are the thread's own. Kernels are the profiler's own time of ATen's operations, by the share of it that the thread ran,
without those that only look at tensors anew or ask for room; a launch is such an operation that is not made of others.
All else is the host's, at least: Python, transformers' layers; an operation's own dispatch is counted as its kernel. A
GPU's kernels are faster and the host is not, so a GPU whose kernels take less than the host's part of a pass waits.
What a process waits for others is time on the clock, and no part of the shares.

    python examples/profile_step.py
    python examples/profile_step.py --shape 80m --tokens 32
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/profile_step.py --device tensor
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import typer
from measuring import attached, build
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

import vismem_core as vismem
from vismem_core.base.embedded import embedded
from vismem_core.base.loading import load_base
from vismem_core.config import GrpoConfig, TrainConfig
from vismem_core.memory.memory import Memory
from vismem_core.training.balance import Work
from vismem_core.training.batches import Batch, part_of
from vismem_core.training.invocation_grpo import InvocationGrpo
from vismem_core.training.processes import Processes
from vismem_plugins.mosaic import mosaic

PHASES = {"reading": "read", "rollout": "rollouts", "replay": "learn"}
"""Parts of a step, and the method of the stage that does each; ``rest`` is scoring, figures and the optimiser."""
FREE = {
    *("view", "_unsafe_view", "reshape", "as_strided", "expand", "expand_as", "t", "transpose", "permute", "movedim"),
    *("select", "slice", "narrow", "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "diagonal"),
    *("unflatten", "flatten", "view_as", "swapaxes", "numpy_T", "alias", "detach", "set_", "lift_fresh"),
    *("empty", "empty_like", "empty_strided", "new_empty", "resize_", "resolve_conj", "resolve_neg", "result_type"),
    *("is_nonzero", "item", "_local_scalar_dense"),
}
"""Operations that launch nothing on a GPU (or copy one number)."""
COLUMNS = {
    "phase": "phase",
    "seconds": "s",
    "passes": "passes",
    "kernel_share": "kernels",
    "host_share": "host",
    "launches_a_pass": "launches a pass",
    "host_ms_a_pass": "host ms a pass",
    "host_us_a_launch": "host us a launch",
    "waiting": "waits, s",
}
WAITS = ("_c10d_functional::wait_tensor", "_c10d_functional::all_reduce", "_c10d_functional::all_gather_into_tensor")
"""Where layers that several processes hold wait for each other; what else is told is timed where it is called."""
Step = Callable[[], Any]


class Watched:
    """The seconds and passes of the language model in each phase of a stage's steps."""

    def __init__(self, stage: InvocationGrpo) -> None:
        self.seconds = dict.fromkeys([*PHASES, "rest"], 0.0)
        self.passes = dict.fromkeys(self.seconds, 0)
        self.waited = dict.fromkeys(self.seconds, 0.0)
        self.phase = "rest"
        for owner, name in ((dist, "broadcast"), (stage.processes, "_sum"), (stage.processes, "everyones")):
            setattr(owner, name, self._waiting(getattr(owner, name)))
        for phase, name in PHASES.items():
            setattr(stage, name, self._within(phase, getattr(stage, name)))
        stage.memory.backbone.decoder.register_forward_hook(self._count)

    def _within(self, phase: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            before, self.phase, began = self.phase, phase, time.thread_time()
            with record_function(phase):
                result = plain(*args, **rest)
            self.phase = before
            self.seconds[phase] += time.thread_time() - began
            return result

        return call

    def _waiting(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            began = time.perf_counter() - time.thread_time()
            result = plain(*args, **rest)
            self.waited[self.phase] += time.perf_counter() - time.thread_time() - began
            return result

        return call

    def _count(self, *_: Any) -> None:
        self.passes[self.phase] += 1

    def of(self, step: Step) -> dict[str, dict[str, float]]:
        """Of one step by phase: seconds, those that other processes took, and passes."""
        for own in (self.seconds, self.waited, self.passes):
            own.update(dict.fromkeys(own, 0))
        began = time.thread_time()
        step()
        self.seconds["rest"] = time.thread_time() - began - sum(self.seconds.values())
        return {"seconds": dict(self.seconds), "waiting": dict(self.waited), "passes": dict(self.passes)}


def operations(step: Step) -> dict[str, dict[str, float]]:
    """By phase of one profiled step: seconds in kernels and in waiting, and launches."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began, ran = time.perf_counter(), time.thread_time()
        step()
        share = (time.thread_time() - ran) / (time.perf_counter() - began)
    events = list(profiled.events())
    spans = [(own.time_range.start, own.time_range.end, own.name) for own in events if own.name in PHASES]
    found = {phase: {"kernels": 0.0, "waiting": 0.0, "launches": 0.0} for phase in (*PHASES, "rest")}
    for own in events:
        start = own.time_range.start
        phase = next((name for first, last, name in spans if first <= start < last), "rest")
        if any(name in own.name for name in WAITS):
            found[phase]["waiting"] += own.self_cpu_time_total / 1e6
        elif launches(own):
            found[phase]["kernels"] += share * own.self_cpu_time_total / 1e6
            found[phase]["launches"] += not any(map(launches, own.cpu_children))
    return found


def launches(event: Any) -> bool:
    return bool(event.name.startswith("aten::") and event.name.removeprefix("aten::") not in FREE)


def measured(memory: Memory, batch: Batch, config: TrainConfig, processes: Processes, repeats: int) -> list[Any]:
    """A row for each phase of a step, and one for all of it."""
    stage = InvocationGrpo(memory, config, processes)
    optimizer = torch.optim.AdamW([own for _, own, _ in stage.parameters()], lr=0.0)
    watched = Watched(stage)

    def step() -> None:
        stage.base_scores.clear()  # as of prompts that are met for the first time
        optimizer.zero_grad()
        stage.accumulate(batch, "0", 0.5)
        processes.add_gradients([own for _, own, _ in stage.parameters()])
        optimizer.step()

    step()
    taken = min((watched.of(step) for _ in range(repeats)), key=lambda own: sum(own["seconds"].values()))
    found = min((operations(step) for _ in range(2)), key=lambda own: sum(part["kernels"] for part in own.values()))
    rows = []
    for phase, own in found.items():
        plain = {name: parts[phase] for name, parts in taken.items()}
        rows.append({"phase": phase, **own, **plain, "waiting": own["waiting"] + plain["waiting"]})
    whole = {name: sum(own[name] for own in rows) for name in rows[0] if name != "phase"}
    return [figures(own) for own in (*rows, {"phase": "step", **whole})]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """With the host's part, and what it is to a pass and a launch."""
    host = max(row["seconds"] - row["kernels"], 0.0)
    row |= {"host": host, "kernel_share": row["kernels"] / row["seconds"], "host_share": host / row["seconds"]}
    row |= {"launches_a_pass": row["launches"] / row["passes"] if row["passes"] else None}
    row |= {"host_ms_a_pass": 1e3 * host / row["passes"] if row["passes"] else None}
    return row | {"host_us_a_launch": 1e6 * host / row["launches"] if row["launches"] else None}


def show(report: dict[str, Any]) -> None:
    table = Table(*COLUMNS.values(), title=", ".join(f"{name} {value}" for name, value in report["setting"].items()))
    for row in report["phases"]:
        cells = [row[name] for name in COLUMNS]
        table.add_row(*("" if own is None else own if isinstance(own, str) else f"{own:.4g}" for own in cells))
    Console().print(table)


def main(
    shape: Annotated[Literal["mini", "80m"], typer.Option(help="The embedded model, or a random one.")] = "mini",
    device: Annotated[str, typer.Option(help="cpu, or tensor for processes that hold the model together.")] = "cpu",
    prompts: Annotated[int, typer.Option(help="Prompts of a step, in all processes.", min=1)] = 4,
    group: Annotated[int, typer.Option(help="Trajectories of a prompt.", min=2)] = 16,
    tokens: Annotated[int, typer.Option(help="Longest answer.", min=4)] = 64,
    repeats: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 3,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """What of a Stage II step is kernels and what is the host's, on the CPU.

    Example: python examples/profile_step.py --shape 80m --tokens 32
    """
    if shape != "mini" and device != "cpu":
        raise typer.BadParameter("the random model is whole in each process: use --device cpu", param_hint="--device")
    torch.set_num_threads(1)
    config = replace(TrainConfig(), grpo=GrpoConfig(group=group, max_new_tokens=tokens))
    base = load_base("qwen2_5_vl", device=device) if shape == "mini" else build(shape, [], "cpu", "float32")
    if shape == "mini":
        memory = vismem.attach(base[0], base[1], embedded("qwen2_5_vl")[1].memory)
    else:
        memory = attached("policy")(_Model(*base[:2])).__enter__()
    processes = Processes(memory.model)
    stage, data = InvocationGrpo(memory, config, processes), mosaic("train", types=["list", "count"])
    work = Work.dealt([data[at] for at in range(prompts)], processes.count, stage.pieces)
    rows = measured(memory, part_of(memory.backbone, work, processes.number), config, processes, repeats)
    setting = {"shape": shape, "device": device, "told": processes.told(memory.backbone.device)}
    setting |= {"prompts": prompts, "group": group, "tokens": tokens}
    if processes.first:
        report = {"setting": setting, "phases": rows}
        print(json.dumps(report)) if json_ else show(report)


class _Model:
    """What :func:`attached` asks of a bench."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor


if __name__ == "__main__":
    typer.run(main)
