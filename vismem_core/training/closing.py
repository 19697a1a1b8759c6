"""The closing report of a run: held-out accuracy under all conditions, and what it is a report on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vismem_core.answers.checking import prepare
from vismem_core.answers.evaluation import evaluate
from vismem_core.answers.inference import answers
from vismem_core.config import KINDS, TrainConfig
from vismem_core.errors import TrainingError
from vismem_core.files.samples import Sample, Skipped
from vismem_core.memory.memory import Memory

from . import state
from .folder import BEST, METRICS
from .metrics import evaluated, rows
from .processes import Processes

REHEARSED = 2
"""Held-out samples on which the closing report is tried before the first step, and tokens of their answers."""
REHEARSED_TOKENS = 4


class Closing:
    """Makes the report.

    Args:
        heldout: what is asked.
        groups: see :func:`vismem_core.answers.evaluation.evaluate`.
        left_out: gets the samples that cannot be used; without it the first one raises.
    """

    def __init__(
        self,
        memory: Memory,
        heldout: Sequence[Sample],
        config: TrainConfig,
        groups: Mapping[str, Sequence[str]] | None,
        left_out: list[Skipped] | None,
    ) -> None:
        self.memory, self.heldout, self.config, self.groups = memory, heldout, config, groups
        self.left_out = left_out

    def rehearse(self) -> None:
        """Try it on a few samples: what it cannot do is known before the first step."""
        self._evaluate(self._few(), min(REHEARSED_TOKENS, self.config.max_new_tokens), None)

    def measure(self, progress: Callable[[str, int, int], None], processes: Processes) -> dict[str, Any]:
        """Held-out accuracy under all conditions; the processes answer together, and the first gets it."""
        return self._evaluate(self.heldout, self.config.max_new_tokens, progress, processes)

    def _evaluate(
        self,
        data: Sequence[Sample],
        max_new_tokens: int,
        progress: Callable[[str, int, int], None] | None,
        processes: Processes | None = None,
    ) -> dict[str, Any]:
        return evaluate(
            self.memory,
            data,
            groups=self.groups,
            per_type=self.config.eval_samples,
            batch=self.config.eval_batch,
            max_new_tokens=max_new_tokens,
            metric=self.config.metric,
            left_out=self.left_out,
            progress=progress,
            processes=processes,
        )

    def _few(self) -> list[Sample]:
        few: list[Sample] = []
        for at in range(len(self.heldout)):
            few += prepare(self.memory.backbone, [self.heldout[at]], self.left_out)[0]
            if len(few) == REHEARSED:
                break
        return few

    def refuse_nonsense(self, output: Path) -> None:
        """See that what was trained is numbers, and makes numbers.

        Raises:
            TrainingError: a tensor or a latent vector holds NaN or infinity.
        """
        odd = state.not_finite(self.memory)
        for kind in KINDS if odd is None else ():
            for _ in answers(self.memory, self._few(), max_new_tokens=REHEARSED_TOKENS, trigger=f"schedule:0={kind}"):
                if not all(own.latents.isfinite().all() for own in self.memory.trace.invocations):
                    odd = f"a latent vector of {kind} memory"
        if odd is not None:
            raise TrainingError(
                f"{output}: {odd} holds NaN or infinity, so this memory is not saved as finished; lower the "
                "learning rate (--set train...lr) and begin anew"
            )


def course(output: Path, metric: str) -> dict[str, Any]:
    """What a run's rows say for its report: how many steps there were, and where its evaluations were best.

    Returns:
        ``steps``, by stage, and ``skipped_steps``; where there were evaluations, ``best``, the row of the best one of
        the last stage, with the folder of its memory.
    """
    found = rows(output / METRICS)
    told: dict[str, Any] = {"steps": {row["stage"]: row["step"] for row in found}}
    told["skipped_steps"] = sum(bool(row.get("skipped")) for row in found)
    if asked := [row for row in found if evaluated(row)]:
        last = [row for row in asked if row["stage"] == asked[-1]["stage"]]
        told["best"] = {
            "folder": BEST,
            **max(last, key=lambda row: row[f"eval_{metric}"] or 0.0),
        }  # the first of equals
    return told


def lost(*data: Sequence[Sample], left_out: Sequence[Skipped]) -> list[dict[str, Any]]:
    """Rows that were left out, each once."""
    everything = [*(own for part in data for own in getattr(part, "skipped", ())), *left_out]
    return [asdict(own) for own in dict.fromkeys(everything)]
