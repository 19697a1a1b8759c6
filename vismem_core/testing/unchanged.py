"""Promise 1: off or never invoked, the base model bit for bit; detached, the model as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Base, Question, staggered
from .contract import Contract, holds

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 0}


class Unchanged(Contract):
    """Memory that is not asked leaves no trace."""

    @holds(
        "promise 1: with memory off, never invoked or detached, tokens and logits must be the base model's bit for bit",
        "vismem_core.memory.memory.Memory.off",
    )
    def test_off_and_never_are_the_base(self) -> None:
        base, questions = self.base(), self.questions()
        plain = _answers(base, questions)
        memory = base.attach(staggered())
        invoked = _answers(base, questions)
        assert len(memory.trace), "memory was never invoked"
        assert not invoked[0].equal(plain[0]), "memory changes nothing"
        with memory.off():
            _equal(_answers(base, questions), plain, "off")
        with memory.triggered("never"):
            _equal(_answers(base, questions), plain, "never invoked")
        memory.detach()
        _equal(_answers(base, questions), plain, "detached")

    @holds(
        "promise 1: the decoding loop, where memory may not be invoked, must give the base model's logits bit for bit",
        "vismem_core.decoding.loop.Decoder",
    )
    def test_the_loop_itself_is_the_base(self) -> None:
        base, questions = self.base(), self.questions()
        plain = base.generate(*questions)
        memory = base.attach("policy", budget=0)
        quiet = base.generate(*questions)
        assert quiet.logits[0].shape[1] == memory.tokens.first + 4, "it is not memory's loop that ran"
        assert quiet.sequences.equal(plain.sequences), "its tokens differ"
        for step, (before, after) in enumerate(zip(plain.logits, quiet.logits, strict=True)):
            assert after[:, : before.shape[1]].equal(before), f"its logits differ at step {step}"

    @holds(
        "promise 1: memory must not change weights and modules of the base, and detach() must restore its flags and "
        "vocabulary",
        "vismem_core.memory.memory.Memory.detach",
    )
    def test_detached_as_it_was(self) -> None:
        base, questions = self.base(), self.questions()
        next(base.model.parameters()).requires_grad_(False)
        base.generate(*questions)  # the base's own ``generate`` may leave something behind
        before, weights = _photograph(base), base.weights()
        for context in ("cache", "recompute")[: 1 + base.backbone.rereads]:
            memory = base.attach(staggered(), context=context)
            attached = _photograph(base)
            assert attached["hooks"] != before["hooks"], "attaching leaves no hook: memory has no way in"
            assert attached["modules"] == before["modules"], "attaching changes the model's modules"
            base.generate(*questions)
            assert {own.kind for own in memory.trace.invocations} == {"short", "long"}, "memory was not invoked"
            _unchanged(attached, _photograph(base), "a call changes")
            _equal(list(base.weights().values()), list(weights.values()), "invoked")
            memory.detach()
            _unchanged(before, _photograph(base), "detach() does not restore")
            _equal(list(base.weights().values()), list(weights.values()), "detached")


def _answers(base: Base, questions: list[Question]) -> list[Tensor]:
    """Ids, logits and scores of greedy and of sampled answers."""
    found: list[Tensor] = []
    for options in ({}, SAMPLING):
        torch.manual_seed(3)
        output = base.generate(*questions, **options)
        found += [output.sequences, torch.stack(output.logits), torch.stack(output.scores)]
    return found


def _equal(got: list[Tensor], expected: list[Tensor], when: str) -> None:
    assert all(map(torch.equal, got, expected)), f"it differs when {when}"


def _photograph(base: Base) -> dict[str, Any]:
    """All but the weights that attaching could change about a model and its tokenizer."""
    model, tokenizer = base.model, base.processor.tokenizer
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(own), own.requires_grad, own.dtype) for name, own in model.named_parameters()},
        "keys": list(model.state_dict()),
        "hooks": {(name, kind): len(getattr(own, kind)) for name, own in model.named_modules() for kind in HOOKS},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "tokenizer": id(tokenizer._tokenizer),
        "vocabulary": tokenizer.get_vocab(),
        "generate": getattr(model.generate, "__func__", None),
    }


def _unchanged(before: dict[str, Any], after: dict[str, Any], what: str) -> None:
    odd = [part for part in before if before[part] != after[part]]
    assert not odd, f"{what} the model's {', '.join(odd)}"
