"""A model with memory as lmms-eval asks it."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from tqdm import tqdm

import vismem_core as vismem
from vismem_core.answers.inference import Answer, Place, answers
from vismem_core.answers.likelihood import likelihoods
from vismem_core.base.loading import load_base
from vismem_core.config import KINDS, Kind
from vismem_core.errors import VismemError
from vismem_core.files.checkpoint import base_of
from vismem_core.files.samples import Sample

from .requests import generation, of_context, of_messages

Talk = Generator[Sample, str, list[str]]
"""Questions, each of which may hang on the answers before it, and at the end all of these."""


@dataclass
class Counts(TokenCounts):  # type: ignore[misc]
    """What lmms-eval writes beside an answer in its log of samples: its tokens, and its invocations by kind."""

    invocations: dict[Kind, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, int]:
        return super().to_dict() | self.invocations  # type: ignore[no-any-return]


class Simple(lmms):  # type: ignore[misc]
    """A model that is asked contexts with images beside them.

    Args:
        memory: folder or hub id of a trained memory.
        pretrained: hub id or folder of the model; by default the one that the memory was trained on.
        trigger: who invokes memory, another than the memory's own; ``never`` is the base model.
        backbone: registered name; found from the model if not given.
        device, dtype, revision, trust_remote_code: as :func:`vismem_core.base.loading.load_base` takes them; the
            revision is the model's.
        batch_size: questions answered together.
        max_new_tokens: where a task says nothing.
        log: a new JSONL file for the answers with the places of their invocations; of several processes, each after
            the first adds its rank to the name.
        any_base: load a memory that was trained on other weights of the same shape.

    Raises:
        VismemError: what is missing or does not fit.
    """

    is_simple = True

    def __init__(
        self,
        memory: str | None = None,
        pretrained: str | None = None,
        trigger: str | None = None,
        backbone: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        log: str | None = None,
        any_base: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self._rank = int(os.environ.get("RANK", 0))
        self.log = None if log is None else Path(f"{log}.{self._rank}" if self._rank else log)
        if memory is None:
            raise VismemError(
                "which memory? add memory=DIR to --model_args; memory=DIR,trigger=never is the base alone"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise VismemError(f"batch_size={batch_size}: give a number of questions, at least 1")
        if self.log is not None and self.log.exists():
            raise VismemError(f"{self.log}: exists already; name another log")
        if pretrained is None:
            recorded, pretrained = base_of(memory)
            backbone = backbone or recorded
        load: dict[str, Any] = {"dtype": dtype, "device": device or "auto", "revision": revision}
        model, processor, name = load_base(backbone, pretrained, trust_remote_code=trust_remote_code, **load)
        self.memory = vismem.attach(model, processor, memory, backbone=name, any_base=any_base)
        self.memory.trigger = trigger or self.memory.trigger
        self.batch_size, self.max_new_tokens, self.device = int(batch_size), max_new_tokens, model.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Simple:
        """What ``--model_args`` says goes before lmms-eval's own options and their defaults."""
        own = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**own | simple_parse_args_string(arg_string))

    # What lmms-eval calls

    def generate_until(self, requests: Sequence[Instance]) -> list[Any]:
        """The answers' texts, in order, with their counts of tokens and invocations."""
        return [own[0] for own in self._talks(requests, [self._single(own) for own in requests])]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """All rounds' answers of each request; the task says what is asked after an answer."""
        told = self._talks(requests, [self._rounds(own) for own in requests])
        return [[answer.text for answer in own] for own in told]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        """Of each continuation the negative log-likelihood, in nats, and whether greedy decoding writes it.

        It is the loss that lmms-eval's tasks take the least of, whatever the name says. Memory is invoked where it
        would be while the continuation is written (:mod:`vismem_core.answers.likelihood`). A pair is wrapped as
        answers are: bare ones reach no task of lmms-eval 0.7.3, which makes texts of them.
        """
        found = []
        for first in tqdm(range(0, len(requests), self.batch_size), "Model Scoring", disable=self.rank != 0):
            batch = requests[first : first + self.batch_size]
            samples = [self._continuation(own) for own in batch]
            for request, own in zip(batch, likelihoods(self.memory, samples, batch=len(batch)), strict=True):
                self._write(request, asdict(own))
                counts = _counts(own.tokens + 2 * len(own.invocations), own.invocations)
                found.append(GenerationResult((-own.logprob, own.greedy), counts))
        return found

    # Requests

    def _sample(self, request: Instance) -> Sample:
        context, _, visual, *where = request.args
        return of_context(_name(request), context, visual(self._doc(*where)))

    def _continuation(self, request: Instance) -> Sample:
        context, answer, *rest = request.args
        if not rest:  # a choice without its question
            return of_context(_name(request), context, None, answer)
        visual, *where = rest
        doc = self._doc(*where)
        return of_context(_name(request), context, visual(doc), answer if isinstance(answer, str) else answer(doc))

    def _single(self, request: Instance) -> Talk:
        return [(yield self._sample(request))]

    def _rounds(self, request: Instance) -> Talk:
        context, _, visual, following, *where = request.args
        doc, visuals, info = self._doc(*where), visual(self._doc(*where)), None
        told: list[str] = []
        while True:
            told.append((yield of_context(_name(request), context, visuals)))
            ask = {"round_idx": len(told), "previous_output": list(told), "previous_round_info": info}
            visuals, context, done, _, info = following(doc, **ask)
            if done:
                return told

    def _settings(self, request: Instance) -> Mapping[str, Any]:
        return request.args[1]  # type: ignore[no-any-return]

    def _doc(self, at: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][at]

    # Answers

    def _talks(self, requests: Sequence[Instance], talks: Sequence[Talk]) -> list[list[GenerationResult]]:
        """Hold all talks, those with equal settings together in batches; the answers of each."""
        alike: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            alike.setdefault(json.dumps(self._settings(request), sort_keys=True, default=str), []).append(at)
        told: list[list[GenerationResult]] = [[] for _ in talks]
        with tqdm(total=len(talks), desc="Model Responding", disable=self.rank != 0) as bar:
            for group in alike.values():
                settings, unknown = generation(self._settings(requests[group[0]]), self.max_new_tokens)
                if unknown:
                    logger.warning(f"vismem does not know these settings of generation: {', '.join(sorted(unknown))}")
                for first in range(0, len(group), self.batch_size):
                    batch = group[first : first + self.batch_size]
                    self._hold({at: talks[at] for at in batch}, requests, settings, told)
                    bar.update(len(batch))
        logger.info(_summary(told))
        return told

    def _hold(
        self,
        talks: Mapping[int, Talk],
        requests: Sequence[Instance],
        settings: Mapping[str, Any],
        told: list[list[GenerationResult]],
    ) -> None:
        asked = {at: next(talk) for at, talk in talks.items()}
        while asked:
            found = answers(self.memory, list(asked.values()), batch=len(asked), **settings)
            for at, answer in zip(list(asked), list(found), strict=True):
                told[at].append(self._noted(requests[at], answer, len(told[at])))
                try:
                    asked[at] = talks[at].send(answer.text)
                except StopIteration:
                    del asked[at]

    def _noted(self, request: Instance, answer: Answer, number: int) -> GenerationResult:
        self._write(request, {"round": number} | answer.to_dict())
        return GenerationResult(answer.text, _counts(answer.tokens, answer.invocations))

    def _write(self, request: Instance, row: Mapping[str, Any]) -> None:
        """Add a row to the log, if there is one."""
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                own = {name: value for name, value in row.items() if name != "sample_id"}
                named = {"task": request.task_name, "doc_id": request.doc_id}
                file.write(json.dumps(named | own, ensure_ascii=False) + "\n")


