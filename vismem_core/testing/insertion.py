"""Promises 2 and 3: insertion equals one pass over the whole sequence, and rows know nothing of their neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import CompileConfig

from vismem_core.base import cache as kv
from vismem_core.memory.memory import Memory

from .base import Base, Question, staggered
from .contract import Contract, holds
from .liveliness import close, moved, picture
from .reference import logits

SCHEDULES = {
    "short": "schedule:3=short",
    "long": "schedule:0=long",
    "both": "schedule:0=short,5=long,9=short",
}
PACKS = pytest.mark.parametrize("packs", [True, False], ids=["packed", "apart"])


class Insertion(Contract):
    """Latents enter as if they had always stood there, and for their own row alone."""

    @PACKS
    @pytest.mark.parametrize("spec", SCHEDULES.values(), ids=SCHEDULES)
    @holds(
        "promise 2: insertion with the KV cache must equal one pass over the whole sequence",
        "vismem_core.base.backbone.Backbone.continue_ and .packs",
    )
    def test_insertion_equals_one_pass(self, spec: str, packs: bool) -> None:
        base, questions = self.base(), self.questions()
        self.packing(base, packs)
        memory = base.attach(spec)
        output = base.generate(*questions)
        assert len(memory.trace) == len(questions) * spec.count("="), "memory was not invoked as scheduled"
        _compare_with_one_pass(base, memory, questions, output)

    @PACKS
    @holds(
        "promise 2: insertion at different steps of different rows must equal one pass over each row's whole sequence",
        "vismem_core.base.backbone.Backbone.continue_ and .packs",
    )
    def test_ragged_insertion_equals_one_pass(self, packs: bool) -> None:
        base, questions = self.base(), self.questions()
        self.packing(base, packs)
        memory = base.attach(staggered())
        output = base.generate(*questions)
        _compare_with_one_pass(base, memory, questions, output)

    @holds(
        "promise 2: memory in the neighbours' pass and in one of its own must come to the same",
        "vismem_core.base.backbone.Backbone.packs and vismem_core.decoding.packing",
    )
    def test_packing_changes_nothing(self) -> None:
        base, questions = self.base(), self.questions()
        self.packing(base, True)
        memory = base.attach(staggered())
        packed, formed = base.generate(*questions), memory.trace.invocations
        self.packing(base, False)
        apart = base.generate(*questions)
        assert formed == memory.trace.invocations, "other invocations"
        for one, other in zip(formed, memory.trace.invocations, strict=True):
            close(one.latents, other.latents, f"row {one.row} forms other memory when packed")
        assert packed.sequences.equal(apart.sequences), "other answers"
        words = len(base.backbone.head.weight)
        close(torch.stack(packed.logits)[..., :words], torch.stack(apart.logits)[..., :words], "other logits")

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @holds(
        "promise 2: a static cache, and steps compiled on it, must give what the default cache gives",
        "vismem_core.base.compiled and vismem_core.decoding.room",
    )
    def test_static_caches(self, compiled: bool) -> None:
        base, questions = self.base(), self.questions()
        settings = CompileConfig(backend="eager", mode="default")  # traced as for any backend
        settings._compile_all_devices = compiled  # type: ignore[assignment]
        static: dict[str, Any] = {"cache_implementation": "static", "compile_config": settings}
        static["disable_compile"] = not compiled  # where a GPU would compile by itself
        try:
            own = base.generate(*questions, **static)
        except Exception:
            pytest.skip("the model's own generate does not work with a static cache")
        if not own.sequences.equal(base.generate(*questions).sequences):
            pytest.skip("the model's own generate answers otherwise with a static cache")
        memory = base.attach(staggered())
        expected, formed = base.generate(*questions), memory.trace.invocations
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        able = base.backbone.decoder._can_compile_fullgraph and kv.plain(DynamicCache(config=base.model.config))
        graphs = []
        for _ in range(3):
            output = base.generate(*questions, **static)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            assert bool(graphs[0]) == (compiled and able), f"{graphs[0]} passes were compiled"
            assert output.sequences.equal(expected.sequences), "other answers"
            words = len(base.backbone.head.weight)
            close(torch.stack(output.logits)[..., :words], torch.stack(expected.logits)[..., :words], "other logits")
            for one, other in zip(memory.trace.invocations, formed, strict=True):
                close(one.latents, other.latents, f"row {one.row} forms other memory")
        assert graphs[1] == graphs[2], f"the same call for the third time compiles {graphs[2] - graphs[1]} passes anew"

    @PACKS
    @pytest.mark.parametrize("context", ["cache", "recompute"])
    @holds(
        "promise 3: a row's output must not depend on its neighbours, nor on when they invoke memory",
        "vismem_core.base.backbone.Backbone.carry and .inputs",
    )
    def test_rows_alone_and_together(self, context: str, packs: bool) -> None:
        base, questions = self.base(), self.questions()
        text, images = questions[0]
        questions.append((text, [picture(*image.size, 50) for image in images]))  # the same prompt about another image
        self.packing(base, packs)
        self.rereading(base, context)
        memory = base.attach(staggered(), context=context)
        together = base.generate(*questions)
        traces = [[(own.kind, own.position) for own in memory.trace.row(row)] for row in range(len(questions))]
        assert all({kind for kind, _ in own} == {"short", "long"} for own in traces), "a row did not invoke both kinds"
        assert len({own[0] for own in traces}) == len(questions) - 1, "rows did not invoke at different steps"
        batch, words = torch.stack(together.logits), len(base.backbone.head.weight)
        assert moved(batch[:, 0, :words], batch[:, -1, :words]), "another image makes no difference"
        latents = [[own.latents for own in memory.trace.row(row)] for row in range(len(questions))]
        for row, question in enumerate(questions):
            alone = base.generate(question)
            assert [(own.kind, own.position) for own in memory.trace.invocations] == traces[row]
            for own, expected in zip(memory.trace.invocations, latents[row], strict=True):
                close(own.latents, expected, f"row {row} forms other memory alone")
            assert together.answers[row].equal(alone.answers[0]), f"row {row} answers otherwise alone"
            close(batch[:, row, :words], torch.cat(alone.logits)[:, :words], f"row {row} has other logits alone")

    @holds(
        "promise 3: copies of a prompt (num_return_sequences) must see its images",
        "vismem_core.base.backbone.Backbone.record and vismem_core.base.vision.VisionStates.assign",
    )
    def test_copies_see_their_prompts_images(self) -> None:
        base, questions = self.base(), self.questions()
        copied: dict[str, Any] = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
        try:
            plain = base.generate(*questions, **copied).answers
        except Exception:
            pytest.skip("the model's own generate makes no copies")
        own = [base.generate(question).answers[0] for question in questions for _ in range(2)]
        if not all(map(torch.equal, plain, own)):
            pytest.skip("the model's own generate does not give copies of a prompt its images")
        memory = base.attach("schedule:1=short")
        output = base.generate(*questions, **copied)
        copies = [own.latents for own in sorted(memory.trace.invocations, key=lambda own: own.row)]
        assert len(output.answers) == len(copies) == 2 * len(questions)
        for row, question in enumerate(questions):
            alone = base.generate(question)
            for copy in (2 * row, 2 * row + 1):
                close(copies[copy], memory.trace.invocations[0].latents, f"copy {copy} forms other memory than its row")
                assert output.answers[copy].equal(alone.answers[0]), f"copy {copy} answers otherwise than row {row}"


def _compare_with_one_pass(base: Base, memory: Memory, questions: list[Question], output: Any) -> None:
    traces = [memory.trace.row(row) for row in range(len(questions))]
    for row, question in enumerate(questions):
        answer, latents = output.answers[row].tolist(), {own.position: own.latents for own in traces[row]}
        expected = logits(base, memory, question, answer, latents)
        got = torch.stack([step[row] for step in output.logits])[:, : expected.shape[1]]
        assert latents and moved(expected, logits(base, memory, question, answer, {})), "latents make no difference"
        close(got, expected, f"row {row} differs")
