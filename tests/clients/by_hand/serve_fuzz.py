"""Thousands of requests that nobody should send: no hang, nothing unexpected, and the next question is answered.

python tests/clients/by_hand/serve_fuzz.py [--requests 5000] [--seed 0]
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from fuzz import mutated

EXPECTED = (200, 400, 404, 413, 415)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    command = [sys.executable, "-m", "vismem_cli", "serve", "--port", "0", "--name", "mini", "--max-new-tokens", "64"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = next(own for own in process.stderr if own.startswith("serving ")).split()[-1]
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
    reading.start()
    codes: collections.Counter[int] = collections.Counter()
    road, kind = f"{address}/chat/completions", {"content-type": "application/json"}
    question = {"model": "mini", "messages": [{"role": "user", "content": "what is a bag ?"}]}
    try:
        with httpx.Client(timeout=120) as web:
            first = web.post(road, json=question).json()["choices"]

            def send(seed: int) -> int:
                body = mutated(Random(seed))
                status = web.post(road, content=body, headers=kind).status_code
                if status not in EXPECTED:
                    print(f"seed {seed}: status {status} for {body[:300]!r}")
                return status

            with ThreadPoolExecutor(8) as pool:
                codes.update(pool.map(send, range(told.seed, told.seed + told.requests)))
            same = web.post(road, json=question).json()["choices"] == first
    finally:
        process.terminate()
        code = process.wait()
        reading.join()
    print(f"{dict(codes)}; the next question is answered as before: {same}; exit code {code}; on stderr: {lines}")


if __name__ == "__main__":
    main()
