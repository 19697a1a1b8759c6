"""LoRA adapters on a live model: off unless asked for, each by itself, gone without trace."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config
from torch import Tensor, nn

from vismem_core.base.adapters import Adapter
from vismem_core.errors import AttachError

EYE, TONGUE = r"eye\.\d", r"tongue\.\d"


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eye, self.tongue = (nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.eye[1](self.eye[0](states))
        return seen, self.tongue[1](self.tongue[0](states))


def adapter(model: nn.Module, name: str, targets: str) -> Adapter:
    made = Adapter(model, name, targets, rank=2, alpha=4, dropout=0.5)
    with torch.no_grad():
        for weight in made.parameters().values():
            weight.normal_()
    return made


def by_hand(model: Towers, made: Adapter, path: str, states: Tensor) -> Tensor:
    weights = made.parameters()
    linear = model.get_submodule(path)
    plain = nn.functional.linear(states, linear.weight, linear.bias)  # type: ignore[arg-type]
    return plain + 2.0 * (states @ weights[f"{path}.lora_A"].T @ weights[f"{path}.lora_B"].T)


@pytest.mark.parametrize("targets", [TONGUE, EYE], ids=["apart", "same layers"])
def test_each_adapter_by_itself(targets: str) -> None:
    """Two adapters, on layers of their own or on the same ones."""
    model, states = Towers(), torch.randn(3, 4)
    plain = model(states)
    first, second = adapter(model, "first", EYE), adapter(model, "second", targets)
    tower = targets[:-4]
    for made, own in ((first, "eye"), (second, tower), (first, "eye")):
        assert all(map(torch.equal, model(states), plain))
        with made.on():
            got = dict(zip(("eye", "tongue"), model(states), strict=True))
        expected = by_hand(model, made, f"{own}.1", by_hand(model, made, f"{own}.0", states))
        torch.testing.assert_close(got[own], expected)
        other = "tongue" if own == "eye" else "eye"
        assert got[other].equal(dict(zip(("eye", "tongue"), plain, strict=True))[other])
    with pytest.raises(RuntimeError), first.on():
        raise RuntimeError
    assert all(map(torch.equal, model(states), plain))


def test_the_model_is_its_own_at_any_time() -> None:
    model = Towers()
    model.eye[0].requires_grad_(False)

    def photograph() -> Any:
        modules = [(name, id(module)) for name, module in model.named_modules()]
        flags = [(name, id(own), own.requires_grad) for name, own in model.named_parameters()]
        return modules, flags, list(model.state_dict()), [sorted(vars(module)) for module in model.modules()]

    before = photograph()
    made = [adapter(model, "first", EYE), adapter(model, "second", TONGUE)]
    assert photograph() == before
    for own in made:
        own.eject()
    assert photograph() == before
    assert not any(module._forward_hooks for module in model.modules())


def test_which_adapters_are_on_belongs_to_a_thread() -> None:
    model, states = Towers(), torch.randn(3, 4)
    made, told = adapter(model, "first", EYE), []
    plain = model(states)[0]
    with made.on():
        thread = threading.Thread(target=lambda: told.append(model(states)[0]))
        thread.start()
        thread.join()
        assert not model(states)[0].equal(plain)
    assert told[0].equal(plain)


def test_a_model_is_copied_and_stored_without_its_memory() -> None:
    model, states = Towers(), torch.randn(3, 4)
    made = adapter(model, "first", EYE)
    plain = model(states)[0]
    stored = pickle.loads(pickle.dumps(model))
    with made.on():
        assert not model(states)[0].equal(plain)
        assert stored(states)[0].equal(plain)


def test_dropout_belongs_to_the_adapter() -> None:
    model, states = Towers().train(), torch.ones(64, 4)
    made = adapter(model, "first", EYE)
    with made.on():
        assert model(states)[0].equal(model(states)[0])
        made.train(True)
        assert not model(states)[0].equal(model(states)[0])
    assert model.eye[0].training
    assert all(weight.dtype == torch.float32 for weight in made.parameters().values())


@pytest.mark.parametrize("targets", ["nose", "eye", r"eye(\.0)?"])
def test_targets_that_do_not_fit(targets: str) -> None:
    model = Towers()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(AttachError, match="do not fit this model") as error:
        adapter(model, "first", targets)
    assert "\n" not in str(error.value)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_loras_are_off_outside_of_formation(base: Base) -> None:
    inputs = base.inputs(*QUESTIONS)
    with torch.no_grad():
        plain = base.model(**inputs).logits
        base.attach(config(trigger="schedule:0=long,3=short"))
        assert base.model(**inputs).logits.equal(plain)
        base.generate(*QUESTIONS)
        assert base.model(**inputs).logits.equal(plain)
