"""Memory beside others: adapters of the user's own, programs that read sequences again, callers at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from vismem_core.decoding.forward import UNLIKELY, forward
from vismem_core.memory.memory import Memory

from .base import NO_END, Base, Question, staggered
from .contract import Contract, holds
from .liveliness import close

ATTACH = "vismem_core.base.adapters.Adapter"


class Company(Contract):
    """What other programs do with the model goes on beside memory."""

    @pytest.mark.parametrize("first", ["adapter", "memory"])
    @holds(
        "promise 1: a user's adapter of peft must act on the model as without memory, and on what memory is formed of, "
        "whichever came first; when it is gone, memory must be as before",
        ATTACH,
    )
    def test_foreign_adapters(self, first: str) -> None:
        questions = self.questions()[:2]
        alone = self.base()
        alone.model.requires_grad_(False)  # as peft leaves it; some kernels are chosen by it, and have other last bits
        bare = _logits(alone, questions)
        memory = alone.attach(staggered())
        before = _latents(alone, memory, questions)
        memory.detach()
        _adapted(alone)
        expected = _logits(alone, questions)
        assert not expected.equal(bare), "the adapter changes nothing, so the check says nothing"
        base = self.base()
        base.model.requires_grad_(False)
        if first == "adapter":
            adapter = _adapted(base)
            memory = base.attach(staggered())
        else:
            memory = base.attach(staggered())
            adapter = _adapted(base)
        assert _logits(base, questions).equal(expected), "the model with the adapter is another one with memory"
        beside = _latents(base, memory, questions)
        adapter.unload()
        without = _latents(base, memory, questions)
        assert not _same(beside, without), "the adapter does not act where memory is formed"
        assert _same(before, without), "memory is another one after the adapter has come and gone"
        memory.detach()
        assert _logits(base, questions).equal(bare), "something is left when both are gone"

    @holds(
        "promise 5: forward on sequences that hold memory tokens must give the logits that their decoding had",
        "vismem_core.decoding.forward.forward",
    )
    def test_forward_equals_decoding(self) -> None:
        base, questions = self.base(), self.questions()
        memory = base.attach(staggered())
        output = base.generate(*questions)
        assert len(memory.trace) >= len(questions), "memory was hardly invoked"
        whole, prompts = output.sequences, base.inputs(*questions)
        inputs, (_, begin) = dict(prompts), prompts["input_ids"].shape
        for name, own in prompts.items():
            if isinstance(own, Tensor) and own.shape == prompts["input_ids"].shape:
                fill = own.new_full(output.answers.shape, int(name == "attention_mask"))
                inputs[name] = torch.cat([own, fill], dim=1)
        inputs["input_ids"] = whole
        labels = whole.masked_fill(torch.arange(whole.shape[1], device=whole.device) < begin, -100)
        with torch.no_grad():
            told: Any = forward(memory, **inputs, labels=labels, finished=True)
        got = told.logits[:, begin - 1 : -1].log_softmax(-1)
        expected = torch.stack(output.scores, dim=1).clamp(min=UNLIKELY).log_softmax(-1)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
        assert told.loss.isfinite(), "the loss is not finite"
        base.model(**inputs, labels=labels).loss.backward()
        parts = {name.split(".")[0] for name, own in memory.trained().items() if own.grad is not None}
        assert parts >= {"builder", "short", "long"}, f"gradients reach {parts or 'nothing'} alone"

    @holds(
        "promise 3: what a call leaves on the model must not reach the next one, whatever its batch",
        "vismem_core.base.backbone.Backbone.positions",
    )
    @torch.no_grad()
    def test_earlier_calls_leave_nothing(self) -> None:
        base, questions = self.base(), self.questions()
        memory, inputs = base.attach(staggered()), base.inputs(*questions)
        positions, output = base.backbone.positions(inputs), base.generate(*questions)
        latents = [own.latents for own in memory.trace.invocations]
        for others in (questions[1:], questions[:1]):
            base.generate(*others)
            assert base.backbone.positions(inputs).equal(positions), "positions differ after another call"
        again = base.generate(*questions)
        assert again.sequences.equal(output.sequences), "it answers otherwise after another call"
        for own, before in zip(memory.trace.invocations, latents, strict=True):
            close(own.latents, before, f"row {own.row} forms other memory after another call")

    @holds(
        "calls of one model at the same time must each get the answer that they get alone, under switches of their own",
        "vismem_core.decoding.turn and vismem_core.memory.memory.Memory.off",
    )
    def test_calls_at_once(self) -> None:
        base, questions = self.base(), self.questions()[:2]
        memory = base.attach(staggered())
        inputs = [base.inputs(own) for own in questions]

        def answer(number: int) -> list[Any]:
            ids = base.model.generate(**inputs[number % 2], max_new_tokens=8, do_sample=False, **NO_END)
            return [ids.tolist(), [(own.kind, own.position) for own in memory.trace.invocations]]

        alone = [answer(number) for number in range(2)]
        assert all(trace for _, trace in alone), "memory was not invoked"
        with memory.off():
            quiet = answer(0)
        inside, done, got = threading.Event(), threading.Event(), []

        def silent() -> None:
            with memory.off():
                inside.set()
                done.wait(60)
                got.append(answer(0))

        thread = threading.Thread(target=silent)
        thread.start()
        inside.wait(60)
        got.append(answer(0))
        done.set()
        thread.join()
        assert got == [alone[0], quiet], "what one thread switches off is switched off in another"
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(answer, range(8)))
        wrong = [number for number, own in enumerate(together) if own != alone[number % 2]]
        assert not wrong, f"calls {wrong} of 8 got another answer or trace than alone"


def _adapted(base: Base) -> Any:
    torch.manual_seed(1)
    targets = base.backbone.lora_targets["long"]
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model.eval()


@torch.no_grad()
def _logits(base: Base, questions: list[Question]) -> Tensor:
    logits: Tensor = base.model(**base.inputs(*questions)).logits
    return logits


def _latents(base: Base, memory: Memory, questions: list[Question]) -> list[Tensor]:
    with memory.triggered("schedule:0=short,3=long"):
        base.generate(*questions, max_new_tokens=8)
    return [own.latents.clone() for own in memory.trace.invocations]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
