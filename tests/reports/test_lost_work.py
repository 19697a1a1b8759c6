"""Whatever ends a run, its last whole step is on disk: errors, signals, services that are away, full disks."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from judge import Judge
from runs import GRPO, run
from safetensors.torch import load_file
from tiny import qwen

from vismem_core.errors import AttachError, RewardError, TrainingError
from vismem_core.training import draws, interrupt
from vismem_core.training import loop as loops
from vismem_core.training.display import Display
from vismem_core.training.formation import Formation

KINDS = {"sft": [], "grpo": GRPO}


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("whole") / request.param
    run(output, KINDS[request.param])
    return request.param, output


def same(ours: Path, whole: Path) -> None:
    assert (ours / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    got, expected = (load_file(place / "memory.safetensors") for place in (ours, whole))
    assert all(got[name].equal(expected[name]) for name in expected)
    assert {path.name for path in ours.iterdir()} == {path.name for path in whole.iterdir()}


def steps(output: Path) -> int:
    return len((output / "metrics.jsonl").read_text().splitlines())


PLACES = {
    "while gradients are made": (loops.Loop, "_gradients"),
    "while a batch is made": (draws, "usable_batch"),
    "after the step": (Display, "step"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("at", "error"), [(1, RuntimeError("CUDA out of memory")), (3, SystemExit(3)), (6, KeyboardInterrupt())]
)
def test_any_error_saves_the_last_whole_step(
    whole: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    at: int,
    error: BaseException,
) -> None:
    owner, name = PLACES[place]
    own, calls = getattr(owner, name), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise error
        return own(*args)

    monkeypatch.setattr(owner, name, failing)
    kind, unbroken = whole
    if kind == "grpo":  # which draws further prompts, so that a batch made ahead, and its error, may be nobody's
        monkeypatch.setattr(draws, "NOTICED", 9.0)
    with pytest.raises((type(error), TrainingError)):
        run(tmp_path / "run", [*KINDS[kind], "train.save_every=50"])
    monkeypatch.setattr(owner, name, own)
    done = steps(tmp_path / "run")
    assert done or place == "while a batch is made"  # several are made in a step of GRPO
    assert (tmp_path / "run" / "state.safetensors").exists() == (done > 0)
    told = " ".join(capsys.readouterr().err.split())
    assert isinstance(error, KeyboardInterrupt) or ("--resume goes on from there" in told) == (done > 0)
    run(tmp_path / "run", [*KINDS[kind], "train.save_every=50"], resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (unbroken / "metrics.jsonl").read_text()


def test_a_step_that_is_half_taken_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, calls = loops.Loop._step, 0

    def half(self: loops.Loop, step: int, norm: float) -> None:
        nonlocal calls
        calls += 1
        take(self, step, norm)
        if calls == 3:
            raise RuntimeError("out of memory in the optimiser")

    monkeypatch.setattr(loops.Loop, "_step", half)
    with pytest.raises(RuntimeError):
        run(tmp_path / "run")
    monkeypatch.setattr(loops.Loop, "_step", take)
    run(tmp_path / "run", resume=True)
    run(tmp_path / "whole")
    same(tmp_path / "run", tmp_path / "whole")


def test_an_error_while_a_stage_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vismem_core.training.invocation import InvocationStage

    with monkeypatch.context() as patch:
        patch.setattr(InvocationStage, "finish", lambda stage: (_ for _ in ()).throw(RuntimeError("singular")))
        with pytest.raises(RuntimeError, match="singular"):
            run(tmp_path / "run")
    run(tmp_path / "run", resume=True)
    run(tmp_path / "whole")
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_the_step_and_save_it(
    whole: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, unbroken = whole
    number = getattr(signal, name)
    gradients, before, left = loops.Loop._gradients, signal.getsignal(number), iter(range(2))

    def signalled(*args: Any) -> float:
        if next(left, None) is None:
            os.kill(os.getpid(), number)
        return gradients(*args)

    monkeypatch.setattr(loops.Loop, "_gradients", signalled)
    with pytest.raises(TrainingError, match=r"interrupted after \w+, step 3, which is saved; .*--resume goes on"):
        run(tmp_path / "run", KINDS[kind])
    assert signal.getsignal(number) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert steps(tmp_path / "run") == 3
    monkeypatch.setattr(loops.Loop, "_gradients", gradients)
    run(tmp_path / "run", KINDS[kind], resume=True)
    same(tmp_path / "run", unbroken)


@pytest.mark.parametrize("how", ["a second signal", "too long a step"])
def test_a_step_that_does_not_end_is_left_and_the_one_before_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(interrupt, "GRACE", 0.3)
    gradients, left = loops.Loop._gradients, iter(range(2))

    def stuck(*args: Any) -> float:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGTERM)
            if how == "a second signal":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return gradients(*args)

    monkeypatch.setattr(loops.Loop, "_gradients", stuck)
    began = time.monotonic()
    with pytest.raises(TrainingError, match="interrupted after formation, step 2, which is saved"):
        run(tmp_path / "run", ["train.save_every=50"])
    assert time.monotonic() - began < 20
    monkeypatch.setattr(loops.Loop, "_gradients", gradients)
    run(tmp_path / "run", ["train.save_every=50"], resume=True)
    run(tmp_path / "whole", ["train.save_every=50"])
    same(tmp_path / "run", tmp_path / "whole")


def test_a_signal_while_a_step_is_taken_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once: the second would end the process at once, were it not in the middle of a step of the optimiser."""
    take, calls = loops.Loop._step, 0

    def signalled(self: loops.Loop, step: int, norm: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        take(self, step, norm)

    monkeypatch.setattr(loops.Loop, "_step", signalled)
    with pytest.raises(TrainingError, match="interrupted after formation, step 2, which is saved"):
        run(tmp_path / "run", ["train.save_every=50"])


def test_threads_are_left_their_signals(tmp_path: Path) -> None:
    told: list[Any] = []
    thread = threading.Thread(target=lambda: told.append(run(tmp_path / "run")))
    thread.start()
    thread.join()
    assert told and told[0]["samples"] == 4


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Judge, "down", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"train.grpo.rewards=['judge:http://127.0.0.1:{server.server_port}/v1#m']"
    server.shutdown()
    server.server_close()


@pytest.mark.long  # it is away for seconds
def test_a_judge_that_is_away_is_waited_for(judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*GRPO, judge]
    run(tmp_path / "whole", settings)
    gradients, left = loops.Loop._gradients, iter(range(2))

    def restart(*args: Any) -> float:
        if next(left, None) is None and not Judge.down and not hasattr(restart, "done"):
            restart.done = True  # type: ignore[attr-defined]
            Judge.down = True
            threading.Timer(4.5, lambda: setattr(Judge, "down", False)).start()  # before: three tries in three seconds
        return gradients(*args)

    monkeypatch.setattr(loops.Loop, "_gradients", restart)
    run(tmp_path / "run", settings)
    same(tmp_path / "run", tmp_path / "whole")


def test_patience_ends_and_the_last_step_is_saved(judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*GRPO, judge, "train.grpo.patience=0.2", "train.save_every=50"]
    run(tmp_path / "whole", settings)
    gradients, left = loops.Loop._gradients, iter(range(2))

    def down(*args: Any) -> float:
        Judge.down = next(left, None) is None
        return gradients(*args)

    monkeypatch.setattr(loops.Loop, "_gradients", down)
    with pytest.raises(RewardError, match=r"fails for 0\.2 seconds .*HTTP 503: restarting; .*--resume"):
        run(tmp_path / "run", settings)
    monkeypatch.setattr(loops.Loop, "_gradients", gradients)
    Judge.down = False
    run(tmp_path / "run", settings, resume=True)
    same(tmp_path / "run", tmp_path / "whole")


def test_what_the_report_cannot_do_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    accumulate = Formation.accumulate
    monkeypatch.setattr(Formation, "accumulate", lambda *args: taken.append(1) or accumulate(*args))
    model, processor = qwen()
    model.generation_config.num_beams = 3
    with pytest.raises(AttachError, match="beam"):
        run(tmp_path / "run", base=(model, processor))
    assert not taken


def test_only_what_holds_numbers_is_a_finished_memory(tmp_path: Path) -> None:
    few = ["train.formation={steps: 3, batch: 3, lr: 1e30}", "train.stage=formation"]
    with pytest.raises(TrainingError, match="holds NaN or infinity, so this memory is not saved as finished"):
        run(tmp_path / "run", [*few, "train.save_every=1"])
    assert not (tmp_path / "run" / "memory.safetensors").exists()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line and json.loads(line)["step"]


def test_overflow_in_grpo_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        run(tmp_path / "run", [*GRPO, "train.grpo.formation={steps: 6, batch: 4, lr: 1e30}"])


def test_skipped_steps_are_said_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients, calls = loops.Loop._gradients, iter(range(100))

    def sometimes(*args: Any) -> Any:
        figures, norm = gradients(*args)
        return figures, float("nan") if next(calls) in (1, 2) else norm

    monkeypatch.setattr(loops.Loop, "_gradients", sometimes)
    report = run(tmp_path / "run")
    assert report["skipped_steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["norm"] for row in rows[1:3]] == [None, None]
