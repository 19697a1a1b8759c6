"""The probe: what it puts in the latents' places, what it finds in memories that are known, and its verdicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import Base, config, mini
from torch import Tensor

from vismem_core import Memory
from vismem_core.base.embedded import embedded
from vismem_core.base.loading import load_base
from vismem_core.decoding.attach import attach
from vismem_core.errors import DataError
from vismem_core.experiments import probe as probing
from vismem_core.experiments.probe import CONDITIONS, OWN, probe, verdict
from vismem_core.files.samples import Dataset, Sample, open_dataset
from vismem_plugins.mosaic import mosaic


@pytest.fixture(scope="module")
def shipped() -> Memory:
    base = mini()
    return attach(base.model, base.processor, embedded("qwen2_5_vl")[1].memory)


@pytest.fixture(scope="module")
def told(shipped: Memory) -> dict[str, Any]:
    seen: list[tuple[int, int]] = []
    found = probe(
        shipped,
        open_dataset("mosaic", "heldout"),
        types=["right", "most"],
        per_type=20,
        max_new_tokens=4,
        progress=lambda _, done, count: seen.append((done, count)),
    )
    assert seen == [(at + 1, len(seen)) for at in range(len(seen))]
    return found


def forced(memory: Memory, sample: Sample, vectors: Tensor) -> float:
    """The right answer's mean log-likelihood, by one plain pass of the language model over vectors laid out by hand."""
    backbone = memory.backbone
    inputs = backbone.inputs([sample.prompt], [sample.load_images()])
    ids = [*memory.encode(sample.answer or ""), backbone.end_of_turn]
    with memory.off(), torch.no_grad():
        entered: list[Tensor] = []
        hook = backbone.decoder.register_forward_pre_hook(
            lambda module, args, named: entered.append(named["inputs_embeds"]), with_kwargs=True
        )
        backbone.model(**inputs)
        hook.remove()
        marks = [memory.tokens.invocation("long"), memory.tokens.end("long")]
        begin, end = memory.tokens.vectors(torch.tensor([marks]), entered[0])[0]
        told = backbone.embeddings(torch.tensor(ids))
        embeds = torch.cat([entered[0][0], begin[None], vectors, end[None], told])[None]
        positions = backbone.positions(inputs)
        count = embeds.shape[1] - entered[0].shape[1]
        places = torch.cat([positions, positions[..., -1:] + torch.arange(1, count + 1)], dim=-1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        output = backbone.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=places)
        hidden = output.last_hidden_state[0]
        hidden = hidden[-len(ids) - 1 : -1]
        logits = backbone.logits(hidden).float()  # so soon after an invocation, there is no other
    picked = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
    return float(picked.mean())


