"""Several processes that train together, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def environments(processes: int) -> list[dict[str, str]]:
    """What ``ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`` adds for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(HERE), str(HERE / "training"), os.environ.get("PYTHONPATH", "")])
    shared = {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        for rank in range(processes)
    ]
    return [shared | own for own in ranks]


def launch(command: Sequence[str], processes: int) -> list[str]:
    """Run the command in several processes; all have to end well. Each one's stdout."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=os.environ | own, **pipes) for own in environments(processes)]
    told: list[str] = []
    try:
        for own in running:
            output, errors = own.communicate(timeout=240)
            assert own.returncode == 0, errors
            told.append(output)
    finally:
        for own in running:
            own.kill()
    return told
