"""Latents of a ragged batch equal the formers' definitions, computed apart for each row (Eq. 5, 6)."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, mini, tied
from reference import Sequence, long_latents, one_pass, plain_block, query, short_latents
from torch import Tensor

from vismem_core import Invocation, Memory
from vismem_core.answers.inference import answers
from vismem_core.config import FormerConfig, MemoryConfig
from vismem_core.errors import PluginError
from vismem_plugins.formers.described import ASKS
from vismem_plugins.mosaic import mosaic


def invocations(base: Base, memory: Memory, rows: list[int]) -> Iterator[tuple[int, Invocation, Sequence, int, int]]:
    """Every invocation in the answers to some questions, its row read in one pass, and its segment's two ends."""
    questions = [QUESTIONS[row] for row in rows]
    output = base.generate(*questions)
    for row, question in enumerate(questions):
        sequence = one_pass(memory, base.inputs(question), output.answers[row].tolist(), row)
        begin = sequence.places[0]
        for invocation in memory.trace.row(row):
            end = sequence.places[invocation.position]
            yield rows[row], invocation, sequence, begin, end
            begin = sequence.places[invocation.position + 1] + 1  # after the end token


@pytest.mark.parametrize("rows", [[1], [2], [0, 1, 2, 3]], ids=["alone", "text", "ragged"])
@pytest.mark.parametrize("context", ["cache", "recompute"])
def test_lora(any_base: Base, context: str, rows: list[int]) -> None:
    pristine = copy.deepcopy(any_base.model)
    memory = any_base.attach(config(context=context, trigger="schedule:0=long,3=short,7=short,11=long"))
    any_base.model.generation_config.eos_token_id = None
    seen = set()
    for row, invocation, sequence, begin, end in invocations(any_base, memory, rows):
        seen.add(invocation.kind)
        asked = query(memory, sequence, begin, end)
        if invocation.kind == "long":
            expected = long_latents(pristine, memory, sequence, asked, end, context)
        else:
            expected = short_latents(pristine, memory, any_base.inputs(QUESTIONS[row]), asked, context)
        torch.testing.assert_close(invocation.latents, expected, atol=1e-4, rtol=1e-3)
    assert seen == {"short", "long"}


@pytest.mark.parametrize("kind", ["short", "long"])
def test_loras_change_their_own_memory_alone(kind: str) -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short,3=long"))
    base.model.generation_config.eos_token_id = None

    def latents() -> dict[str, Tensor]:
        base.generate(QUESTIONS[0], max_new_tokens=8)
        return {invocation.kind: invocation.latents for invocation in memory.trace.invocations}

    before = latents()
    with torch.no_grad():
        for matrix in memory.former(kind).adapter_parameters().values():  # type: ignore[arg-type]
            matrix.mul_(1.5)
    after = latents()
    assert not torch.allclose(before[kind], after[kind], atol=1e-3)
    if kind == "long":
        torch.testing.assert_close(before["short"], after["short"])


def test_context_makes_a_difference() -> None:
    found = []
    for context in ("cache", "recompute"):
        base = tied()
        memory = base.attach(config(context=context, trigger="schedule:0=short,3=long"))
        base.generate(QUESTIONS[0], max_new_tokens=8, eos_token_id=None)
        found.append([invocation.latents for invocation in memory.trace.invocations])
    assert all(not torch.allclose(*pair, atol=1e-2) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("make", [tied, mini])
@torch.no_grad()
def test_transformer(make: Any) -> None:
    base = make()
    memory = base.attach(config("transformer", trigger="schedule:0=long,3=short,7=short,11=long"))
    base.model.generation_config.eos_token_id = None
    for _, invocation, sequence, begin, end in invocations(base, memory, [0, 1, 2, 3]):
        former: Any = memory.former(invocation.kind)
        states = sequence.embeds[:, : sequence.visual.shape[1]][sequence.visual]
        if invocation.kind == "long":
            states = torch.cat([states, sequence.hidden[0, begin - 1 : end]])
        states, asks = former.enter(states), former.ask(query(memory, sequence, begin, end)[0])
        tokens = torch.cat([asks, former.initial + asks.mean(0)])
        for block in former.blocks:
            tokens = plain_block(block, tokens, torch.cat([states, tokens]))
        expected = former.leave(tokens[-former.config.length :]) * former.gain
        torch.testing.assert_close(invocation.latents, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["constant", "pooled", "kept"])
@torch.no_grad()
def test_controls(name: str) -> None:
    """Vectors that are always the same, means of visual tokens, and those that the last state is nearest to."""
    base = mini()
    memory = base.attach(config(name, trigger="schedule:0=long,3=short,7=short"))
    base.model.generation_config.eos_token_id = None
    for former in (memory.short, memory.long):
        for parameter in former.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    found = 0
    for _, invocation, sequence, _, end in invocations(base, memory, [0, 1, 3]):
        former: Any = memory.former(invocation.kind)
        count = former.config.length
        if name == "constant":
            expected = former.vectors * memory.backbone.embedding_scale()
        else:
            seen = sequence.embeds[:, : sequence.visual.shape[1]][sequence.visual]
            placed = seen + former.places[: len(seen)]
            if name == "pooled":
                picked = torch.nn.functional.adaptive_avg_pool1d(placed.T[None], count)[0].T
            else:
                near = torch.cosine_similarity(seen, sequence.hidden[0, end - 1 : end], dim=-1)
                best = sorted(sorted(range(len(seen)), key=lambda at: -float(near[at]))[:count])
                picked = placed[[best[at % len(best)] for at in range(count)]]
            expected = former.leave(picked)
        torch.testing.assert_close(invocation.latents, expected, atol=1e-4, rtol=1e-3)
        found += 1
    assert found == 9


def test_constant_queries_are_the_same_for_all() -> None:
    base = tied()
    memory = base.attach(config(builder="constant", trigger="schedule:0=long"))
    states, mask = torch.randn(3, 5, memory.backbone.width), torch.ones(3, 5, dtype=torch.bool)
    one, other = memory.builder(states, mask), memory.builder(states.flip(1) * 2, mask)
    assert one.equal(other) and one[0].equal(one[2])
    assert one.shape == (3, memory.config.query.length, memory.backbone.width)


def test_unknown_former_names_the_nearest() -> None:
    with pytest.raises(PluginError, match="lora"):
        tied().attach(config("lroa"))


@torch.no_grad()
def test_descriptions_are_what_the_base_writes_of_the_image() -> None:
    """Of rows whose lists are of other lengths; where a list is over, its end token stands."""
    base = mini()
    samples = [mosaic("heldout", types=["read"], size=size, late=True)[at] for at, size in enumerate((2, 3))]
    written = [base.generate((ASKS, sample.images), max_new_tokens=12).answers[0].tolist() for sample in samples]
    assert written[0] != written[1]
    memory = base.attach(MemoryConfig(long=FormerConfig("described", length=12), trigger="schedule:0=long"))
    memory.long.places.normal_()
    memory.long.leave.weight.normal_()
    list(answers(memory, samples, max_new_tokens=4))
    for own, ids in zip(memory.trace.invocations, written, strict=True):
        ends = ids.index(memory.backbone.end_of_turn) if memory.backbone.end_of_turn in ids else len(ids)
        words = torch.tensor((ids[:ends] + [memory.backbone.end_of_turn] * 12)[: len(own.latents)])
        placed = memory.backbone.embed(words) + memory.long.places[: len(words)]
        torch.testing.assert_close(own.latents, memory.long.leave(placed), atol=1e-4, rtol=1e-3)
