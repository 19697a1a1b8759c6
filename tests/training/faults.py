"""What may happen to one of the processes of a run: the part of each in tests of that."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import run

from vismem_core.errors import VismemError
from vismem_core.training import callbacks, peers, state

STEPS = ["train.formation.steps=4", "train.invocation.steps=2", "train.save_every=3"]


SIGNALS = {"kill": (1, "SIGKILL"), "stop": (1, "SIGSTOP"), "term": (1, "SIGTERM"), "first": (0, "SIGKILL")}


class At(callbacks.TrainerCallback):
    """Does something in one process after two steps."""

    def __init__(self, rank: int, act: Callable[[], object]) -> None:
        self.rank, self.act = rank, act

    def on_step_end(self, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == 2 and int(os.environ["RANK"]) == self.rank:
            self.act()


def full() -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    state.atomically = refuse  # type: ignore[assignment]


def main(fault: str, folder: Path) -> None:
    torch.set_num_threads(1)
    peers.SILENCE, peers.LEAVE, peers.FAILED = 6.0, 3.0, 3.0
    rank = int(os.environ.get("RANK", 0))
    settings, told, output = list(STEPS), list[At](), folder / "run"
    if fault == "stop" and rank:
        (folder / "stopped").write_text(str(os.getpid()))
    if fault in SIGNALS:
        whose, name = SIGNALS[fault]
        told = [At(whose, lambda: os.kill(os.getpid(), getattr(signal, name)))]
    elif fault == "full":
        told = [At(0, full)]
    elif fault == "settings":
        settings.append(f"train.seed={rank}")
    elif fault in ("elsewhere", "lost"):
        output = folder / f"run{rank}"
    run(output, settings, callbacks=told, resume=fault == "lost" or (output / "config.json").exists())


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except (VismemError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(128 + getattr(error, "signal", -127))
