"""The interface's way through the vision encoder: record, encode, carry, project, and LoRA on it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vismem_core.base.adapters import Adapter
from vismem_core.base.vision import VisionStates

from .base import Base, Question
from .contract import Contract, holds
from .liveliness import close, moved, picture
from .reference import listening, states

N = 4
"""Latents in the tests' extra tokens."""


class Encoder(Contract):
    """Extra tokens go the way of a row's patches, and leave no trace."""

    def sighted(self) -> Base:
        """The model of this test, if extra tokens have a way through its vision encoder."""
        base = self.base()
        if base.backbone.blind:
            pytest.skip(f"extra tokens have no way through the vision encoder: {base.backbone.blind}")
        return base

    @holds(
        "recording must leave the image's features and the model as they are",
        "vismem_core.base.backbone.Backbone.record",
    )
    @torch.no_grad()
    def test_record_changes_nothing(self) -> None:
        base, filled = self.sighted(), VisionStates()
        inputs = base.inputs(*self.questions())
        with listening(base.backbone) as heard:
            base.model(**inputs)
            hooks = _hooks(base.model)  # some models put in hooks of their own when they are first called
            with base.backbone.record(filled, keep=True, inputs=True):
                base.model(**inputs)
            base.model(**inputs)
            assert _hooks(base.model) == hooks, "hooks are left on the model"
        assert filled.keys and filled.inputs, "nothing was recorded"
        for own in (heard.embeds, heard.hidden):
            assert all(again.equal(own[0]) for again in own), "what enters or leaves the language model differs"

    @holds(
        "states must hold each block's keys and values for the patches of every image, in order",
        "vismem_core.base.vision.VisionStates",
    )
    def test_record_fills_states(self) -> None:
        base, questions = self.sighted(), self.questions()
        filled, backbone = states(base, *questions), base.backbone
        images = [len(images) for _, images in questions]
        assert len(filled.keys) == len(filled.values) > 0
        for keys, values in zip(filled.keys, filled.values, strict=True):
            assert keys.ndim == values.ndim == 3, f"keys have shape {tuple(keys.shape)} instead of (P, heads, width)"
            assert len(keys) == len(values) == sum(filled.patches), "patches do not add up to the keys' length"
        assert (filled.keys[0].device, filled.keys[0].dtype) == (backbone.vision_device, backbone.vision_dtype)
        assert len(filled.patches) == len(filled.tokens), "patches and tokens count different images"
        assert [bool(own) for own in filled.rows] == [count > 0 for count in images], "images went to the wrong rows"
        assert [image for own in filled.rows for image in own] == list(range(len(filled.tokens))), (
            "images went to the wrong rows"
        )
        quiet = VisionStates()
        with torch.no_grad(), backbone.record(quiet, keep=False, inputs=False):
            base.model(**base.inputs(*questions))
        assert (quiet.keys, quiet.values, quiet.inputs) == ([], [], []), "it stores what was not asked for"
        assert (quiet.patches, quiet.tokens) == (filled.patches, filled.tokens)

    @holds("encode() must run again what record() stored", "vismem_core.base.backbone.Backbone.encode")
    @torch.no_grad()
    def test_encode_replays(self) -> None:
        base, again = self.sighted(), VisionStates()
        first, other = states(base, *self.questions()), states(base, *map(_other, self.questions()))
        assert moved(first.values[-1], other.values[-1]), "other images give the same states"
        with base.backbone.record(again, keep=True, inputs=False):
            for inputs in first.inputs:
                base.backbone.encode(inputs)
        assert again.patches == first.patches
        for own, expected in zip(again.keys + again.values, first.keys + first.values, strict=True):
            close(own, expected)

    @holds(
        "project(carry(extra)) must turn N * merge tokens of the vision encoder's width into N vectors of width d",
        "vismem_core.base.backbone.Backbone.carry, .project, .merge, .vision_width",
    )
    @torch.no_grad()
    def test_shapes(self) -> None:
        base, rows = self.sighted(), [1, 0]
        extra, expected = _extra(base, rows), (len(rows), N, base.backbone.width)
        carried = base.backbone.carry(extra, states(base, *self.questions()), rows)
        fits = carried.shape[:2] == extra.shape[:2] and carried.shape[2] % extra.shape[2] == 0
        assert fits, f"carry gave {tuple(carried.shape)} for {tuple(extra.shape)}"
        projected = base.backbone.project(carried)
        assert projected.shape == expected, f"project gave {tuple(projected.shape)} instead of {expected}"
        parts = [base.backbone.project(own) for own in carried.split(base.backbone.merge, dim=1)]
        close(projected, torch.cat(parts, dim=1), "a vector depends on more than its own tokens")

    @holds(
        "extra tokens must see the images of their own row and no others",
        "vismem_core.base.backbone.Backbone.carry",
    )
    @torch.no_grad()
    def test_carry_sees_its_rows_images(self) -> None:
        base, questions = self.sighted(), self.questions()
        rows = list(range(len(questions)))
        extra = _extra(base, rows[:1]).expand(len(rows), -1, -1)
        plain = base.backbone.carry(extra, states(base, *questions), rows)
        for changed in rows:
            altered = [_other(question) if row == changed else question for row, question in enumerate(questions)]
            carried = base.backbone.carry(extra, states(base, *altered), rows)
            for row in rows:
                if row == changed and questions[row][1]:
                    assert moved(carried[row], plain[row]), f"row {row} does not see its own image"
                else:
                    close(carried[row], plain[row], f"row {row} sees the image of row {changed}")
        for row in rows:
            again = base.backbone.carry(extra[:1], states(base, questions[row]), [0])
            close(again[0], plain[row], f"row {row} alone is carried otherwise than among its neighbours")

    @holds("extra tokens must see all patches of their row's images", "vismem_core.base.backbone.Backbone.carry")
    @torch.no_grad()
    def test_carry_sees_all_patches(self) -> None:
        base, questions = self.sighted(), self.questions()
        filled, rows = states(base, *questions), list(range(len(questions)))
        even = replace(filled, keys=[torch.zeros_like(keys) for keys in filled.keys])  # no patch drowns out another
        extra, start = _extra(base, rows), 0
        plain = base.backbone.carry(extra, even, rows)
        for image, count in enumerate(filled.patches):
            for patch in {*torch.linspace(start, start + count - 1, 6).int().tolist()}:
                values = [own.clone() for own in filled.values]
                for own in values:
                    own[patch] += 300 * own.std()
                difference = (base.backbone.carry(extra, replace(even, values=values), rows) - plain).abs()
                seeing = [row for row in rows if difference[row].max() > 1e-3]
                expected = [row for row in rows if image in filled.rows[row]]
                assert seeing == expected, f"patch {patch - start} of image {image} is seen by rows {seeing}"
            start += count

    @holds(
        "what lies between an image and its visual tokens must be used by carry() and then project(), all of it",
        "vismem_core.base.backbone.Backbone.carry and .project",
    )
    def test_carry_and_project_use_the_models_own_weights(self) -> None:
        base, questions = self.sighted(), self.questions()
        way, carried, projected = _ways(base, questions)
        assert carried, "carry uses none of the model's weights"
        assert projected, "project uses none of the model's weights"
        used = carried.keys() | projected.keys()
        assert used <= way.keys(), f"{min(used - way.keys(), default='')} makes no visual token of an image"
        assert not carried.keys() & projected.keys(), f"both use {min(carried.keys() & projected.keys(), default='')}"
        parameters, plain = dict(base.model.named_parameters()), states(base, *questions)
        for name in sorted(name for name, matters in way.items() if matters and name not in used):
            weight = parameters[name].detach()
            before = weight.clone()
            weight += torch.randn_like(weight)
            other = states(base, *questions)
            weight.copy_(before)
            early = moved(plain.keys[0], other.keys[0]) or moved(plain.values[0], other.values[0])
            assert early, f"{name} comes after the first block's keys and is used by neither"

    @holds(
        "short must match linear layers in the vision encoder and nothing else",
        "vismem_core.base.backbone.Backbone.lora_targets",
    )
    def test_short_targets(self) -> None:
        base = self.sighted()
        _, carried, _ = _ways(base, self.questions())
        names = [
            name for name, _ in base.model.named_modules() if re.fullmatch(base.backbone.lora_targets["short"], name)
        ]
        assert names, "it matches nothing"
        for name in names:
            assert isinstance(base.model.get_submodule(name), nn.Linear), f"{name} is no linear layer"
            assert f"{name}.weight" in carried, f"{name} is not on the way of extra tokens through the encoder"

    @holds(
        "LoRA on the vision encoder must change what carry() gives while it is on, and nothing otherwise",
        "vismem_core.base.backbone.Backbone.lora_targets and .carry",
    )
    @torch.no_grad()
    def test_lora_is_on_for_extra_tokens_only(self) -> None:
        base, questions = self.sighted(), self.questions()
        backbone, inputs = base.backbone, base.inputs(*questions)
        filled, extra = states(base, *questions), _extra(base, [0])
        plain, logits = backbone.carry(extra, filled, [0]), base.model(**inputs).logits
        features = backbone.project(plain)
        adapter = Adapter(base.model, "conformance", backbone.lora_targets["short"], 2, 4, 0.0)
        for matrix in adapter.parameters().values():
            matrix.normal_()
        with adapter.on():
            carried = backbone.carry(extra, filled, [0])
            assert not base.model(**inputs).logits.equal(logits), "the adapter does not change the encoder"
        assert moved(carried, plain), "the adapter does not change what carry gives"
        assert backbone.project(plain).equal(features), "it changes the projector"
        assert backbone.carry(extra, filled, [0]).equal(plain), "it is still on in carry"
        assert base.model(**inputs).logits.equal(logits), "it is still on in the model"
        adapter.eject()


