"""The reward for mathematics: an expression that math-verify finds equal to the reference.

https://github.com/huggingface/Math-Verify
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from vismem_core.answers.reward import Reward, by_row, reference
from vismem_core.errors import ConfigError, RewardError
from vismem_core.files.samples import Sample
from vismem_core.plugins import reason

from . import no_argument

DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
COMMAND = re.compile(r"\\[A-Za-z]+")
WORD = re.compile(r"[A-Za-z]{2}")


def math(argument: str) -> Reward:
    """1 for an expression equal to the reference's, else 0.

    The reference and the answer are texts with formulas in ``$...$``, ``\\(...\\)`` or ``\\boxed{...}``, or one bare
    formula. An answer is not equal if math-verify cannot read it, or cannot show within 5 seconds that it is equal.
    math-verify keeps time by a signal, so this reward runs in the main thread alone.

    Raises:
        ConfigError: math-verify is not installed.
    """
    no_argument("math", argument)
    try:
        from math_verify import parse, verify
    except ImportError as error:
        command = 'pip install "math-verify>=0.7"'
        raise ConfigError(f"reward math needs math-verify: {command} ({reason(error)})") from error

    def rule(text: str, sample: Sample) -> float:
        wanted = _read(parse, reference(sample))
        if not wanted:
            raise RewardError(f"math-verify reads no mathematics in {sample.answer!r}; write formulas as $...$")
        return float(verify(wanted, _read(parse, text)))

    return by_row(rule)


def _read(parse: Callable[[str], list[Any]], text: str) -> list[Any]:
    """What math-verify reads; without delimiters it would see only the 2 of ``2\\sqrt{3}``."""
    bare = not DELIMITED.search(text) and not WORD.search(COMMAND.sub("", text))
    return parse(f"${text.strip()}$" if bare and text.strip() else text)
