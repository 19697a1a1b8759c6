"""Memory on a base that is not on the CPU, or on two devices: the same numbers, and tensors of both never mix.

Run by test_devices.py in processes of their own, since torch registers a device for good.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks
from bases import FAMILIES, QUESTIONS, Base, config, tied, untied
from elsewhere import Far, devices
from samples import SAMPLES
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vismem_core import Memory
from vismem_core.base.families import find_backbone
from vismem_core.config import GrpoConfig, MemoryConfig, PolicyConfig, StageConfig, TrainConfig
from vismem_core.errors import AttachError
from vismem_core.training.batches import make_batch
from vismem_core.training.formation import Formation
from vismem_core.training.formation_grpo import FormationGrpo
from vismem_core.training.invocation import InvocationStage
from vismem_core.training.invocation_grpo import InvocationGrpo
from vismem_core.training.stage import Stage

GRPO = TrainConfig(grpo=GrpoConfig(rewards=("call:samples:even",), group=4, max_new_tokens=10))
STAGES: dict[str, Callable[[Memory], Stage]] = {
    "formation": lambda memory: Formation(memory, StageConfig(anywhere=0.5)),
    "invocation": lambda memory: InvocationStage(memory, TrainConfig()),
    "formation, GRPO": lambda memory: FormationGrpo(memory, GRPO),
    "invocation, GRPO": lambda memory: InvocationGrpo(memory, GRPO),
}


OTHERWISE: dict[str, Any] = {"name": "transformer", "builder": "cross", "drop_image_after_invocation": True}


def whole(base: Base) -> None:
    base.model.to("far:0")


def spread(base: Base) -> None:
    """As ``device_map`` spreads a base over two GPUs; here both towers' ends stay on the CPU."""
    backbone = find_backbone(base.model)(base.model, base.processor)
    targets = [path for path, _ in base.model.named_modules() if re.fullmatch(backbone.lora_targets["short"], path)]
    block = re.match(r".*\.\d+(?=\.)", targets[-1])
    assert block
    late: list[Any] = [base.model.get_submodule(block[0]), backbone.decoder.layers[-1], backbone.decoder.norm]  # type: ignore[index]
    head = base.model.get_output_embeddings()
    if head.weight is not base.model.get_input_embeddings().weight:
        late.append(head)
    places = dict(_places(base.model, late))
    for path, module in base.model.named_modules():
        if places.get(path) == "far:0":
            module.to("far:0")
        for name, parameter in module.named_parameters(path, recurse=False):
            if name in places:
                setattr(module, name.rpartition(".")[2], nn.Parameter(parameter.to("far:0")))
    attach_align_device_hook_on_blocks(base.model, places | {"": "far:0"}, offload=dict.fromkeys(places, False))


