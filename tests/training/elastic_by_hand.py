"""A worker of a torchrun is killed, torchrun starts all of them again, and the run comes to the same end.

python tests/training/elastic_by_hand.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SHORT = ["formation.steps=12", "formation.batch=4", "invocation.steps=4", "invocation.batch=4", "save_every=2"]
SHORT += ["eval_samples=2"]


def run(output: Path, kill: bool) -> int:
    """Exit code of a run of two processes; one of which is killed once its state is on disk."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "vismem_cli", "train"]
    command = [*torchrun, "--output", str(output), "--resume"]
    for setting in SHORT:
        command += ["--set", f"train.{setting}"]
    shared = {"ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=os.environ | shared) as running:
        while kill and running.poll() is None:
            time.sleep(0.1)
            if (output / "state.safetensors").exists():
                workers = psutil.Process(running.pid).children()
                workers[-1].kill()
                break
        return running.wait()


def main() -> None:
    """Exits with 1 where the figures of the two runs differ."""
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        codes = run(whole, kill=False), run(broken, kill=True)
        rows = [(own / "metrics.jsonl").read_text() for own in (whole, broken)]
        same = codes == (0, 0) and rows[0] == rows[1]
        sys.stdout.write(f"exit codes {codes}; metrics.jsonl {'the same' if rows[0] == rows[1] else 'another'}\n")
        sys.exit(not same)


if __name__ == "__main__":
    main()
