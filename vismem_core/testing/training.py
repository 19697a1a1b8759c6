"""Promises 5 to 7: replays, training steps, and trained memory on disk."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vismem_core.base import cache as kv
from vismem_core.config import StageConfig
from vismem_core.decoding.replay import read_prompts
from vismem_core.errors import CheckpointError
from vismem_core.files.card import CARD
from vismem_core.files.checkpoint import ABOUT, WEIGHTS
from vismem_core.files.samples import Sample

from ..training.batches import make_batch
from ..training.formation import Formation
from ..training.replay import TrajectoryReplay
from ..training.rollout import Sampling, rollouts
from .base import Base, staggered
from .contract import Contract, holds

ANSWERS = ("a bag , a coat .", "boot", "the coat , the bag , the boot .", "a boot , what ?")


class Training(Contract):
    """Memory is trained through the same doors by which it is used."""

    @pytest.mark.parametrize(("context", "dropout"), [("cache", 0.0), ("recompute", 0.0), ("cache", 0.5)])
    @holds(
        "promise 5: log-probabilities of a replayed trajectory must equal those of its rollout",
        "vismem_core.base.backbone.Backbone.positions and .continue_",
    )
    def test_replay_equals_rollout(self, context: str, dropout: float) -> None:
        base, questions = self.base(), self.questions()
        self.rereading(base, context)
        memory = base.attach(staggered("policy"), context=context)
        prompts = read_prompts(memory, base.inputs(*questions))
        if dropout and not kv.whole(prompts.session.cache):
            pytest.skip("images cannot be hidden from sliding windows and states")
        copies = [row for row in range(len(questions)) for _ in range(2)]
        sampling = Sampling(temperature=0.9, max_new_tokens=14, image_dropout=dropout)
        trajectories = rollouts(memory, prompts, copies, range(len(copies)), sampling)
        assert sum(len(own.latents) for own in trajectories) >= len(copies), "memory was hardly invoked"
        for form in (True, False):
            with torch.no_grad():
                replayed = TrajectoryReplay(memory, prompts, trajectories, sampling.temperature).logprobs(form=form)
            for row, own in enumerate(trajectories):
                got, expected = replayed[row, : len(own.ids)].cpu(), torch.tensor(own.logprobs)
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        for own in trajectories:  # the latents do matter
            own.latents = {index: torch.zeros_like(latents) for index, latents in own.latents.items()}
        with torch.no_grad():
            other = TrajectoryReplay(memory, prompts, trajectories, sampling.temperature).logprobs(form=False)
        assert (other - replayed).abs().max() > 1e-2, "latents make no difference"

    @holds(
        "promise 5: rollouts must write no ids that stand for images, which would be taken for some when read again",
        "vismem_core.base.backbone.Backbone.media",
    )
    def test_rollouts_write_no_media(self) -> None:
        base, questions = self.base(), self.questions()
        known = range(len(base.backbone.head.weight))
        media = [token for token in base.backbone.placeholders.values() if token in known]
        if not media:
            pytest.skip("the model cannot write such ids")
        memory, index = base.attach(staggered("policy")), torch.tensor(media, device=base.device)
        base.backbone.head.register_forward_hook(lambda module, args, output: output.index_fill(-1, index, 1e4))
        with memory.off():
            assert base.generate(questions[0], max_new_tokens=1).answers.item() in media, "they are not the likeliest"
        rows = range(len(questions))
        trajectories = rollouts(
            memory, read_prompts(memory, base.inputs(*questions)), rows, rows, Sampling(1.0, 1.0, 6)
        )
        written = {token for own in trajectories for token in own.ids}
        assert not written & set(media), f"they wrote {written & set(media)}"

    @pytest.mark.parametrize("context", ["cache", "recompute"])
    @holds(
        "promise 6: a training step must change every tensor that trains and nothing else",
        "vismem_core.training.formation.Formation and vismem_core.base.backbone.Backbone.lora_targets",
    )
    def test_what_trains_changes_and_nothing_else(self, context: str) -> None:
        base = self.base()
        self.rereading(base, context)
        memory = base.attach(context=context)
        rows = enumerate(zip(self.questions(), ANSWERS, strict=False))
        batch = make_batch(
            memory.backbone, [Sample(str(at), tuple(images), text, told) for at, ((text, images), told) in rows]
        )
        stage = Formation(memory, StageConfig(anywhere=0.5))
        trained = {name: tensor for name, tensor, _ in stage.parameters()}
        before = {name: tensor.clone() for name, tensor in memory.trained().items()}
        weights, optimizer = base.weights(), torch.optim.SGD(trained.values(), lr=0.1)
        for step in range(3):  # a batch may hold one kind alone
            stage.accumulate(batch, str(step), step / 3)
        optimizer.step()
        after = memory.trained()
        still = [name for name in trained if after[name].equal(before[name])]
        assert not still, f"{still[0]} has not changed"
        odd = [name for name in after.keys() - trained.keys() if not after[name].equal(before[name])]
        assert not odd, f"{odd} changed and does not train in this stage"
        now = base.weights()
        assert [name for name in weights if not now[name].equal(weights[name])] == [], "the base's weights changed"
        graded = [name for name, own in base.model.named_parameters() if own.grad is not None]
        assert not graded, f"{graded} of the base got a gradient"

    @holds(
        "promise 7: a checkpoint must hold what was trained and no more, and give the same memory again",
        "vismem_core.files.checkpoint.save",
    )
    def test_checkpoints_round_trip(self) -> None:
        base, questions = self.base(), self.questions()
        memory = base.attach(staggered())
        expected = base.generate(*questions)
        with TemporaryDirectory() as folder:
            memory.save(folder)
            trained = set(memory.trained())
            memory.detach()
            assert {path.name for path in Path(folder).iterdir()} == {ABOUT, WEIGHTS, CARD}
            assert set(load_file(Path(folder, WEIGHTS))) == trained, "it holds something else than what was trained"
            about: dict[str, Any] = json.loads(Path(folder, ABOUT).read_text(encoding="utf-8"))["base"]
            assert about["backbone"] == base.family.name, "it does not name its backbone"
            fresh = base.attach(staggered())
            with torch.no_grad():
                for tensor in fresh.trained().values():
                    tensor.zero_()
            assert not torch.stack(base.generate(*questions).logits).equal(torch.stack(expected.logits))
            fresh.detach()
            base.attach(staggered(), source=Path(folder))
            output = base.generate(*questions)
        assert output.sequences.equal(expected.sequences), "the memory read back answers otherwise"
        assert torch.stack(output.logits).equal(torch.stack(expected.logits))

    @holds("promise 7: a checkpoint must refuse a base that it does not fit", "vismem_core.files.checkpoint.read")
    def test_checkpoints_refuse_other_bases(self) -> None:
        base = self.base()
        with TemporaryDirectory() as folder:
            memory = base.attach()
            memory.save(folder)
            memory.detach()
            assert not _refused(base, folder), "its own base is refused"
            description = Path(folder, ABOUT)
            fitting = description.read_text(encoding="utf-8")
            for key in ("backbone", "width", "vision_width", "vocabulary"):
                about = json.loads(fitting)
                about["base"][key] = "another"
                description.write_text(json.dumps(about), encoding="utf-8")
                assert _refused(base, folder), f"one made for another {key} is taken"
            description.write_text(fitting, encoding="utf-8")
            with torch.no_grad():
                base.backbone.embeddings.weight[:8] += 1.0
            assert _refused(base, folder), "one made for other weights is taken"


def _refused(base: Base, folder: str) -> bool:
    try:
        base.attach(source=Path(folder)).detach()
    except CheckpointError:
        return True
    return False
