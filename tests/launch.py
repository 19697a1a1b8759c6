"""Several processes that train together, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def launch(command: Sequence[str], processes: int) -> None:
    """What ``ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`` starts; all of them have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(HERE), str(HERE / "training"), os.environ.get("PYTHONPATH", "")])
    shared = {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        for rank in range(processes)
    ]
    running = [
        subprocess.Popen(command, env=os.environ | shared | own, stderr=subprocess.PIPE, text=True) for own in ranks
    ]
    try:
        for own in running:
            _, errors = own.communicate(timeout=240)
            assert own.returncode == 0, errors
    finally:
        for own in running:
            own.kill()
