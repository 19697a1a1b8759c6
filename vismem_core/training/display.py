"""What a person sees of a run: how far it is, and the latest figures of the stage as a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Eta
from rich.table import Table
from rich.text import Text

HIDDEN = ("data_wait", "stage", "step", "skipped")


class Display:
    """A live table under a progress bar.

    Args:
        shown: False in all processes but the first.
    """

    def __init__(self, console: Console, shown: bool = True) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<15}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Eta(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._figures: Table | str = ""
        self._live = Live(console=console, get_renderable=self._look, refresh_per_second=4) if shown else None
        self._task = TaskID(0)
        self._measured: TaskID | None = None
        self._before = time.monotonic()

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            if not self._live.console.is_terminal:
                self._live.console.print()  # what is said next begins on a line of its own

    def _look(self) -> Group:
        return Group(self.progress, self._figures)

    def begin(self, stage: str, steps: int, done: int) -> None:
        """A stage begins, perhaps not at its first step."""
        self._figures = ""
        self._task = self.progress.add_task(stage, total=steps, completed=done, note="")
        self._before = time.monotonic()

    def step(self, row: dict[str, Any]) -> None:
        """A step is done; ``tokens`` in its row become tokens per second."""
        now = time.monotonic()
        seconds, self._before = now - self._before, now
        figures = {name: value for name, value in row.items() if name not in HIDDEN}
        if "tokens" in figures:
            figures["tokens/s"] = figures.pop("tokens") / max(seconds, 1e-9)
        self.progress.update(self._task, advance=1, note=f"loss {row['loss']:.3f}")
        table = Table(*figures, box=None, pad_edge=False)
        table.add_row(*(f"{value:.3g}" for value in figures.values()))
        self._figures = table

    def evaluating(self, way: str, done: int, count: int) -> None:
        """So many answers of an evaluation are there."""
        self.progress.update(self._task, note=f"evaluating, {way} {done}/{count}")

    def evaluated(self, row: dict[str, Any], best: bool) -> None:
        """An evaluation is done: a line that stays."""
        figures = ", ".join(f"{key.removeprefix('eval_')} {value:.3f}" for key, value in row.items() if "eval_" in key)
        where = f"{row['stage']}, {'finished after step' if row['finished'] else 'step'} {row['step']}"
        if self._live:
            self.progress.console.print(
                Text(f"{where}: {figures}{', the best so far' if best else ''}"), soft_wrap=True
            )
        self._before = time.monotonic()

    @contextmanager
    def checking(self, count: int) -> Iterator[Callable[[int, int], None]]:
        """A bar of its own while data is checked, gone afterwards; gives what is told how far it is."""
        with Progress(console=self.progress.console, transient=True, disable=self._live is None) as progress:
            task = progress.add_task("checking the data", total=count)
            yield lambda done, _: progress.update(task, completed=done)

    def measuring(self, condition: str, done: int, count: int) -> None:
        """So many answers of the closing report are there."""
        self._figures = ""
        if self._measured is None:
            self._measured = self.progress.add_task("measuring", note="")
        self.progress.update(self._measured, completed=done, total=count, note=condition)
