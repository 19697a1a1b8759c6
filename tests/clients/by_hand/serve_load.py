"""Many clients at once against one at a time: the same answers, how many times as many of them in a second, and how
long a short request waits for its first text while long ones run.

    python tests/clients/by_hand/serve_load.py [--clients 32] [--requests 64] [-- options of vismem serve]

One server on a copy of the embedded model that no end token stops (its own answers are of a few tokens), and two passes
over the same requests. What it gives is a ratio of one run; on a machine with other work, the server's own time on the
processor says more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from served import messages

from vismem_plugins.mini import path
from vismem_plugins.mosaic import mosaic


def endless(folder: Path) -> Path:
    """A copy of the embedded model whose answers go on to ``max_tokens``."""
    shutil.copytree(path("qwen2_5_vl"), folder, dirs_exist_ok=True)
    told = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": 1}))
    return folder


def wanted(name: str, count: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths: questions with an image, one in four sampled."""
    chance, told = Random(0), []
    some = mosaic("heldout", types=["list", "read", "right", "most"])
    for at in range(count):
        own = {"model": name, "messages": messages(some[at]), "max_tokens": chance.choice((16, 32, 64, 128))}
        told.append(own if at % 4 else own | {"temperature": 1.0, "seed": at})
    return told


def first_text(web: httpx.Client, road: str, asked: dict[str, Any]) -> float:
    """Milliseconds until an answer's first text comes."""
    begun = time.perf_counter()
    with web.stream("POST", road, json=asked | {"stream": True}) as told:
        for line in told.iter_lines():
            if '"content"' in line and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                break
        return 1000 * (time.perf_counter() - begun)


def waits(web: httpx.Client, road: str, clients: int, asked: list[dict[str, Any]]) -> None:
    """Tell how long a short request waits when nobody else asks, and while all other clients have long ones."""
    short, going, enough = asked[1] | {"max_tokens": 16}, threading.Semaphore(0), threading.Event()

    def long(own: dict[str, Any]) -> None:
        with web.stream("POST", road, json=own | {"stream": True, "max_tokens": 1024}) as told:
            for line in told.iter_lines():
                if '"content"' in line:
                    going.release()
                    break
            enough.wait()

    def median() -> float:
        return statistics.median(first_text(web, road, short) for _ in range(15))

    idle = median()
    with ThreadPoolExecutor(clients) as pool:
        for own in asked[: clients - 1]:
            pool.submit(long, own)
        for _ in range(clients - 1):
            going.acquire()
        busy = median()
        enough.set()
    print(f"the first text of a short answer takes {idle:.0f} ms, and {busy:.0f} ms beside {clients - 1} long ones")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    told, rest = parser.parse_known_args()
    folder = tempfile.TemporaryDirectory()
    base = ["--model", str(endless(Path(folder.name))), "--memory", str(path("qwen2_5_vl") / "memory")]
    command = [sys.executable, "-m", "vismem_cli", "serve", "--port", "0", *base, *(own for own in rest if own != "--")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    _, name, _, address = next(own for own in process.stderr if own.startswith("serving ")).split()
    try:
        asked = wanted(name, told.requests)
        with httpx.Client(timeout=600, limits=httpx.Limits(max_connections=told.clients)) as web:

            def ask(own: dict[str, Any]) -> Any:
                answer = web.post(f"{address}/chat/completions", json=own).json()
                return [answer[part] for part in ("choices", "usage", "vismem")]

            for own in asked[:4]:
                ask(own)
            seconds, busy, answers = [], [], []
            used = psutil.Process(process.pid).cpu_times
            for clients in (1, told.clients):
                begun, before = time.perf_counter(), sum(used()[:2])
                with ThreadPoolExecutor(clients) as pool:
                    answers.append(list(pool.map(ask, asked)))
                seconds.append(time.perf_counter() - begun)
                busy.append(sum(used()[:2]) - before)
                tokens = sum(usage["completion_tokens"] for _, usage, _ in answers[-1])
                print(
                    f"{clients:3} clients: {seconds[-1]:6.1f} s, {tokens / seconds[-1]:7.1f} tokens a second, "
                    f"{busy[-1]:6.1f} s of the server's own"
                )
        same = sum(one == other for one, other in zip(*answers, strict=True))
        print(
            f"{same} of {len(asked)} answers are the same; {seconds[0] / seconds[1]:.1f} times as fast, "
            f"for {busy[0] / busy[1]:.1f} times less of the processor's time"
        )
        with httpx.Client(timeout=600, limits=httpx.Limits(max_connections=told.clients)) as web:
            waits(web, f"{address}/chat/completions", told.clients, asked)
    finally:
        process.terminate()
        process.wait()
        folder.cleanup()


if __name__ == "__main__":
    main()
