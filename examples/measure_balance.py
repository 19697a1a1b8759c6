"""How evenly the work of a GRPO step is dealt over ranks: whole prompts to each, as once, and trajectories as they are.

Counted are the passes of the language model and the vectors that they take in, padding included, on the embedded model:
while prompts are read, while answers are rolled out, and while these are replayed; and the tokens that are replayed. A
ratio is the most that one rank has of each step over the mean of all ranks, steps added up; what is over 1 is waited
for. A rank decodes its rows in one batch, so its passes are those of its longest answer, and no deal makes the most of
them less than one trajectory takes alone (``longest``). Prompts are met for the first time: tau_base is rolled out too.
Ranks are simulated one after another, unless several processes were started:

    python examples/measure_balance.py --ranks 8
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/measure_balance.py --json
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import vismem_core as vismem
from vismem_core.base.embedded import embedded
from vismem_core.base.loading import load_base
from vismem_core.config import GrpoConfig, TrainConfig
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory
from vismem_core.training.balance import Work
from vismem_core.training.batches import Sampler, part_of
from vismem_core.training.formation_grpo import FormationGrpo
from vismem_core.training.group import GroupStage
from vismem_core.training.invocation_grpo import InvocationGrpo
from vismem_core.training.processes import Processes
from vismem_core.training.rollout import Group, Trajectory
from vismem_plugins.mosaic import mosaic

STAGES: dict[str, type[GroupStage]] = {"I": FormationGrpo, "II": InvocationGrpo}
PHASES = {"reading": "read", "rollout": "rollouts", "replay": "learn"}
"""What is counted apart, and the method of a stage that does it."""


class Rank(Processes):
    """One of so many ranks; what the others would tell it was told when one process did everything."""

    def __init__(self, number: int, count: int, told: list[list[Any]]) -> None:
        super().__init__()
        self.at, self.among, self.told, self.asked = number, count, told, 0

    @property
    def number(self) -> int:
        return self.at

    @property
    def count(self) -> int:
        return self.among

    def total(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def everyones(self, items: Sequence[Any]) -> list[Any]:
        if self.among == 1:
            self.told.append(list(items))
        self.asked += 1
        return self.told[self.asked - 1]


class Counted:
    """Passes and vectors of the language model, by phase, of one rank's step."""

    def __init__(self, stage: GroupStage) -> None:
        self.figures = {f"{phase} {what}": 0 for phase in PHASES for what in ("passes", "vectors")}
        self.figures["replay tokens"] = 0
        self.calls: list[list[Any]] = []  # the trajectories of each rollout
        self._phase = ""
        self._plain, stage._replayed = stage._replayed, self._replayed  # type: ignore[method-assign]
        for phase, name in PHASES.items():
            setattr(stage, name, self._watched(phase, getattr(stage, name)))
        self._hook = stage.memory.backbone.decoder.register_forward_hook(self._count, with_kwargs=True)

    def _watched(self, phase: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            self._phase = phase
            result = plain(*args, **rest)
            if phase == "rollout":
                self.calls.append(result)
            return result

        return call

    def _replayed(self, rows: Sequence[int], group: Group) -> tuple[list[int], list[Trajectory]]:
        own, told = self._plain(rows, group)
        self.figures["replay tokens"] += sum(told[row].slots[-1] for row in own)
        return own, told

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        rows, columns = output.last_hidden_state.shape[:2]
        self.figures[f"{self._phase} passes"] += 1
        self.figures[f"{self._phase} vectors"] += rows * columns

    def close(self) -> None:
        self._hook.remove()

    def longest(self) -> int:
        """Passes of the trajectory that takes most, alone: its own and those of its tau_rev."""
        first, *others = self.calls
        again = iter(others[0] if len(others) > 1 else [])
        return max(len(own.ids) + (len(next(again).ids) if own.latents and len(others) > 1 else 0) for own in first)


def step(
    memory: Memory, stage: type[GroupStage], config: TrainConfig, work: Work, key: str, processes: Processes
) -> Counted:
    """One rank's part of a step."""
    own = stage(memory, config, processes)
    counted = Counted(own)
    own.accumulate(part_of(memory.backbone, work, processes.number), key, 0.6)
    counted.close()
    return counted


def deals(samples: Sequence[Sample], ranks: int, stage: GroupStage) -> dict[str, Work]:
    """Whole prompts to each rank in turn, and what training does."""
    group = stage.grpo.group
    whole = Work(samples, [[number % ranks] * group for number in range(len(samples))])
    return {"prompts": whole, "trajectories": Work.dealt(samples, ranks, stage.pieces)}


def measure(name: str, memory: Memory, config: TrainConfig, ranks: int, batch: int, steps: int) -> dict[str, Any]:
    """Both deals of the same steps of one stage."""
    data, real = mosaic("train"), Processes()
    sampler, kind = Sampler(len(data), batch * ranks, 0), STAGES[name]
    counts: dict[str, list[list[dict[str, int]]]] = {"prompts": [], "trajectories": []}
    longest = 0
    for number in range(steps):
        samples = sorted((data[at] for at in sampler.draw()), key=lambda one: -len(one.answer or ""))
        told: list[list[Any]] = []
        if real.count == 1:
            everything = Work(samples, [[0] * config.grpo.group] * len(samples))
            alone = step(memory, kind, config, everything, str(number), Rank(0, 1, told))
            longest += alone.longest()
        for deal, work in deals(samples, ranks, kind(memory, config)).items():
            own = [real] if real.count > 1 else [Rank(rank, ranks, told) for rank in range(ranks)]
            parts = [step(memory, kind, config, work, str(number), rank).figures for rank in own]
            counts[deal].append(real.everyones(parts))
    figures = {}
    for deal, taken in counts.items():
        figures[deal] = {what: told_of([[rank[what] for rank in ranks_] for ranks_ in taken]) for what in taken[0][0]}
    return {"stage": name, "longest": longest or None, "deals": figures}


def told_of(steps: list[list[int]]) -> dict[str, float]:
    """What the steps' ranks had: the most and the mean, and the one over the other."""
    most, mean = sum(map(max, steps)), sum(sum(own) / len(own) for own in steps)
    return {"most": most, "mean": round(mean, 1), "ratio": round(most / mean, 3)}


def show(report: dict[str, Any]) -> None:
    setting = ", ".join(f"{name} {value}" for name, value in report["setting"].items())
    table = Table("stage", "what", "by prompts: most", "ratio", "by trajectories: most", "ratio", title=setting)
    for own in report["stages"]:
        before, after = own["deals"].values()
        for what in before:
            cells = [f"{part[what][name]:g}" for part in (before, after) for name in ("most", "ratio")]
            table.add_row(own["stage"], what, *cells)
        if own["longest"]:
            table.add_row(own["stage"], "longest trajectory's passes", str(own["longest"]))
    Console().print(table)


def main(
    ranks: Annotated[int, typer.Option(help="Ranks that are simulated.", min=2)] = 8,
    batch: Annotated[int, typer.Option(help="Prompts of a rank's share of a step.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Steps of each stage.", min=1)] = 2,
    group: Annotated[int, typer.Option(help="Trajectories of a prompt.", min=2)] = 16,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """How evenly the work of a GRPO step is dealt over ranks.

    Example: python examples/measure_balance.py --ranks 2 --steps 4
    """
    torch.set_num_threads(1)
    processes = Processes()
    ranks = processes.count if processes.count > 1 else ranks
    model, processor, _ = load_base("qwen2_5_vl")
    memory = vismem.attach(model, processor, embedded("qwen2_5_vl")[1].memory)
    config = replace(TrainConfig(), grpo=GrpoConfig(group=group))
    setting = {"ranks": ranks, "processes": processes.count, "prompts a rank": batch, "group": group, "steps": steps}
    report = {"setting": setting, "stages": [measure(own, memory, config, ranks, batch, steps) for own in STAGES]}
    if processes.first:
        print(json.dumps(report)) if json_ else show(report)


if __name__ == "__main__":
    typer.run(main)
