"""Commands in processes of their own that find the libraries imported: they start at once, and not after seconds.

Run as a program, it imports the libraries, reads one command a line and forks for each.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

LIBRARIES = ["torch", "transformers.modeling_utils", "accelerate", "peft", "vismem_cli.program"]
LIBRARIES += ["vismem_core.training.run", "vismem_core.answers.evaluation", "vismem_core.files.publish"]
LIMIT = 300
"""Seconds after which a command is ended by SIGALRM."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@contextmanager
def commands(settings: Mapping[str, str] | None = None) -> Iterator[Run]:
    """A function that runs ``vismem ...``, ``python FILE ...`` or ``python -c CODE`` in a folder.

    Args:
        settings: the environment that the libraries are imported in; a command may add to it.
    """
    begin = [sys.executable, __file__]
    with subprocess.Popen(begin, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        asks, tells = server.stdin, server.stdout
        assert asks is not None and tells is not None

        def run(words: Sequence[str], place: Path, **more: str) -> subprocess.CompletedProcess[str]:
            output, errors = (place / f".{name}" for name in ("stdout", "stderr"))
            asked = {"words": words, "place": str(place), "output": str(output), "errors": str(errors), "more": more}
            print(json.dumps(asked), file=asks, flush=True)
            code = int(tells.readline())
            return subprocess.CompletedProcess(words, code, *(own.read_text("utf-8") for own in (output, errors)))

        yield run
        asks.close()


def _serve() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for name in LIBRARIES:
            import_module(name)
        for line in sys.stdin:
            child = os.fork()
            if not child:
                os._exit(_ended(_begin, **json.loads(line)))
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _ended(command: Callable[..., None], **asked: Any) -> int:
    """Its exit code; what a process forgets at its end takes longer here than most commands."""
    code = 1
    try:
        command(**asked)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _begin(words: Sequence[str], place: str, output: str, errors: str, more: Mapping[str, str]) -> None:
    signal.alarm(LIMIT)
    os.chdir(place)
    os.environ |= more
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    program, *sys.argv = words
    if program == "vismem":
        from vismem_cli import main

        main(sys.argv)
    elif sys.argv[0] == "-c":
        exec(compile(sys.argv[1], "<command>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
