"""What a person sees of a run, and where else its figures go."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vismem_core.errors import ConfigError
from vismem_core.training.display import Display
from vismem_core.training.trackers import Trackers

ROW = {"stage": "formation_grpo", "step": 1, "loss": 0.25, "reward": 0.5, "tokens": 100.0, "skipped": False}


def test_the_latest_figures_stand_under_the_bar() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=120)) as display:
        display.begin("formation_grpo", 2, 0)
        display.step(ROW)
    shown = out.getvalue()
    assert all(text in shown for text in ("formation_grpo", "1/2", "reward", "0.5", "tokens/s", "loss 0.250"))
    assert "skipped" not in shown


def test_other_processes_show_nothing() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=120), shown=False) as display:
        display.begin("formation_grpo", 2, 0)
        display.step(ROW)
    assert out.getvalue() == ""


@pytest.mark.parametrize(("name", "reason"), [("paper", "knows no tracker"), ("comet_ml", "not installed")])
def test_a_tracker_that_cannot_be_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        Trackers([name], tmp_path, {})
    assert name in str(raised.value)


def test_figures_reach_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vismem_core.training import trackers

    logged: list[tuple[dict[str, object], int]] = []
    begun: list[dict[str, object]] = []

    def accelerator(**options: object) -> SimpleNamespace:
        return SimpleNamespace(
            init_trackers=lambda name, config: begun.append(config),
            log=lambda figures, step: logged.append((figures, step)),
            end_training=lambda: begun.append({"ended": True}),
        )

    monkeypatch.setattr(trackers, "Accelerator", accelerator)
    monkeypatch.setattr(trackers, "filter_trackers", lambda names, logging_dir: names)
    with Trackers(["tensorboard"], tmp_path, {"train": {"seed": 3, "rewards": ("exact",)}}) as tracker:
        tracker.log(ROW)
    assert begun == [{"train.seed": 3, "train.rewards": "('exact',)"}, {"ended": True}]
    assert logged == [({"formation_grpo/loss": 0.25, "formation_grpo/reward": 0.5, "formation_grpo/tokens": 100.0,
                        "formation_grpo/skipped": False}, 1)]  # fmt: skip
    assert "comet_ml" not in sys.modules


EVALUATED = {"stage": "formation", "step": 4, "finished": False, "eval_exact": 0.5, "eval_exact_long": 0.75}
ANSWERS = [{"way": "long", "prompt": "what ?", "marked": "‹long› a boot", "references": ["a bag"]}]


def test_evaluations_stay_above_the_bar() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=120)) as display:
        display.begin("formation", 9, 4)
        display.evaluating("long", 1, 2)
        display.evaluated(EVALUATED, True)
    assert "formation, step 4: exact 0.500, exact_long 0.750, the best so far\n" in out.getvalue()


def test_answers_go_to_trackers_that_show_them(tmp_path: Path) -> None:
    logged: list[tuple[str, Any]] = []
    text = SimpleNamespace(name="tensorboard", log=lambda values, step: logged.append(("text", (values, step))))
    table = SimpleNamespace(name="wandb", log_table=lambda *told, step: logged.append(("table", (told, step))))
    trackers = Trackers([], tmp_path, {})
    trackers._accelerator = SimpleNamespace(  # type: ignore[assignment]
        trackers=[text, table, SimpleNamespace(name="aim")],
        log=lambda values, step: logged.append(("figures", (values, step))),
    )
    trackers.log(ROW)
    trackers.evaluated(EVALUATED, ANSWERS)
    kinds, told = zip(*logged[1:], strict=True)
    assert kinds == ("figures", "text", "table")
    assert told[0] == ({"formation/finished": False, "formation/eval_exact": 0.5, "formation/eval_exact_long": 0.75}, 1)
    assert "‹long› a boot" in told[1][0]["formation/answers"]
    assert told[2][0][2] == [["long", "what ?", "‹long› a boot", "['a bag']"]]
