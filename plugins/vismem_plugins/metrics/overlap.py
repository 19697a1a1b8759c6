"""Metrics for longer texts, each by the package that the field measures with: BLEU, ROUGE, CIDEr."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from itertools import zip_longest
from typing import Any

from vismem_core.answers.metric import Scores
from vismem_core.errors import ConfigError
from vismem_core.files.samples import Sample
from vismem_core.plugins import reason

MARKS = "'' ' `` ` ( ) { } [ ] . ? ! , : - -- ... ;"
"""Tokens that captions are compared without, as in COCO's evaluation."""


def bleu(argument: str) -> Scores:
    """BLEU by sacrebleu (Post, arXiv 1804.08771), from 0 to 1: of a set as a whole, and of each answer as a sentence.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    _no_argument("bleu", argument)
    return Bleu(_needed("bleu", "sacrebleu"))


class Bleu:
    """BLEU of any number of references.

    Args:
        package: sacrebleu.
    """

    def __init__(self, package: Any) -> None:
        self.package = package

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample], /) -> list[float]:
        pairs = zip(predictions, samples, strict=True)
        return [self.package.sentence_bleu(text, list(own.references or ("",))).score / 100 for text, own in pairs]

    def corpus(self, predictions: Sequence[str], samples: Sequence[Sample]) -> float:
        """BLEU of the set."""
        streams = zip_longest(*(own.references or ("",) for own in samples))  # the first of each, the second of each
        return float(self.package.corpus_bleu(list(predictions), [list(own) for own in streams]).score) / 100


def rouge(argument: str) -> Scores:
    """ROUGE-L by rouge-score, F1 against the best reference, without stemming.

    Raises:
        ConfigError: rouge-score is not installed.
    """
    _no_argument("rouge", argument)
    scorer = _needed("rouge", "rouge_score.rouge_scorer").RougeScorer(["rougeL"])

    def scores(predictions: Sequence[str], samples: Sequence[Sample], /) -> list[float]:
        pairs = zip(predictions, samples, strict=True)
        return [scorer.score_multi(own.references or ("",), text)["rougeL"].fmeasure for text, own in pairs]

    return scores


def cider(argument: str) -> Scores:
    """CIDEr-D by pycocoevalcap (Vedantam et al., arXiv 1411.5726), which goes from 0 to 10.

    An n-gram weighs the more the fewer of the set's questions have it in their references, so a question alone is
    worth 0. Words are split by nltk as the Penn Treebank has them, where COCO's own scripts call a program in Java.

    Raises:
        ConfigError: pycocoevalcap or nltk is not installed.
    """
    _no_argument("cider", argument)
    package = _needed("cider", "pycocoevalcap.cider.cider_scorer")
    tokenizer = _needed("cider", "nltk.tokenize").TreebankWordTokenizer()

    def words(text: str) -> str:
        return " ".join(own for own in tokenizer.tokenize(text.lower()) if own not in MARKS.split())

    def scores(predictions: Sequence[str], samples: Sequence[Sample], /) -> list[float]:
        scorer = package.CiderScorer()
        for text, sample in zip(predictions, samples, strict=True):
            scorer += (words(text), [words(own) for own in sample.references or ("",)])
        return [value if math.isfinite(value) else 0.0 for value in map(float, scorer.compute_score()[1])]

    return scores


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise ConfigError(f"metric {name} takes no argument, not {argument!r}")


def _needed(metric: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ConfigError(
            f'metric {metric} needs {package}: pip install "vismem[metrics]" ({reason(error)})'
        ) from error
