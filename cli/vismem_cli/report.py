"""What a training run or an evaluation found, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vismem_core.files.samples import Skipped

from .console import print_table, say, warn


def print_report(report: Mapping[str, Any], title: str = "Held-out questions") -> None:
    """Accuracies by question type, a column per way of answering, and how many questions they are from."""
    counts: Mapping[str, int] = report.get("questions") or {}
    measured = "accuracy" if report.get("metric", "exact") == "exact" else report["metric"]
    for part, heading in (("heldout", title), ("seen", "\nSeen types of question")):
        ways: Mapping[str, Mapping[str, float]] = report.get(part) or {}
        types = list(dict.fromkeys(name for scores in ways.values() for name in scores))
        if not types:
            continue
        rows = [(name, str(counts.get(name, "")), *(_share(own.get(name)) for own in ways.values())) for name in types]
        if len(types) > 1:
            means = (sum(scores.values()) / len(scores) if scores else None for scores in ways.values())
            rows.append(("mean", "", *map(_share, means)))
        print_table(heading, (measured, "n", *ways), rows, numbers=True)
    warn_of(report)
    if (count := report.get("invocations_per_answer")) is not None:
        say(f"\n{count:.2f} invocations per answer, {report.get('seconds', 0):.0f} seconds")


def tell_best(report: Mapping[str, Any], place: Path) -> None:
    """Which evaluation of a run was the best, and where its memory is."""
    if best := report.get("best"):
        where = f"{best['stage']}, step {best['step']}"
        say(f"\nbest in evaluations: {best['eval_' + report['metric']]:.3f}, after {where}: {place / best['folder']}")


def warn_of(report: Mapping[str, Any]) -> None:
    """What a reader of the figures must know, on stderr."""
    if lost := report.get("not_blind"):
        told = ", ".join(f"{count} of {report['questions'][name]} {name!r}" for name, count in lost.items())
        warn(f"the blind columns leave out questions that no sample has other images for: {told}")
    if steps := report.get("skipped_steps"):
        warn(f"{steps} steps of training were skipped, since their gradient was not finite")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def list_skipped(skipped: Iterable[Skipped]) -> list[dict[str, Any]]:
    """The bad rows that were left out, for JSON."""
    return [asdict(own) for own in dict.fromkeys(skipped)]


def tell_skipped(skipped: Iterable[Skipped]) -> None:
    """The bad rows that were left out, on stderr."""
    if listed := list(dict.fromkeys(skipped)):
        warn(f"bad rows were left out: {len(listed)}")
        for own in listed:
            say(f"  {own}")
