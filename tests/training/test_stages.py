"""Promise 6: a step changes what trains and nothing else; and Stage I's loss is the likelihood it says it is."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from bases import Base, config, mini, tied, untied
from reference import long_latents, one_pass, query, short_latents
from samples import SAMPLES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vismem_core import Invocation, Memory, Trace
from vismem_core.config import GrpoConfig, Kind, PolicyConfig, StageConfig, TrainConfig
from vismem_core.files.samples import Sample
from vismem_core.training import formation as stages
from vismem_core.training.batches import Batch, make_batch
from vismem_core.training.formation import Formation
from vismem_core.training.formation_grpo import FormationGrpo
from vismem_core.training.invocation import InvocationStage
from vismem_core.training.invocation_grpo import InvocationGrpo


def told(
    memory: Memory, kinds: list[Kind], points: list[int], patch: pytest.MonkeyPatch, dropout: float = 0.0
) -> Callable[[Batch], torch.Tensor]:
    """Stage I's loss with the kinds and points of a test's choice."""

    def loss(batch: Batch) -> torch.Tensor:
        rng, places, draws = Random(0), iter(points), iter(kinds)
        rng.choice = lambda options: next(draws)  # type: ignore[method-assign, assignment]
        patch.setattr(stages, "Random", lambda key: rng)
        patch.setattr(stages, "invocation_point", lambda *args: next(places))
        return Formation(memory, StageConfig(anywhere=0.5), image_dropout=dropout).loss(batch, "")[0]

    return loss


def formation(memory: Memory) -> Formation:
    return Formation(memory, StageConfig(anywhere=0.5))


def invocation(memory: Memory) -> InvocationStage:
    return InvocationStage(memory, TrainConfig())


GRPO = TrainConfig(grpo=GrpoConfig(rewards=("call:samples:even",), group=4, max_new_tokens=10))


def formation_grpo(memory: Memory) -> FormationGrpo:
    return FormationGrpo(memory, GRPO)


def invocation_grpo(memory: Memory) -> InvocationGrpo:
    return InvocationGrpo(memory, GRPO)


STAGES = [formation, invocation, formation_grpo, invocation_grpo]


@pytest.mark.parametrize("make", [tied, untied, mini])
@pytest.mark.parametrize("start", STAGES)
@pytest.mark.parametrize(
    "settings",
    [
        config(),
        config(context="recompute"),
        config("transformer", builder="cross"),
        config(policy=PolicyConfig("lora", rank=4)),
    ],
)
def test_what_trains_changes_and_nothing_else(make: Any, start: Any, settings: Any) -> None:
    base = make()
    memory = base.attach(settings)
    stage, batch = start(memory), make_batch(memory.backbone, SAMPLES)
    memory.trigger = "policy"
    trained = {name: tensor for name, tensor, _ in stage.parameters()}
    before = {name: tensor.clone() for name, tensor in memory.trained().items()}
    model = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    for step in range(3):  # a fresh LoRA's A has no gradient until B has moved; a batch may hold one kind alone
        optimizer.zero_grad()
        stage.accumulate(batch, str(step), step / 3)
        optimizer.step()
        stage.stepped()
    after = memory.trained()
    assert {name for name in after if not after[name].equal(before[name])} == set(trained)
    assert all(own.isfinite().all() for own in after.values())
    now = base.model.state_dict()
    assert [name for name in model if not now[name].equal(model[name])] == []
    assert all(own.requires_grad and own.grad is None for own in base.model.parameters())


class Copies(TorchDispatchMode):
    """Notes operations that make a tensor of a weight's shape from that weight, or lay it out for each row."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.shapes = {own.untyped_storage().data_ptr(): own.shape for own in model.parameters() if own.ndim > 1}
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):  # activations
            return result
        places = {own.untyped_storage().data_ptr() for own in tree_leaves((args, kwargs)) if torch.is_tensor(own)}
        shapes = {self.shapes[place] for place in places & self.shapes.keys()}
        if func.overloadpacket is torch.ops.aten.bmm and shapes:
            self.made.append(str(func))
        for own in tree_leaves(result):
            if torch.is_tensor(own) and own.untyped_storage().data_ptr() not in places and own.shape in shapes:
                self.made.append(str(func))
        return result


