"""Latents that stand where their row's images stood, compared with one pass whose positions are laid out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, internvl, llava, mini, tied
from torch import Tensor

from vismem_core import Memory
from vismem_core.base.families import find_backbone
from vismem_core.config import StageConfig, TrainConfig, load
from vismem_core.errors import AttachError
from vismem_core.training.batches import make_batch
from vismem_core.training.formation import Formation
from vismem_core.training.teacher import bring_up, likelihood
from vismem_plugins.mosaic import mosaic

PLAIN: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
BASES = [tied, mini, llava, internvl]


def one_pass(base: Base, memory: Memory, row: int, answer: list[int]) -> Tensor:
    """Logits after the prompt and after each of the answer's tokens, by a pass over all of it without a cache."""
    model, inputs = base.model, base.inputs(QUESTIONS[row])
    ids, heard = inputs["input_ids"][0], {}

    def hear(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        heard.update(embeds=kwargs["inputs_embeds"], positions=kwargs["position_ids"])

    decoder = model.model.language_model
    backbone = find_backbone(model)(model, base.processor)
    with memory.off(), torch.no_grad():
        handle = decoder.register_forward_pre_hook(hear, with_kwargs=True)
        positions = backbone.positions(inputs)
        model(**inputs, position_ids=positions, use_cache=False)
        handle.remove()
        image = torch.zeros_like(ids, dtype=torch.bool)
        for token in backbone.placeholders.values():
            image |= ids == token
        own = positions.expand(*positions.shape[:-2], 1, len(ids))[..., 0, :]
        seen, following = own[..., image], own[..., -1:] + 1
        embeds, places, ends = [heard["embeds"][0]], [own], [len(ids) - 1]
        invoked = {one.position: one.latents for one in memory.trace.row(row)}
        for at, token in enumerate(answer):
            entered = memory.tokens.vectors(torch.tensor([token]), embeds[0]) if token >= memory.tokens.first else None
            embeds.append(backbone.embed(torch.tensor([token])) if entered is None else entered)
            places.append(following)
            following = following + 1
            ends.append(sum(map(len, embeds)) - 1)
            if at in invoked:
                latents = invoked[at]
                embeds.append(latents)
                count = len(latents)
                if seen.shape[-1]:
                    picked = [number * seen.shape[-1] // count for number in range(count)]
                    places.append(seen[..., picked])
                else:
                    places.append(following + torch.arange(count))
                    following = following + count
        whole, stand = torch.cat(embeds)[None], torch.cat(places, dim=-1)
        mask = torch.full((whole.shape[1], whole.shape[1]), torch.finfo(torch.float32).min).triu(1)[None, None]
        hidden = decoder(
            inputs_embeds=whole, position_ids=stand[..., None, :], attention_mask=mask, use_cache=False
        ).last_hidden_state
        return model.lm_head(hidden[0, ends])


@pytest.mark.parametrize("make", BASES, ids=lambda own: own.__name__)
@pytest.mark.parametrize("trigger", ["schedule:0=short,5=long", "schedule:1=long,6=short", "anywhere:0.5"])
def test_decoding_equals_one_pass(make: Any, trigger: str) -> None:
    base = make()
    memory = base.attach(config(trigger=trigger, places="image"))
    output = base.generate(*QUESTIONS, max_new_tokens=12, **PLAIN)
    assert len(memory.trace) >= 4
    logits = torch.stack(output.logits, dim=1)
    for row, answer in enumerate(output.answers.tolist()):
        told = one_pass(base, memory, row, answer[:-1])
        torch.testing.assert_close(logits[row, :, : told.shape[1]], told, atol=1e-4, rtol=1e-4)
    memory.detach()
    memory = base.attach(config(trigger=trigger))
    other = torch.stack(base.generate(*QUESTIONS, max_new_tokens=12, **PLAIN).logits, dim=1)
    assert (other - logits)[..., : told.shape[1]].abs().max() > 1e-3  # it is another thing


@pytest.mark.parametrize("make", BASES, ids=lambda own: own.__name__)
@pytest.mark.parametrize("context", ["cache", "recompute"])
def test_forward_and_rows_alone_are_the_same(make: Any, context: str) -> None:
    base = make()
    memory = base.attach(config(context=context, trigger="schedule:0=long,4=short,8=long", places="image"))
    together = base.generate(*QUESTIONS, max_new_tokens=12, **PLAIN)
    logits = torch.stack(together.logits, dim=1)[..., : memory.tokens.first]
    for row, question in enumerate(QUESTIONS):
        alone = base.generate(question, max_new_tokens=12, **PLAIN)
        own = torch.stack(alone.logits, dim=1)[0, :, : memory.tokens.first]
        torch.testing.assert_close(own, logits[row], atol=1e-4, rtol=1e-4)
        inputs = base.inputs(question)
        length = inputs["input_ids"].shape[1]
        grown = {name: own for name, own in inputs.items() if name not in ("input_ids", "attention_mask")}
        for name, own in inputs.items():
            if name not in ("input_ids", "attention_mask") and getattr(own, "shape", None) == (1, length):
                grown[name] = torch.cat([own, own.new_zeros(1, 12)], dim=1)
        ids = alone.sequences
        again = memory.model(input_ids=ids, attention_mask=torch.ones_like(ids), **grown).logits[0]
        found = again[length - 1 : -1, : logits.shape[-1]]
        mine = [at for at, token in enumerate(ids[0, length:].tolist()) if token < memory.tokens.first]
        torch.testing.assert_close(found[mine], logits[row][mine], atol=1e-4, rtol=1e-4)


def test_long_memory_is_formed_where_it_will_stand() -> None:
    base = mini()
    memory = base.attach(config(trigger="schedule:0=long", places="image"))
    inputs = base.inputs(QUESTIONS[0])
    positions = memory.backbone.positions(inputs)
    image = inputs["input_ids"][0] == base.model.config.image_token_id
    picked = positions[..., 0, image][..., [number * int(image.sum()) // 5 for number in range(5)]]
    heard: list[Tensor] = []

    def hear(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] == 4 + 5:  # queries and latents
            heard.append(kwargs["position_ids"])

    handle = base.model.model.language_model.register_forward_pre_hook(hear, with_kwargs=True)
    base.generate(QUESTIONS[0], max_new_tokens=4, **PLAIN)
    handle.remove()
    (told,) = heard
    assert told[..., 0, 4:].equal(picked)
    assert told[..., 0, :4].equal(positions[..., 0, -1:] + torch.tensor([2, 3, 4, 5]))  # behind the invocation token


def test_training_sees_the_same() -> None:
    """The likelihood that Stage I raises is that of the forward pass; gradients reach what trains."""
    base = mini()
    memory = base.attach(config(trigger="policy", places="image"))
    samples = list(mosaic("train", types=["right"])[:3])
    batch = make_batch(memory.backbone, samples)
    for kind in ("short", "long"):
        forced = bring_up(memory, batch, [kind] * 3, [0, 0, 1])
        rows = [0, 1, 2]
        latents = forced.session.form(rows, memory.builder, memory.former(kind))
        end = memory.tokens.vectors(torch.full((3, 1), memory.tokens.end(kind)), latents)
        told = likelihood(memory, forced, rows, torch.cat([latents, end], dim=1))
        for row, point in zip(rows, (0, 0, 1), strict=True):
            alone = make_batch(memory.backbone, samples[row : row + 1])
            answer = alone.answers[0]
            pair = [memory.tokens.invocation(kind), memory.tokens.end(kind)]
            written = torch.tensor([[*answer[:point], *pair, *answer[point:]]])
            ids = torch.cat([alone.inputs["input_ids"], written], dim=1)
            grown = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for name, own in alone.inputs.items():
                if name not in grown:
                    typed = own.shape == alone.inputs["input_ids"].shape
                    grown[name] = torch.cat([own, own.new_zeros(written.shape)], dim=1) if typed else own
            logits = memory.model(**grown).logits[0].log_softmax(-1)
            first = alone.inputs["input_ids"].shape[1] + point + 2
            expected = [float(logits[at - 1, ids[0, at]]) for at in range(first, ids.shape[1])]
            torch.testing.assert_close(told[row, : len(expected)], torch.tensor(expected), atol=2e-4, rtol=1e-4)
    stage = Formation(memory, StageConfig(batch=3), image_dropout=1.0)
    late = make_batch(memory.backbone, list(mosaic("train", types=["right"], late=True)[:3]))
    loss, _ = stage.loss(late, "0")
    loss.backward()
    assert all(own.grad is not None and bool(own.grad.abs().sum() > 0) for _, own, _ in stage.parameters())


@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_both_stages_train(objective: str, tmp_path: Any) -> None:
    from vismem_core.training.run import train

    few = [
        f"train.{part}{stage}.{key}=2"
        for part in ("", "grpo.")
        for stage in ("formation", "invocation")
        for key in ("steps", "batch")
    ]
    settings = load(
        None,
        [
            *few,
            f"train.objective={objective}",
            "train.eval_samples=1",
            "train.grpo.group=3",
            "train.grpo.max_new_tokens=6",
        ],
    )
    base = mini()
    memory = base.attach(config(trigger="policy", places="image"))
    data = mosaic("train", types=["right", "below"])
    report = train(memory, data, mosaic("heldout", types=["right"]), settings, tmp_path)
    assert report["skipped_steps"] == 0 and isinstance(settings.train, TrainConfig)


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tied()
    with pytest.raises(AttachError, match=r"memory\.places=image is not compiled"):
        base.attach(config(places="image", compile=True))
    memory = base.attach(config(places="image"))
    monkeypatch.setattr(memory.compiler, "wanted", lambda *args: object())  # as on a GPU
    with pytest.raises(AttachError, match="is not compiled: call generate without"):
        base.generate(QUESTIONS[0], max_new_tokens=4, **PLAIN)
