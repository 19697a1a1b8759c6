"""The reward for multiple choice: the right option, named by its letter or by its text."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vismem_core.answers.reward import Reward, by_row, reference
from vismem_core.errors import RewardError
from vismem_core.files.samples import Sample
from vismem_plugins.metrics.text import composed, plain

from . import no_argument

MARKER = re.compile(r"(?:(?<=\s)|^)[*_]*(?:\(([A-Za-z])\)|([A-Za-z])[.):])[*_]*(?=\s|$)", re.MULTILINE)
"""What stands before an option: ``A.``, ``A)``, ``A:``, ``(A)``, also in bold."""

SENTENCE = re.compile(r"[.;?!]\s.*")
ALONE = re.compile(r"(?:(?:option|choice|answer)\b)?[\W_]*([A-Za-z])[\W_]*", re.IGNORECASE)
STATED = re.compile(
    r"""
    \b(?i:answer|option|choice)(?:\s+(?i:is|would\s+be|should\s+be))?[\s*_:]*
    (?i:\b(?:option|choice)\s+)?(?:\\boxed\{)?[*_]*
    (?:\(([A-Za-z])\)|\b([A-Z])(?![\w'’])|\b([a-z])(?=[).]|\s*$))
    """,
    re.VERBOSE,
)
"""``the answer is B``; a small letter must not be the article of ``the answer is a dog``."""

LEADING = re.compile(r"[*_]*(?:\(([A-Za-z])\)|([A-Za-z])[.):])[*_]*(?!\S)")
MENTIONED = re.compile(r"\(([A-Za-z])\)|\*\*([A-Z])\*\*|\\boxed\{([A-Z])\}|\b([B-HJ-Z])(?![\w'’])|\b([AI])(?=\W*$)")
"""A bare A or I inside a sentence is a word."""


def choice(argument: str) -> Reward:
    """1 for the reference's option, else 0.

    The prompt lists the options, as in ``A. cat B. dog`` or ``(A) cat`` on lines of their own; the reference and the
    answer give a letter or the option's text. The last "the answer is" counts. Without one the answer must name one
    option alone.
    """
    no_argument("choice", argument)

    def rule(text: str, sample: Sample) -> float:
        listed = options(sample.prompt)
        if not listed:
            raise RewardError("the prompt lists no options, as in 'A. cat B. dog'")
        wanted = chosen(reference(sample), listed)
        if wanted is None:
            raise RewardError(f"the sample's answer {sample.answer!r} is none of the options {', '.join(listed)}")
        return float(chosen(text, listed) == wanted)

    return by_row(rule)


def options(prompt: str) -> dict[str, str]:
    """Texts by capital letter: the longest row of markers A, B, ... in ``prompt``, the last one of that length."""
    marks = [(letter(match), match.start(), match.end()) for match in MARKER.finditer(prompt)]
    best: list[tuple[str, int, int]] = []
    for at, mark in enumerate(marks):
        if mark[0] != "A":
            continue
        row = [mark]
        for later in marks[at + 1 :]:
            if later[0] == chr(ord(row[-1][0]) + 1):
                row.append(later)
        best = row if len(row) >= len(best) else best
    if len(best) < 2:
        return {}
    ends = [start for _, start, _ in best[1:]] + [len(prompt)]
    texts = [prompt[stop:end].strip().split("\n")[0] for (_, _, stop), end in zip(best, ends, strict=True)]
    if "\n" not in prompt[best[-2][1] : best[-1][1]]:  # all on one line: an instruction may follow the last
        texts[-1] = SENTENCE.sub("", texts[-1])
    return {mark[0]: _bare(text) for mark, text in zip(best, texts, strict=True)}


def chosen(text: str, listed: Mapping[str, str]) -> str | None:
    """The letter of the option that ``text`` chooses, or None; a letter goes before a text."""
    text = composed(text.strip())
    same = [name for name, option in listed.items() if option and option == _bare(text)]
    stated = list(STATED.finditer(text))
    for found in (ALONE.fullmatch(text), next(reversed(stated), None), LEADING.match(text)):
        if found and letter(found) in listed:
            return letter(found)
    if len(same) == 1:
        return same[0]
    named, rest = _texts_in(text, listed)
    named |= {letter(found) for found in MENTIONED.finditer(rest)} & set(listed)
    return named.pop() if len(named) == 1 else None


def letter(match: re.Match[str]) -> str:
    """The letter that one of a pattern's groups caught, as a capital."""
    return next(group for group in match.groups() if group).upper()


def _texts_in(text: str, listed: Mapping[str, str]) -> tuple[set[str], str]:
    """Letters of the options whose texts stand in ``text``, and what is left of it.

    The longest come first, so that there is no cat in a black cat.
    """
    found, text = set(), " ".join(text.split())
    for name, option in sorted(listed.items(), key=lambda item: -len(item[1])):
        text, count = (
            re.subn(rf"(?<!\w){re.escape(option)}(?!\w)", " ", text, flags=re.IGNORECASE) if option else (text, 0)
        )
        if count:
            found.add(name)
    return found, text


def _bare(text: str) -> str:
    return plain(text).strip(" .,;:!?*_\"'()")