def _counts(tokens: int, places: Sequence[Place]) -> Counts:
    kinds = [place.kind for place in places]
    return Counts(output_tokens=tokens, invocations={kind: kinds.count(kind) for kind in KINDS})


def _summary(told: Sequence[Sequence[GenerationResult]]) -> str:
    counts = [answer.token_counts.invocations for own in told for answer in own]
    each = ", ".join(f"{sum(own[kind] for own in counts) / max(len(counts), 1):.2f} {kind}" for kind in KINDS)
    return f"vismem: {len(counts)} answers, invocations per answer: {each}"


class Chat(Simple):
    """A model that is asked messages, with images among them; the arguments are those of :class:`Simple`."""

    is_simple = False

    def _sample(self, request: Instance) -> Sample:
        _, messages, _, *where = request.args
        return of_messages(_name(request), messages(self._doc(*where)))

    def _rounds(self, request: Instance) -> Talk:
        _, messages, _, *where = request.args
        doc, info = self._doc(*where), None
        asked, told = messages(doc), list[str]()
        while True:
            told.append((yield of_messages(_name(request), asked)))
            ask = {"round_idx": len(told), "previous_output": list(told), "previous_round_info": info}
            following = messages(doc, **ask)
            if not isinstance(following, tuple):  # the task has no further rounds
                return told
            asked, done, _, info = following
            if done:
                return told

    def _settings(self, request: Instance) -> Mapping[str, Any]:
        return request.args[2]  # type: ignore[no-any-return]


def _name(request: Instance) -> str:
    return f"{request.task_name}/{request.doc_id}"