@pytest.mark.parametrize("start", STAGES)
def test_no_second_copy_of_the_base_is_held(start: Any) -> None:
    base = untied()
    copies = Copies(base.model)
    with copies:
        base.model.lm_head.weight.detach().clone()
        torch.nn.functional.linear(torch.zeros(2, 3, 32)[:, :2], base.model.lm_head.weight.detach())
    assert copies.made == ["aten.clone.default", "aten.bmm.default"]
    copies.made.clear()
    memory = base.attach(config(policy=PolicyConfig("lora", rank=4)))
    memory.trigger = "policy"
    with copies:
        stage, batch = start(memory), make_batch(memory.backbone, SAMPLES)
        for step in range(2):
            stage.accumulate(batch, str(step), step / 2)
            stage.stepped()
    assert copies.made == []


def test_every_trained_tensor_belongs_to_one_stage() -> None:
    memory = tied().attach()
    first, second, *grpo = ({name for name, _, _ in start(memory).parameters()} for start in STAGES)
    rows = {"tokens.invoke", "tokens.close", "tokens.head"}
    assert first | rows == set(memory.trained()) and not first & rows
    assert second == {"tokens.head"}
    assert grpo == [first, rows]


@pytest.mark.parametrize("make", [tied, untied, mini])
@pytest.mark.parametrize("kind", ["short", "long"])
@pytest.mark.parametrize(("context", "hidden"), [("cache", False), ("recompute", False), ("cache", True)])
def test_stage_one_is_the_answers_likelihood(
    make: Any, kind: Kind, context: str, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pristine, base = make(), make()
    memory = base.attach(config(context=context))
    batch = make_batch(memory.backbone, SAMPLES)
    points = [0, 1, 2, len(batch.answers[3]) - 1]
    with torch.no_grad():
        loss = told(memory, [kind] * 4, points, monkeypatch, float(hidden))(batch)
    rows = zip(SAMPLES, batch.answers, points, strict=True)
    losses = [nll(pristine, base, memory, *own, kind, context, hidden) for own in rows]
    torch.testing.assert_close(loss, torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def nll(
    pristine: Base,
    base: Base,
    memory: Memory,
    sample: Sample,
    answer: list[int],
    point: int,
    kind: Kind,
    context: str,
    hidden: bool,
) -> torch.Tensor:
    """Per token, of the answer from ``point`` on, memory being invoked there; one row, one pass, no cache."""
    inputs = base.inputs((sample.prompt, sample.load_images()))
    pair = [memory.tokens.invocation(kind), memory.tokens.end(kind)]
    memory.trace = Trace()
    sequence = one_pass(memory, inputs, [*answer[:point], pair[0]])
    end = sequence.places[-1]
    asked = query(memory, sequence, sequence.places[0], end)
    if kind == "long":
        latents = long_latents(pristine.model, memory, sequence, asked, end, context)
    else:
        latents = short_latents(pristine.model, memory, inputs, asked, context)
    memory.trace = Trace([Invocation(0, kind, point, latents)])
    whole = [*answer[:point], *pair, *answer[point:]]
    logits = one_pass(memory, inputs, whole, hidden=hidden).logits[point + 2 :]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer[point:]), reduction="none")


@pytest.mark.parametrize("context", ["cache", "recompute"])
def test_gradients_are_those_of_the_loss(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along the gradient of each trained tensor, the loss rises as fast as finite differences say."""
    memory = tied().attach(config(context=context))
    batch = make_batch(memory.backbone, SAMPLES)
    loss = told(memory, ["short", "long", "short", "long"], [0, 1, 2, 3], monkeypatch)
    trained = formation(memory).parameters()
    loss(batch).backward()
    for name, tensor, _ in trained:
        assert tensor.grad is not None, name
        slope = tensor.grad.norm()
        direction, step = tensor.grad / slope, 1e-3 * tensor.detach().norm()
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                tensor += sign * step * direction
                values.append(loss(batch).double())
            tensor += step * direction
        measured = (values[0] - values[1]) / (2 * step)
        assert measured.item() == pytest.approx(slope.item(), rel=0.05, abs=5e-3), name
