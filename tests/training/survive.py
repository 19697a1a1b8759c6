"""Runs that are ended at random moments, each resumed and compared with the run that nothing ended.

    python tests/training/survive.py --times 60 --seed 0

A run is ended by SIGKILL, by SIGTERM, by a full disk (the kernel lets no file grow from a random moment on), or by a
judge that is away for longer than it is waited for; training by cross-entropy, by GRPO, by GRPO that draws prompts
anew, and by GRPO that is evaluated, stops early and keeps its best. Runs are forks of one process that has everything
imported, a second each. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from judge import Judge
from runs import GRPO, RESAMPLING, run
from safetensors.torch import load_file

from vismem_core.errors import VismemError

LONGER = {
    "sft": ["train.formation={steps: 10, batch: 3, lr: 1e-3}", "train.invocation={steps: 8, batch: 3, lr: 1e-2}"],
    "grpo": [*GRPO, "train.grpo.formation={steps: 6, batch: 2, lr: 1e-3}"],
    "resampling": [*RESAMPLING, "train.grpo.formation={steps: 6, batch: 2, lr: 1e-3}"],
    "evaluated": [
        *GRPO,
        "train.grpo.formation={steps: 6, batch: 2, lr: 1e-3}",
        "train.metric=anls",
        "train.evaluation={every: 2, samples: 1, patience: 2, keep: best}",
    ],
    "judged": [*GRPO, "train.grpo.patience=0.15"],
}
"""Settings of the runs, by what is trained."""
PLAIN = ("sft", "evaluated", "resampling", "grpo")
"""Those that need no judge."""
WAYS = ("SIGKILL", "SIGTERM", "full disk", "judge away")


def fork(output: Path, settings: list[str], resume: bool = False) -> int:
    """A run in a process of its own; its exit code is 0 if it came to its end, 1 if an error was told."""
    child = os.fork()
    if child:
        return child
    code = 2
    try:
        with open(output.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        run(output, settings, resume=resume)
        code = 0
    except (VismemError, OSError) as error:  # what the program tells in one line
        print(f"{type(error).__name__}: {error}")
        code = 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> int | None:
    """Its exit code; None if a signal ended it."""
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def end(way: str, child: int, chance: Random) -> None:
    """End a run now."""
    if way == "judge away":
        Judge.down = True
        threading.Timer(chance.uniform(0.05, 1.5), lambda: setattr(Judge, "down", False)).start()
    elif way == "full disk":
        resource.prlimit(child, resource.RLIMIT_FSIZE, (chance.randrange(60_000), resource.RLIM_INFINITY))
    else:
        os.kill(child, getattr(signal, way))


def same(ours: Path, whole: Path) -> str | None:
    """How a resumed run differs from the unbroken one; None if it does not."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (whole / name).exists() and (ours / name).read_text() != (whole / name).read_text():
            return f"{name} differs"
    got, expected = (load_file(place / "memory.safetensors") for place in (ours, whole))
    if odd := [name for name in expected if not got[name].equal(expected[name])]:
        return f"{odd[0]} differs"
    left = {path.name for path in ours.iterdir()} ^ {path.name for path in whole.iterdir()}
    return f"{sorted(left)[0]} is only in one of the two" if left else None


def survive(folder: Path, times: int, seed: int, tell: Callable[[str], None]) -> list[str]:
    """End so many runs; what went wrong, a line each.

    Args:
        folder: for the runs.
        tell: gets a line for each.
    """
    os.environ["no_proxy"] = "127.0.0.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judged = f"train.grpo.rewards=['judge:http://127.0.0.1:{server.server_port}/v1#m']"
    settings = {kind: [*own, *([judged] if kind == "judged" else [])] for kind, own in LONGER.items()}
    chance, wrong, tally, whole, seconds = Random(seed), list[str](), Counter[str](), {}, {}
    for number in range(times):
        way = WAYS[number % len(WAYS)]
        kind = "judged" if way == "judge away" else PLAIN[number // len(WAYS) % len(PLAIN)]
        if kind not in whole:
            whole[kind], began = folder / f"whole-{kind}", time.monotonic()
            if ended(fork(whole[kind], settings[kind])) != 0:
                raise RuntimeError(whole[kind].with_suffix(".log").read_text())
            seconds[kind] = time.monotonic() - began
        output = folder / f"{number}"
        child = fork(output, settings[kind])
        time.sleep(chance.uniform(0.0, 0.8 * seconds[kind]))
        end(way, child, chance)
        code = ended(child)
        while Judge.down:
            time.sleep(0.02)
        tally[f"{way}, {'too late' if code == 0 else 'ended'}"] += 1
        why = "ended in a traceback" if code == 2 else None
        if why is None and not (output / "report.json").exists():
            again = ended(fork(output, settings[kind], resume=True))
            why = None if again == 0 else f"could not be resumed ({again})"
        why = why or same(output, whole[kind])
        tell(f"{number + 1:3} of {times}  {way:10}  {kind:10}  {why or 'the same'}")
        if why:
            log = output.with_suffix(".log")
            told = log.read_text() if log.exists() else ""
            wrong.append(f"{way}, {kind}, seed {seed}, number {number}: {why}\n{told}")
        else:
            shutil.rmtree(output)
    server.shutdown()
    tell("; ".join(f"{what}: {count}" for what, count in sorted(tally.items())))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = survive(Path(folder), chosen.times, chosen.seed, lambda line: print(line, flush=True))
    print("\n".join(wrong) or "every run came to the same end")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