@pytest.mark.parametrize("count", [16, 3, 0])
def test_likelihoods_are_those_of_a_plain_pass(shipped: Memory, count: int) -> None:
    samples = [mosaic("heldout", types=["right"])[at] for at in range(3)]
    vectors = 0.2 * torch.randn(3, count, shipped.backbone.width, generator=torch.Generator().manual_seed(0))
    found = probing._likelihood(shipped, samples, "long", vectors)
    expected = [forced(shipped, sample, own) for sample, own in zip(samples, vectors, strict=True)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.long
def test_every_condition_is_told(told: dict[str, Any]) -> None:
    for kind, own in told["kinds"].items():
        for part in ("conditions", "hidden"):
            assert list(own[part]) == list(CONDITIONS)
            assert own[part][OWN]["likelihood"]["mean"] == 0.0
        assert len(own["left_out"]) == {"short": 8, "long": 16}[kind]
        assert set(own["alike"]) == {"another image", "another question", "both", "within"}
    short, long = (told["kinds"][kind]["conditions"] for kind in ("short", "long"))
    assert short["other kind"]["log-likelihood"] != short[OWN]["log-likelihood"]
    assert long["another image"]["accuracy"] < long[OWN]["accuracy"]
    assert all(-1 <= told["kinds"]["long"]["alike"][name] < 0.95 for name in ("another image", "both", "within"))
    assert {"visual tokens", "long-term latents", "shuffled labels"} <= told["content"].keys()


def test_what_enters(shipped: Memory) -> None:
    asked = probing._asked(open_dataset("mosaic", "heldout"), ["right"], 6)
    latents: Any = {
        kind: {part: probing._latents(shipped, getattr(asked, part), kind) for part in vars(asked)}
        for kind in ("short", "long")
    }
    own = latents["long"]["own"]
    entering = probing._entering(shipped, "long", latents)
    assert list(entering) == list(CONDITIONS)
    assert entering["markers only"].shape == (6, 0, shipped.backbone.width)
    assert entering["mean memory"][4].equal(own.mean(0))
    assert entering["other kind"].equal(latents["short"]["own"])
    assert not entering["another image"].allclose(own) and not entering["another question"].allclose(own)
    assert [one.prompt for one in asked.image] == [one.prompt for one in asked.own]
    assert all(one.images == other.images for one, other in zip(asked.question, asked.own, strict=True))
    assert all(one.prompt != other.prompt for one, other in zip(asked.question, asked.own, strict=True))
    alone = probing._latents(shipped, asked.own[2:3], "long")[0]
    torch.testing.assert_close(own[2], alone, atol=1e-4, rtol=1e-3)  # rows are in order


def test_noise_like_memory_has_its_mean_and_covariance() -> None:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(4, 4, generator=generator)
    own = torch.randn(4000, 2, 4, generator=generator) @ mixing + 3
    drawn = probing._like(own)
    torch.testing.assert_close(drawn.mean(0), own.mean(0), atol=0.2, rtol=0)
    for at in range(2):
        torch.testing.assert_close(drawn[:, at].T.cov(), own[:, at].T.cov(), atol=0.6, rtol=0.1)
    assert (drawn - own).abs().mean() > 1


@pytest.mark.long
def test_memory_that_is_constant_holds_nothing() -> None:
    """Soft prompts are the same for all images and questions, and the probe says so."""
    base: Base = mini()
    memory = base.attach(config("constant", trigger="policy"))
    found = probe(memory, open_dataset("mosaic", "heldout"), types=["right"], per_type=12, max_new_tokens=3)
    for own in found["kinds"].values():
        table = own["conditions"]
        for name in ("mean memory", "another image", "another question", "noise like memory"):
            assert abs(table[name]["likelihood"]["mean"]) < 1e-4, name
        assert abs(table["noise"]["likelihood"]["mean"]) > 1e-3
        assert own["alike"]["both"] == pytest.approx(1, abs=1e-4)
        assert "hold the" not in own["verdict"]
    assert found["content"]["visual tokens"] > found["content"]["long-term latents"]


def test_a_linear_probe_reads_what_is_there_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [("a", "b", "c")[at % 3] for at in range(300)]
    centres = torch.randn(3, 20, generator=generator)
    features = centres[[at % 3 for at in range(300)]] + 0.3 * torch.randn(300, 20, generator=generator)
    order = torch.randperm(300, generator=generator).tolist()
    shuffled, mixed = features[order], [labels[at] for at in order]
    assert probing._read(shuffled, mixed) > 0.95
    assert probing._read(torch.randn(300, 20, generator=generator), mixed) < 0.55


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": 0.0}, "make no clear difference"),
        ({"mean memory": 0.0, "noise like memory": 0.0}, "as a constant prompt"),
        ({}, "hold the image and the question (another image's cost 0.50, another question's cost 0.50)"),
        ({"another question": 0.0}, "hold the image ("),
        ({"another question": 0.02}, "hold the image ("),
        ({"another image": 0.0, "another question": 0.0}, "hold neither"),
    ],
)
def test_verdicts_follow_fixed_rules(changes: dict[str, float], said: str) -> None:
    costs = {name: 0.0 if name == OWN else 0.5 for name in CONDITIONS} | changes
    table = {
        name: {"accuracy": 0.8 - cost, "likelihood": {"mean": -cost, "low": -cost - 0.01, "high": 0.01 - cost}}
        for name, cost in costs.items()
    }
    table["markers only"]["accuracy"], table["mean memory"]["accuracy"] = 0.2, 0.5
    told = verdict("long", {"conditions": table})
    assert said in told
    assert ("keeps 50% of the accuracy" in told) is ("hold" in said)


@pytest.mark.long
def test_models_whose_images_stay() -> None:
    """Gemma's windows cannot be read again without images: the probe leaves that part out."""
    base = embedded("gemma3")[1]
    model, processor, name = load_base("gemma3")
    memory = attach(model, processor, base.memory, backbone=name)
    found = probe(memory, open_dataset("mosaic", "heldout"), types=["right", "most"], per_type=3, max_new_tokens=3)
    assert all("hidden" not in own and own["conditions"].keys() == CONDITIONS.keys() for own in found["kinds"].values())


def test_types_that_are_not_there_are_named() -> None:
    with pytest.raises(DataError, match="no type or group of questions 'rigth'; did you mean 'right'"):
        probing._asked(open_dataset("mosaic", "heldout"), ["rigth"], 2)


def test_there_must_be_something_to_probe(shipped: Memory) -> None:
    with pytest.raises(DataError, match="nothing to probe"):
        probe(shipped, Dataset([mosaic("heldout")[0]]))
