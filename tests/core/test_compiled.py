"""Static caches and compiled steps: the same answers, and nothing compiled twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, tied, untied
from transformers.generation import CompileConfig

from vismem_core.config import PolicyConfig
from vismem_core.decoding import room
from vismem_core.errors import AttachError

COUNTERS = torch._dynamo.utils.counters
PLAIN: dict[str, Any] = {"compile_config": CompileConfig(backend="eager", mode="default")}
"""Traced as for any backend, and run as it is."""


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(COUNTERS["stats"]["unique_graphs"])


def answers(base: Base, length: int, **options: Any) -> list[list[int]]:
    return base.generate(*QUESTIONS, max_new_tokens=length, min_new_tokens=length, **options).answers.tolist()  # type: ignore[no-any-return]


@pytest.mark.long
def test_the_cpu_backend_gives_the_same_tokens() -> None:
    base = tied()
    memory = base.attach(config())
    expected = answers(base, 24)
    assert len(memory.trace) > 8
    memory.detach()
    base.attach(config(compile=True))
    told = []
    for _ in range(3):
        assert answers(base, 24, compile_config=CompileConfig(mode="default")) == expected
        told.append(graphs())
    assert told[1] == told[2] <= 7  # 1, 6 or 10 tokens a row; one row's image in the encoder, or several rows'
    assert all("gather" in why for why in COUNTERS["graph_break"])


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": PolicyConfig("lora", rank=4)},
        pytest.param({"builder": "cross", "context": "recompute"}, marks=pytest.mark.long),
        pytest.param({"drop_image_after_invocation": True}, marks=pytest.mark.long),
    ],
    ids=["policy", "recompute", "drop"],
)
@pytest.mark.long
def test_what_else_a_step_may_hold(settings: dict[str, Any]) -> None:
    base = untied()
    memory = base.attach(config(**settings))
    expected = answers(base, 24)
    memory.detach()
    base.attach(config(compile=True, **settings))
    told = []
    for _ in range(3):
        assert answers(base, 24, **PLAIN) == expected
        told.append(graphs())
    assert 0 < told[1] == told[2]


@torch.no_grad()
def test_passes_under_an_adapter_are_other_ones() -> None:
    base = untied()
    memory = base.attach(config(policy=PolicyConfig("lora", rank=4)))
    decoder, embeds = base.model.model.language_model, torch.randn(1, 3, 32)

    def passes() -> list[torch.Tensor]:
        found = []
        for acts in (False, True, False, True):
            with memory.acting() if acts else nullcontext():
                found.append(decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state)
        return found

    expected = passes()
    assert (expected[0] - expected[1]).abs().max() > 0.1
    with memory.compiler.on(PLAIN["compile_config"]):
        found = passes()
    torch.testing.assert_close(found, expected)
    assert graphs() == 2


def scored(base: Base, *rows: int) -> tuple[list[list[int]], torch.Tensor]:
    """Answers, and the logits (B, T, V) of all steps."""
    output = base.generate(
        *(QUESTIONS[row] for row in rows), max_new_tokens=20, min_new_tokens=20, output_logits=True, **PLAIN
    )
    return output.answers.tolist(), torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("rows", [pytest.param([0], marks=pytest.mark.long), [0, 1, 2]], ids=["one", "ragged"])
@pytest.mark.parametrize("trigger", ["anywhere:0.3", "schedule:2=short,9=long", "schedule:1=long,2=short,11=short"])
def test_invocations_in_compiled_passes(rows: list[int], trigger: str) -> None:
    base = untied()
    memory = base.attach(config(trigger=trigger))
    expected, logits = scored(base, *rows)
    latents = [own.latents for own in memory.trace.invocations]
    assert len(latents) >= 2
    memory.detach()
    memory = base.attach(config(trigger=trigger, compile=True))
    found, others = scored(base, *rows)
    assert found == expected and graphs() >= 2
    torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-4)
    for own, other in zip(memory.trace.invocations, latents, strict=True):
        torch.testing.assert_close(own.latents, other, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_room_is_the_next_calls() -> None:
    base = untied()
    memory = base.attach(config(compile=True))

    def places() -> list[int]:
        return [own.data_ptr() for own in memory.compiler.room]

    def call(*rows: int) -> list[list[int]]:
        inputs = base.inputs(*(QUESTIONS[row] for row in rows))
        return base.model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, **PLAIN).tolist()  # type: ignore[no-any-return]

    first = call(0, 1)
    kept = places()
    assert len(kept) == 4 and call(0, 1) == first and places() == kept
    other = call(0)
    assert set(places()).isdisjoint(kept) and call(0) == other
    cache = base.generate(QUESTIONS[0], max_new_tokens=12, **PLAIN).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    other_image = base.inputs(QUESTIONS[0])
    other_image["pixel_values"] = -other_image["pixel_values"]
    base.model.generate(**other_image, max_new_tokens=12, **PLAIN)
    assert all(layer.keys.equal(own) for layer, own in zip(cache.layers, before, strict=True))


@pytest.mark.long
def test_what_cuda_graphs_take_for_fixed_stays_where_it_is() -> None:
    """They are recorded anew when it moves, which takes longer than the pass."""
    moved, fixed = list[str](), set[str]()

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        names = [node for node in graph.graph.nodes if node.op == "placeholder"]
        static = [
            at for at, node in enumerate(names) if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
        ]
        known: dict[int, int] = {}

        def run(*args: Any) -> Any:
            for at in static:
                place = args[at].data_ptr()
                fixed.add(names[at].name)
                moved.extend([names[at].name] if known.setdefault(at, place) != place else [])
                known[at] = place
            return graph(*args)

        return run

    base = untied()
    base.attach(config(compile=True, trigger="schedule:2=long,9=short,14=long"))
    settings = CompileConfig(backend=backend, mode="default")
    inputs = base.inputs(QUESTIONS[0])
    for _ in range(3):
        base.model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, compile_config=settings)
    assert any("share" in name for name in fixed) and any("keys" in name for name in fixed)
    assert not moved


@pytest.mark.long
def test_prompts_of_other_lengths_are_no_reason_to_compile_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BLOCK", 32)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    base = untied()
    base.attach(config(compile=True))
    for rows in ([0], [0, 1, 2], [1], [3, 2], [0, 3, 1, 2], [2]):
        for length in (8, 40):
            base.generate(*(QUESTIONS[row] for row in rows), max_new_tokens=length, **PLAIN)
    before = graphs()
    for rows in ([3], [1, 2], [2, 0, 1]):
        base.generate(*(QUESTIONS[row] for row in rows), max_new_tokens=20, **PLAIN)
    assert graphs() == before


def test_steps_are_compiled_where_generate_would() -> None:
    base = untied()
    base.attach(config())
    settings = CompileConfig(backend="eager", mode="default")
    answers(base, 12, compile_config=settings)  # on a CPU it would not
    answers(base, 12, compile_config=settings, cache_implementation="static")
    assert graphs() == 0
    settings._compile_all_devices = True  # type: ignore[assignment]
    answers(base, 12, compile_config=settings)  # on a cache that grows it would not
    assert graphs() == 0
    answers(base, 12, compile_config=settings, cache_implementation="static", disable_compile=True)
    assert graphs() == 0
    answers(base, 12, compile_config=settings, cache_implementation="static")
    assert graphs() > 0


@pytest.mark.long
def test_the_model_is_left_as_it_was() -> None:
    base = untied()
    own = dict(vars(base.model.model.language_model))
    memory = base.attach(config(compile=True))
    answers(base, 12, **PLAIN)
    assert graphs() > 0
    memory.detach()
    assert vars(base.model.model.language_model) == own


def test_hooks_of_others_on_the_model_hear_every_step() -> None:
    base, heard = untied(), list[int]()
    base.attach(config(compile=True, trigger="schedule:99=short"))
    handle = base.model.register_forward_hook(lambda *_: heard.append(1))
    base.generate(QUESTIONS[0], max_new_tokens=6, min_new_tokens=6, **PLAIN)
    handle.remove()
    assert len(heard) == 6


def test_what_cannot_be_compiled_says_so() -> None:
    base = untied()
    base.model.model.language_model._can_compile_fullgraph = False
    base.attach(config(compile=True))
    with pytest.raises(AttachError, match=r"Qwen2_5_VLTextModel cannot be compiled: set memory.compile=false"):
        answers(base, 4)
