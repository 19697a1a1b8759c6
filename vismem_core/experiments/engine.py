"""Running experiments: cells in processes of their own, what they found as one result."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from vismem_core.errors import TrainingError
from vismem_core.plugins import reason

from . import cells as work
from .cells import Base, Cell
from .recipe import Recipe
from .statistics import Difference, Scores, accuracy, mean, paired

Progress = Callable[[str, int, int], None]
"""Called with what was done, how many cells are done, and how many there are."""


def run(
    recipes: Sequence[Recipe], base: Base, place: Path, *, jobs: int | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Do what is left of the cells of some experiments, and tell what all of them found.

    Args:
        place: gets a folder for each cell; those that are there are not done again.
        jobs: processes at a time, of one thread each; by default as many as there are cores.

    Raises:
        VismemError: model, data or settings are of no use; nothing was begun.
        TrainingError: cells failed; the others are done first, and kept.
    """
    unlike: dict[str, Cell] = {}
    for recipe in recipes:
        unlike |= {cell.key: cell for cell in work.cells(recipe, base) if cell.key not in unlike}
    left = _left(unlike, place)
    work.check(list(left.values()))
    place.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    done = len(unlike) - len(left)
    if progress:
        progress("what was done before", done, len(unlike))
    for cell, error in _done(left, place, jobs or len(os.sched_getaffinity(0))):
        done += 1
        if error is not None:
            failed.append(f"{cell.recipe.name}: {cell.title}: {error}")
        if progress:
            progress(f"{cell.recipe.name}: {cell.title}", done, len(unlike))
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise TrainingError(f"{failed[0]}{more}; the other cells are kept: the same command does those that are left")
    return [told(recipe, base, place) for recipe in recipes]


def _left(cells: Mapping[str, Cell], place: Path) -> dict[str, Cell]:
    """What is to be done: what has no result, and what was trained for it where that is gone."""
    wanted = {key for key, cell in cells.items() if work.result(cell, place) is None}
    for key in list(wanted):
        need = cells[key].needs
        while need is not None and not work.kept(need, place):
            wanted.add(need.key)
            need = need.needs
    return {key: cell for key, cell in cells.items() if key in wanted}


def _done(left: Mapping[str, Cell], place: Path, jobs: int) -> Iterator[tuple[Cell, str | None]]:
    """Cells as they are done, each with what went wrong. What needs a cell that failed is not tried."""
    waiting, failed = dict(left), set[str]()
    done = {need.key for cell in left.values() if (need := cell.needs) is not None and need.key not in left}
    running: dict[Future[None], Cell] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_begin) as pool:
        while waiting or running:
            for key, cell in sorted(waiting.items(), key=lambda own: own[1].row is None):  # what is short comes first
                need = cell.needs
                if need is not None and need.key in failed:
                    failed.add(key)
                    yield waiting.pop(key), f"{need.title} failed"
                elif len(running) < jobs and (need is None or need.key in done):
                    running[pool.submit(work.run, waiting.pop(key), place)] = cell
            finished = wait(running, return_when=FIRST_COMPLETED).done if running else set()
            for future in finished:
                cell = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise TrainingError(f"{cell.title}: a process was killed (out of memory?); use fewer --jobs")
                (done if error is None else failed).add(cell.key)
                yield cell, None if error is None else reason(error)


def _begin() -> None:
    """A worker's start: one thread, and an end when whoever waits for it is gone, however that came about."""
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, to their developers
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def told(recipe: Recipe, base: Base, place: Path) -> dict[str, Any]:
    """What an experiment found: every row's scores by seed and type, means, differences, costs, versions."""
    rows: dict[str, Any] = {}
    types: dict[str, Sequence[str]] = {}
    scores: dict[str, list[Scores]] = {}
    for name, row in recipe.rows.items():
        found = [_found(work.of(recipe, base, row, seed), place) for seed in recipe.seeds]
        for own in found:
            types |= own["groups"]
        scores[name] = [{kind: work.unpacked(own) for kind, own in one["scores"].items()} for one in found]
        rows[name] = {
            "scores": [own["scores"] for own in found],
            "invocations": [own["invocations"] for own in found],
            "asks": _asks(found),
            "tokens": mean([sum(own["tokens"]) / len(own["tokens"]) for own in found]).mean,
            "answering": mean([own["answering"] / len(own["tokens"]) for own in found]).mean,
            "x": row.x,
            "series": row.series,
            **_costs(recipe, base, place, name),
        }
    every = list(dict.fromkeys(kind for one in scores.values() for own in one for kind in own))
    groups = {name: [kind for kind in own if kind in every] for name, own in types.items()}
    groups = {name: own for name, own in groups.items() if own} or {"all": every}
    for name, own in rows.items():
        parts = {**groups, **{kind: [kind] for kind in every}}
        own["accuracy"] = {
            part: asdict(value) for part, kinds in parts.items() if (value := accuracy(scores[name], kinds)) is not None
        }
    compared = [
        {"row": one, "other": other, "types": group, **asdict(gap), "clear": gap.clear}
        for one, other in recipe.compare
        for group, kinds in groups.items()
        if (gap := _gap(scores[one], scores[other], kinds)) is not None
    ]
    return {
        "experiment": recipe.name,
        "title": recipe.title,
        "asks": recipe.asks,
        "group": recipe.group if recipe.group in groups else next(iter(groups)),
        "also": recipe.also,
        "figure": recipe.figure,
        "axis": recipe.axis,
        "trial": recipe.trial,
        "seeds": list(recipe.seeds),
        "per_type": recipe.per_type,
        "groups": groups,
        "rows": rows,
        "compare": compared,
        "settings": {name: dict(own.settings) for name, own in recipe.trained.items()},
        "base": asdict(base),
        "versions": {name: version(name) for name in ("vismem", "torch", "transformers", "peft")}
        | {"python": platform.python_version()},
    }


def _found(cell: Cell, place: Path) -> dict[str, Any]:
    result = work.result(cell, place)
    if result is None:
        raise TrainingError(f"{cell.recipe.name}: {cell.title}: is not done")
    return result


def _asks(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Invocations per answer, by type of question."""
    told: dict[str, float] = {}
    for one in found:
        for kind, own in one["scores"].items():
            asked = sum(kind == at[1] for at in one["invocations"])
            told[kind] = told.get(kind, 0.0) + asked / len(own) / len(found)
    return told


def _costs(recipe: Recipe, base: Base, place: Path, name: str) -> dict[str, Any]:
    """Trained parameters, and seconds of one core that training took, all that went before included.

    What was interrupted took longer than its last part tells, and counts only where everything was.
    """
    row = recipe.rows[name]
    if not row.of:
        return {"parameters": 0, "training": 0.0}
    spent, parameters = dict[bool, list[float]](), 0
    for seed in recipe.seeds:
        cell: Cell | None = work.of(recipe, base, row, seed).needs
        total, resumed = 0.0, False
        while cell is not None:
            own = _found(cell, place)
            total, resumed = total + own["cpu"], resumed or own.get("resumed", False)
            parameters = max(parameters, own["parameters"])
            cell = cell.needs
        spent.setdefault(resumed, []).append(total)
    return {"parameters": parameters, "training": mean(spent[min(spent)]).mean}


def _gap(one: Sequence[Scores], other: Sequence[Scores], kinds: Sequence[str]) -> Difference | None:
    ours, theirs = ([[score for kind in kinds for score in own.get(kind, ())] for own in rows] for rows in (one, other))
    same = {len(own) for own in (*ours, *theirs)}
    return paired(ours, theirs) if len(same) == 1 and same != {0} else None
