"""Promise 5: a replayed trajectory has the log-probabilities of its rollout; and its gradients are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import Base, config, internvl, llava, llava_next, llava_onevision, mini, tied, untied
from replays import gradients, recorded, told
from samples import SAMPLES
from torch import Tensor

from vismem_core.decoding.replay import read_prompts
from vismem_core.errors import AttachError
from vismem_core.training.batches import make_batch
from vismem_core.training.replay import TrajectoryReplay, micro_batches
from vismem_core.training.rollout import Trajectory
from vismem_core.training.teacher import bring_up, likelihood

SETTINGS = {
    "cache": config(trigger="policy"),
    "recompute": config(context="recompute", trigger="policy"),
    "transformer": config("transformer", builder="cross", trigger="policy"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("trigger", ["policy", "anywhere:0.2"])
@pytest.mark.parametrize("make", [tied, untied, mini])
def test_a_replay_says_what_the_rollout_said(make: Any, settings: Any, trigger: str) -> None:
    memory = make().attach(settings)
    with torch.no_grad():
        memory.tokens.head *= 4.0
    read, trajectories = told(memory, trigger, 1.5)
    assert sum(len(own.latents) for own in trajectories) > 4
    assert max(len(own.latents) for own in trajectories) > 1
    for form in (True, False):
        replayed = TrajectoryReplay(memory, read, trajectories, 1.5).logprobs(form=form)
        torch.testing.assert_close(replayed, recorded(trajectories), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make", [tied, untied, mini, llava, llava_next, llava_onevision, internvl])
def test_a_replay_hides_the_images_that_the_rollout_hid(make: Any, settings: Any) -> None:
    """Some trajectories drop them and others of the same prompt do not, each from its own first invocation on."""
    memory = make().attach(settings)
    read, trajectories = told(memory, "anywhere:0.4", 1.5, 0.5)
    hidden = [own.drops_images for own in trajectories if own.latents]
    assert any(hidden) and not all(hidden)
    assert max(len(own.latents) for own in trajectories if own.drops_images) > 1
    for form in (True, False):
        replayed = TrajectoryReplay(memory, read, trajectories, 1.5).logprobs(form=form)
        torch.testing.assert_close(replayed, recorded(trajectories), atol=1e-4, rtol=1e-4)
    for own in trajectories:
        own.drops_images = False
    seeing = TrajectoryReplay(memory, read, trajectories, 1.5).logprobs(form=False)
    assert not torch.allclose(seeing, recorded(trajectories), atol=1e-2)


def test_hidden_images_need_an_attention_that_can_hide_them() -> None:
    memory = tied().attach(SETTINGS["cache"])
    read, trajectories = told(memory, "anywhere:0.2", dropout=1.0)
    memory.backbone.decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AttachError, match="attn_implementation='sdpa'"):
        TrajectoryReplay(memory, read, trajectories).logprobs(form=False)


def test_memory_that_changed_says_something_else() -> None:
    memory = tied().attach(SETTINGS["cache"])
    read, trajectories = told(memory, "anywhere:0.2")
    before = TrajectoryReplay(memory, read, trajectories).logprobs(form=True)
    with torch.no_grad():
        for name, tensor in memory.trained().items():
            if not name.startswith("tokens."):
                tensor *= 1.3
    after, kept = (TrajectoryReplay(memory, read, trajectories).logprobs(form=form) for form in (True, False))
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(kept, before, atol=1e-4, rtol=1e-4)  # the rollout's own latents


def test_gradients_of_one_invocation_are_those_of_teacher_forcing() -> None:
    """The same answer with memory at the same point, through two different roads."""
    base: Base = tied()
    memory = base.attach(SETTINGS["cache"])
    batch = make_batch(memory.backbone, SAMPLES)
    read = read_prompts(memory, batch.inputs)
    media = torch.tensor(list(memory.backbone.placeholders.values()))  # trajectories hold none
    memory.backbone.head.register_forward_hook(lambda module, args, output: output.index_fill(-1, media, -1e4))
    for kind in ("short", "long"):
        forced = bring_up(memory, batch, [kind] * 4, [0] * 4)  # type: ignore[list-item]
        rows = list(range(4))
        latents = forced.session.form(rows, memory.builder, memory.former(kind))  # type: ignore[arg-type]
        end = memory.tokens.vectors(torch.full((4, 1), memory.tokens.end(kind)), latents)  # type: ignore[arg-type]
        taught = likelihood(memory, forced, rows, torch.cat([latents, end.detach()], dim=1))
        trajectories = []
        for row, answer in enumerate(batch.answers):
            pair = [memory.tokens.invocation(kind), memory.tokens.end(kind)]  # type: ignore[arg-type]
            own = Trajectory(row, [*pair, *answer], latents={0: latents[row].detach()})
            own.chosen = [False, False, *[True] * len(answer)]
            own.offered = [[False, False]] * len(own.ids)
            trajectories.append(own)
        replayed = TrajectoryReplay(memory, read, trajectories).logprobs(form=True)
        torch.testing.assert_close(replayed[:, 2:], taught, atol=1e-4, rtol=1e-4)
        ours, theirs = (gradients(memory, own.sum()) for own in (replayed, taught))
        checked = [name for name in theirs if name.startswith((f"{kind}.", "builder."))]
        assert len(checked) > 10
        for name in checked:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-3, rtol=2e-3, msg=name)


def test_parts_add_up_to_the_whole() -> None:
    memory = tied().attach(SETTINGS["cache"])
    read, trajectories = told(memory, "anywhere:0.2")
    parts = list(micro_batches(trajectories, range(12), 20, 140))
    assert len(parts) > 2 and sorted(row for part in parts for row in part) == list(range(12))
    for part in parts:  # prompts of 20 columns count for every row
        assert len(part) * (20 + max(trajectories[row].slots[-1] for row in part)) <= 140
    whole = gradients(memory, TrajectoryReplay(memory, read, trajectories).logprobs(form=True).sum())
    sums: dict[str, Tensor] = {}
    for part in parts:
        own = TrajectoryReplay(memory, read, [trajectories[row] for row in part]).logprobs(form=True).sum()
        for name, grad in gradients(memory, own).items():
            sums[name] = sums.get(name, torch.zeros_like(grad)) + grad
    for name, grad in whole.items():
        torch.testing.assert_close(sums[name], grad, atol=1e-3, rtol=1e-3)


def test_checkpointing_changes_memory_use_and_nothing_else() -> None:
    memory = tied().attach(SETTINGS["cache"])
    read, trajectories = told(memory, "anywhere:0.2")
    kept: list[list[int]] = []
    results = []
    for checkpointing in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda own, s=sizes: s.append(own.numel()) or own, lambda own: own
        ):
            logprobs = TrajectoryReplay(memory, read, trajectories, checkpointing=checkpointing).logprobs(form=True)
        kept.append(sizes)
        results.append((logprobs.detach(), gradients(memory, logprobs.sum())))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, atol=1e-5, rtol=1e-4)
    assert sum(kept[1]) < 0.85 * sum(kept[0])
    assert not any("forward" in vars(module) for module in memory.backbone.decoder.modules())
