"""Held-out questions that a stage is asked again and again while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from statistics import fmean
from typing import Any

from vismem_core.answers.checking import prepare
from vismem_core.answers.dealt import dealt
from vismem_core.answers.evaluation import pick, under
from vismem_core.answers.inference import Answer
from vismem_core.answers.metric import parse
from vismem_core.config import TrainConfig
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample, Skipped
from vismem_core.memory.memory import Memory

from .metrics import short
from .processes import Processes

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What came of asking once.

    Attributes:
        figures: ``eval_METRIC``, the mean over question types and ways of answering, and the same of each way;
            ``eval_invocations``, per answer that could have asked for memory.
        shown: some answers, the same questions' each time, as rows of ``samples.jsonl``.
    """

    figures: dict[str, float]
    shown: list[dict[str, Any]]


class Heldout:
    """A fixed part of the held-out samples, the first of each type; processes answer it together.

    Args:
        left_out: gets the samples that cannot be used; without it the first one raises.
    """

    def __init__(
        self,
        memory: Memory,
        samples: Sequence[Sample],
        config: TrainConfig,
        processes: Processes,
        left_out: list[Skipped] | None,
    ) -> None:
        self.memory, self.config, self.processes = memory, config, processes
        self.metric = parse(config.metric)
        self._all, self._left_out = samples, left_out

    @cached_property
    def samples(self) -> list[Sample]:
        """What is asked.

        Raises:
            DataError: nothing, or a bad sample.
        """
        picked = [own for kind in pick(self._all, self.config.evaluation.samples).values() for own in kind]
        good = [own for one in picked for own in prepare(self.memory.backbone, [one], self._left_out)[0]]
        if not good:
            raise DataError("there is no held-out sample to evaluate on")
        return good

    def ask(self, ways: Sequence[str], progress: Progress | None = None) -> Evaluation:
        """Ask all of them in each way, one of :data:`vismem_core.answers.evaluation.CONDITIONS`.

        Memory must be in its mode for evaluation.
        """
        told = {way: self._answers(way, progress) for way in ways}
        figures = self._figures(told) if self.processes.first else {}
        figures = self.processes.everyones([figures] if self.processes.first else [])[0]
        return Evaluation(figures, self._shown(told))

    def _answers(self, way: str, progress: Progress | None) -> list[Answer]:
        show = partial(progress, way) if progress else None
        ask: dict[str, Any] = {"max_new_tokens": self.config.max_new_tokens, "batch": self.config.eval_batch}
        with under(self.memory, way) as trigger:
            return dealt(self.memory, self.samples, self.processes, show, trigger=trigger, **ask)

    def _figures(self, told: dict[str, list[Answer]]) -> dict[str, float]:
        name, places = f"eval_{self.metric.name}", self._places()
        values = {
            way: fmean(
                self.metric.over([own[at].text for at in kind], [self.samples[at] for at in kind])
                for kind in places.values()
            )
            for way, own in told.items()
        }
        figures = {name: fmean(values.values())}
        if len(values) > 1:
            figures |= {f"{name}_{way}": value for way, value in values.items()}
        if "memory" in told:
            figures["eval_invocations"] = fmean(len(own.invocations) for own in told["memory"])
        return {key: short(value) for key, value in figures.items()}

    def _places(self) -> dict[str, list[int]]:
        places: dict[str, list[int]] = {}
        for at, own in enumerate(self.samples):
            places.setdefault(own.type or "all", []).append(at)
        return places

    def _shown(self, told: dict[str, list[Answer]]) -> list[dict[str, Any]]:
        """Answers to questions spread over all of them, and so over their types."""
        count = min(self.config.evaluation.shown, len(self.samples))
        places = [number * len(self.samples) // count for number in range(count)]
        return [_row(way, self.samples[at], own[at]) for way, own in told.items() for at in places]


def _row(way: str, sample: Sample, answer: Answer) -> dict[str, Any]:
    return {
        "way": way,
        "id": sample.id,
        "type": sample.type,
        "prompt": sample.prompt,
        "references": list(dict.fromkeys(sample.references)),
        "text": answer.text,
        "marked": answer.marked,
        "invocations": [asdict(own) for own in answer.invocations],
    }