def _places(module: nn.Module, late: list[Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The fewest modules and parameters by which a model is cut around those that come late."""
    if not set(late) & set(module.modules()):
        yield path, "far:0"
    elif module in late:
        yield path, "cpu"
    else:
        yield from ((f"{path}.{name}", "far:0") for name, _ in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            yield from _places(child, late, f"{path}.{name}".lstrip("."))


def test_devices_do_not_mix() -> None:
    with devices():
        ours, other = torch.ones(2, 3, device="far:0"), torch.ones(2, 3)
        assert isinstance(ours, Far) and (ours + 1).device == torch.device("far:0")
        assert (ours + torch.tensor(2.0)).cpu().tolist() == (other + 2).tolist()
        assert ours[torch.tensor([0])].tolist() == [[1, 1, 1]]
        for wrong in (lambda: ours + other, lambda: other[torch.tensor([0]).to("far:0")]):
            with pytest.raises(RuntimeError):
                wrong()
        with pytest.raises(TypeError):
            ours.numpy()


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    base = tied()
    layer = "model.language_model.layers.1"
    places = dict(_places(base.model, [base.model.get_submodule(layer)]))
    places = {path: "disk" if place == "cpu" else "cpu" for path, place in places.items()}
    dispatch_model(base.model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    with pytest.raises(AttachError, match=f"{layer}.*is offloaded"):
        base.attach()


ANYWHERE: list[Any] = [({}, whole), (OTHERWISE, spread)]
SPREAD: list[Any] = [({}, spread), ({"context": "recompute"}, spread)]


@pytest.mark.parametrize(
    ("make", "settings", "place"),
    [(make, *case) for make in (tied, untied, *FAMILIES) for case in ANYWHERE + SPREAD],
)
def test_answers_are_the_same_elsewhere(
    make: Callable[[], Base], settings: dict[str, Any], place: Callable[[Base], None]
) -> None:
    wanted = config(trigger="schedule:0=long,4=short", **settings)
    here, there = make(), make()
    here.attach(wanted)
    expected = here.generate(*QUESTIONS, max_new_tokens=8, min_new_tokens=8)
    with devices():
        place(there)
        memory = there.attach(wanted)
        found = there.generate(*QUESTIONS, max_new_tokens=8, min_new_tokens=8)
    assert found.sequences.device.type == "far"
    assert {own.kind for own in memory.trace.invocations} == {"short", "long"}
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("make", [tied, *FAMILIES])
@pytest.mark.parametrize("settings", [{}, {"name": "transformer", "builder": "cross"}], ids=["lora", "transformer"])
def test_answers_follow_a_model_that_is_moved(make: Callable[[], Base], settings: dict[str, Any]) -> None:
    base = make()
    memory = base.attach(config(trigger="schedule:0=long,4=short", **settings))
    expected = base.generate(*QUESTIONS, max_new_tokens=8, min_new_tokens=8)
    with devices():
        base.model.to("far:0")
        found = base.generate(*QUESTIONS, max_new_tokens=8, min_new_tokens=8)
        assert {own.device.type for own in memory.trained().values()} == {"far"}
        base.model.to("cpu")
        again = base.generate(*QUESTIONS, max_new_tokens=8, min_new_tokens=8)
    assert found.sequences.device.type == "far"
    assert found.sequences.tolist() == expected.sequences.tolist() == again.sequences.tolist()


@pytest.mark.parametrize("trigger", ["schedule:99=short", "schedule:1=short,4=long"])
def test_answers_wait_once_a_step(trigger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that come back from the device, of which the host must know before it goes on."""
    read: list[str] = []
    real, tolist = elsewhere._run, Far.tolist

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        to_host = name == "_to_copy" and str(kwargs.get("device")) == "cpu"
        if to_host or name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            read.extend([name] * any(isinstance(own, Far) for own in args))
        return real(func, args, kwargs)

    monkeypatch.setattr(elsewhere, "_run", run)
    monkeypatch.setattr(Far, "tolist", lambda self: (read.append("tolist"), tolist(self))[1])
    counts = []
    for length in (10, 26):
        base = tied()
        with devices():
            base.model.to("far:0")
            memory = base.attach(config(trigger=trigger))
            read.clear()
            base.generate(QUESTIONS[0], max_new_tokens=length, min_new_tokens=length)
        counts.append(len(read))
        assert len(memory.trace) == (0 if "99" in trigger else 2)
    assert counts[1] - counts[0] == 16


PLAIN = (config(), whole)
PARTED = (config("transformer", builder="cross", policy=PolicyConfig("lora", rank=4)), spread)


@pytest.mark.parametrize(("settings", "place"), [PLAIN, PARTED], ids=["plain", "parted"])
@pytest.mark.parametrize("start", STAGES.values(), ids=STAGES)
def test_steps_are_the_same_elsewhere(
    settings: MemoryConfig, place: Callable[[Base], None], start: Callable[[Memory], Stage]
) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # what every device has; sampling would turn rounding into other words
        before, expected = steps(untied(), start, settings)
        with devices():
            base = untied()
            place(base)
            _, found = steps(base, start, settings)
    assert any(not expected[name].equal(own) for name, own in before.items())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def steps(
    base: Base, start: Callable[[Memory], Stage], settings: MemoryConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a stage trains, before and after two steps."""
    memory = base.attach(settings)
    memory.trigger = "policy"
    stage, batch = start(memory), make_batch(memory.backbone, SAMPLES)
    trained = {name: tensor for name, tensor, _ in stage.parameters()}
    before = {name: tensor.detach().cpu().clone() for name, tensor in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        stage.accumulate(batch, str(step), step / 2)
        optimizer.step()
        stage.stepped()
    return before, {name: tensor.detach().cpu() for name, tensor in trained.items()}
