"""The reward for numbers: the answer's last one against the reference's last one."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from vismem_core.answers.reward import Reward, by_row, reference
from vismem_core.errors import ConfigError, RewardError
from vismem_core.files.samples import Sample

FRAC = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
"""LaTeX's fraction of two plain numbers."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+"
NUMBER = re.compile(
    rf"""
    (?:(?<![\w.)%])(?P<sign>[-+]))?     # after a digit or a word it is a dash: 10-20
    [$€£]?
    (?<!\w)(?<!\w\.)                    # cm2 and v1.2 are names
    (?P<top>{_DIGITS})
    (?:e(?P<exponent>[-+]?\d{{1,3}})(?!\d))?
    (?:\s?/\s?(?P<bottom>{_DIGITS}))?
    (?P<percent>\s?\\?%)?
    """,
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)


def number(argument: str) -> Reward:
    """1 if the answer's last number is the reference's, else 0, also for an answer without any.

    Reads ``-3``, ``1,000.5``, ``2e-3``, ``1/2``, ``\\frac{1}{2}`` and ``50%``, which is 1/2. Numbers are compared as
    fractions, without rounding.

    Args:
        argument: how far off the answer may be, as a share of the reference; by default it must be equal.
    """
    tolerance = _tolerance(argument)

    def rule(text: str, sample: Sample) -> float:
        wanted, found = last_number(reference(sample)), last_number(text)
        if wanted is None:
            raise RewardError(f"there is no number in the sample's answer {sample.answer!r}")
        return float(found is not None and abs(found - wanted) <= tolerance * abs(wanted))

    return by_row(rule)


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``; None if there is none, or if it is divided by 0."""
    plain = FRAC.sub(r"\1/\2", text.replace("−", "-").replace("{,}", ","))
    matches = list(NUMBER.finditer(plain))
    if not matches:
        return None
    last = matches[-1].groupdict()
    bottom = _fraction(last["bottom"] or "1")
    if bottom == 0:
        return None
    value = _fraction(last["top"]) * Fraction(10) ** int(last["exponent"] or 0) / bottom
    return (-value if last["sign"] == "-" else value) / (100 if last["percent"] else 1)


def _fraction(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "")))  # Fraction alone refuses texts of over 4300 digits


def _tolerance(argument: str) -> Fraction:
    try:
        tolerance = Fraction(argument or "0")
    except (ValueError, ZeroDivisionError):
        tolerance = Fraction(-1)
    if not 0 <= tolerance < 1:
        raise ConfigError(f"reward number takes a relative tolerance from 0 to 1, as in number:0.01, not {argument!r}")
    return tolerance