def _extra(base: Base, rows: list[int]) -> Tensor:
    """(R, N * merge, D)"""
    torch.manual_seed(0)
    return torch.randn(len(rows), N * base.backbone.merge, base.backbone.vision_width).to(base.device)


def _other(question: Question) -> Question:
    """The same question about other images of the same sizes."""
    text, images = question
    return text, [picture(*image.size, 90 + at) for at, image in enumerate(images)]


def _ways(base: Base, questions: list[Question]) -> tuple[dict[str, bool], dict[str, bool], dict[str, bool]]:
    """What makes an image's visual tokens, what ``carry`` uses, and what ``project`` uses; see :func:`_used`."""
    backbone, model = base.backbone, base.model
    model.requires_grad_(True)
    with listening(backbone) as heard:
        model(**base.inputs(*questions))
        model(**base.inputs(*map(_other, questions)))
    visual = heard.embeds[0][(heard.embeds[0] != heard.embeds[1]).any(-1)]
    carried = backbone.carry(_extra(base, [0]), states(base, *questions), [0])
    told = {*backbone.decoder.parameters(), *backbone.embeddings.parameters(), *backbone.head.parameters()}
    language = {name for name, parameter in model.named_parameters() if parameter in told}
    way = {name: matters for name, matters in _used(visual, model).items() if name not in language}
    return way, _used(carried, model), _used(backbone.project(carried.detach()), model)


def _used(outcome: Tensor, model: Any) -> dict[str, bool]:
    """Names of the parameters that ``outcome`` was computed from, and whether it changes with them."""
    if not outcome.requires_grad:
        return {}
    named = dict(model.named_parameters())
    told = (outcome * torch.randn_like(outcome)).sum()
    slopes = torch.autograd.grad(told, list(named.values()), allow_unused=True)
    return {name: bool(own.any()) for name, own in zip(named, slopes, strict=True) if own is not None}


def _hooks(model: Any) -> int:
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
