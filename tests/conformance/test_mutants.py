"""The suite finds what it is there to find: backbones that are wrong in one place each, and the check that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from model_types import build
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from vismem_backbones.qwen2_5_vl import Qwen2_5_VL
from vismem_backbones.qwen3_vl import Qwen3_5
from vismem_core.base import adapters, chat
from vismem_core.base import cache as kv
from vismem_core.base.backbone import Backbone
from vismem_core.base.vision import VisionStates
from vismem_core.decoding import forward, loop
from vismem_core.decoding.injection import InjectionHook
from vismem_core.decoding.loop import Decoder
from vismem_core.decoding.room import RoomCache
from vismem_core.decoding.session import Session
from vismem_core.files import checkpoint
from vismem_core.memory.memory import Memory
from vismem_core.memory.tokens import MemoryTokens
from vismem_core.testing import BackboneContract


class Shifted(Qwen2_5_VL):
    """Positions off by one after memory."""

    def continue_(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        return super().continue_(embeds, attention_mask, positions + 1, cache)


class Unmasked(Qwen2_5_VL):
    """Ignores the attention mask."""

    def continue_(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        return super().continue_(embeds, torch.ones_like(attention_mask), positions, cache)


class Flat(Qwen2_5_VL):
    """Counts positions as for text alone."""

    def positions(self, inputs: dict[str, Any]) -> Tensor:
        return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0).expand(4, -1, -1)


class InFront(Qwen2_5_VL):
    """All images in front, whatever the text says of their places."""

    def prompt(self, text: str, images: int) -> str:
        return chat.ask(self.processor, images, text.replace("<image>", ""))


class OtherEnd(Qwen2_5_VL):
    """Answers end as the base's texts do, and not as its turns."""

    end_of_turn = 256  # type: ignore[assignment]


class Wordless(Qwen2_5_VL):
    """Prompts ask nothing."""

    def prompt(self, text: str, images: int) -> str:
        return super().prompt("", images)


class Blind(Qwen2_5_VL):
    """Every image is black."""

    def inputs(self, prompts: Any, images: Any) -> Any:
        told = super().inputs(prompts, images)
        return told | {"pixel_values": torch.zeros_like(told["pixel_values"])}


class Remembering(Qwen2_5_VL):
    """Counts positions on from where an earlier call left them."""

    def positions(self, inputs: dict[str, Any]) -> Tensor:
        left = self.model.model.rope_deltas
        return super().positions(inputs) + (0 if left is None else int(left[0]))


class RightPadded(Qwen2_5_VL):
    def inputs(self, prompts: Any, images: Any) -> Any:
        texts = [self.prompt(text, len(own)) for text, own in zip(prompts, images, strict=True)]
        own = [list(own) for own in images if own]
        self.processor.tokenizer.padding_side = "right"
        return self.processor(text=texts, padding=True, return_tensors="pt", **({"images": own} if own else {}))


class Leaky(Qwen2_5_VL):
    """Extra tokens see all images of the batch."""

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        everything = list(range(len(states.patches)))
        return super().carry(extra, replace(states, rows=[everything for _ in states.rows]), rows)


class Shuffled(Qwen2_5_VL):
    """Extra tokens see their neighbour's images."""

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        return super().carry(extra, states, [(row + 1) % len(states.rows) for row in rows])


class HalfBlind(Qwen2_5_VL):
    """Extra tokens do not see the last patch of an image."""

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        kept: list[int] = []
        for start, count in zip(torch.tensor([0, *states.patches]).cumsum(0).tolist(), states.patches, strict=False):
            kept += range(start, start + count - 1)
        parts = {name: [own[kept] for own in getattr(states, name)] for name in ("keys", "values")}
        return super().carry(extra, replace(states, patches=[count - 1 for count in states.patches], **parts), rows)


class Short(Qwen2_5_VL):
    """Extra tokens leave the encoder one block early."""

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        blocks = self.visual.blocks
        self.visual.blocks = blocks[:-1]
        try:
            return super().carry(extra, states, rows)
        finally:
            self.visual.blocks = blocks


class LeftOn(Qwen2_5_VL):
    """Adapters are on after the images have been read, and after extra tokens have passed."""

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        with super().record(states, keep=keep, inputs=inputs):
            yield
        self._leave_on()

    def project(self, tokens: Tensor) -> Tensor:
        self._leave_on()
        return super().project(tokens)

    def _leave_on(self) -> None:
        hooks = [hook for module in self.visual.modules() for hook in module._forward_hooks.values()]
        adapters._ON.set({hook.adapter: None for hook in hooks if isinstance(hook, adapters._Hook)})


class Unprojected(Qwen2_5_VL):
    """Skips the projector."""

    def project(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(1, (-1, self.merge)).mean(2)


class Replaced(Qwen2_5_VL):
    """Projects by a layer of its own."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.own = nn.Linear(self.vision_width * self.merge, self.width)

    def project(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.own(tokens.unflatten(1, (-1, self.merge)).flatten(2))
        return out


class Halved(Qwen2_5_VL):
    """Merges twice as many tokens as it says."""

    @property
    def merge(self) -> int:
        return super().merge // 2


class Coarse(Qwen2_5_VL):
    """Gives half as many vectors."""

    def project(self, tokens: Tensor) -> Tensor:
        return super().project(tokens)[:, ::2]


class Elsewhere(Qwen2_5_VL):
    """Names the token before the visual ones."""

    @property
    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.vision_start_token_id}


class OtherMedium(Qwen2_5_VL):
    @property
    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.video_token_id, "video": self.model.config.image_token_id}


class Crossed(Qwen2_5_VL):
    """LoRA on the other tower."""

    lora_targets = {kind: Qwen2_5_VL.lora_targets[other] for kind, other in (("short", "long"), ("long", "short"))}


class Broad(Qwen2_5_VL):
    """LoRA on both towers."""

    lora_targets = dict.fromkeys(("short", "long"), "|".join(Qwen2_5_VL.lora_targets.values()))


class Meddling(Qwen2_5_VL):
    """Recording changes what is recorded, by little."""

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        handle = self.visual.merger.register_forward_hook(lambda module, args, output: output * (1 + 1e-5))
        with super().record(states, keep=keep, inputs=inputs):
            yield
        handle.remove()


class Clinging(Qwen2_5_VL):
    """Recording goes on after its context."""

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        self.visual.register_forward_hook(lambda module, args, output: None)
        with super().record(states, keep=keep, inputs=inputs):
            yield


class Forgetful(Qwen2_5_VL):
    """Encodes another image again."""

    def encode(self, inputs: dict[str, Tensor]) -> None:
        super().encode({name: own.flip(0) if own.is_floating_point() else own for name, own in inputs.items()})


class Wearing(Qwen2_5_VL):
    """Every use changes the model, by little."""

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        self.visual.merger.ln_q.weight.data.mul_(1.0001)
        return super().carry(extra, states, rows)


class Grasping(Qwen2_5_VL):
    """Knows every model."""

    @classmethod
    def matches(cls, model: Any) -> bool:
        return True


class Silencing(Qwen2_5_VL):
    """Switches the user's adapters off when it reads images."""

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(False)
        with super().record(states, keep=keep, inputs=inputs):
            yield


MUTANTS: list[tuple[type[Backbone], str, dict[str, Any], str]] = [
    (Shifted, "continue_equals_one_pass", {}, "not close"),
    (Shifted, "ragged_insertion_equals_one_pass", {"packs": False}, "row 0 differs"),
    (Shifted, "packing_changes_nothing", {}, r"row \d forms other memory when packed"),
    (Shifted, "replay_equals_rollout", {"context": "cache", "dropout": 0.0}, "not close"),
    (Unmasked, "continue_equals_one_pass", {}, "not close"),
    (Unmasked, "ragged_insertion_equals_one_pass", {"packs": False}, "row 0 differs"),
    (Unmasked, "rows_alone_and_together", {"context": "cache", "packs": False}, r"row \d forms other memory alone"),
    (Flat, "positions_are_generates", {}, "differ from generate's"),
    (RightPadded, "inputs_are_left_padded", {}, "the last column holds padding"),
    (Wordless, "prompt", {}, "is not in"),
    (Blind, "the_model_looks_at_its_image", {}, "another image hardly changes"),
    (Remembering, "earlier_calls_leave_nothing", {}, "positions differ after another call"),
    (InFront, "images_stand_where_their_marks_are", {}, "not between the texts around its mark"),
    (OtherEnd, "answers_end_as_the_chat_template_says", {}, r"256 is none of \[\d+\]"),
    (Leaky, "carry_sees_its_rows_images", {}, "row 1 sees the image of row 0"),
    (Leaky, "carry_sees_all_patches", {}, r"patch 0 of image 0 is seen by rows \[0, 1, 2, 3\]"),
    (Leaky, "rows_alone_and_together", {"context": "cache", "packs": True}, "row 0 forms other memory alone"),
    (Shuffled, "carry_sees_its_rows_images", {}, "row 0 does not see its own image"),
    (Shuffled, "carry_sees_all_patches", {}, r"patch 0 of image 0 is seen by rows \[3\]"),
    (HalfBlind, "carry_sees_all_patches", {}, r"patch \d+ of image 0 is seen by rows \[\]"),
    (Short, "carry_and_project_use_the_models_own_weights", {}, r"blocks\.1.* is used by neither"),
    (LeftOn, "lora_is_on_for_extra_tokens_only", {}, "it is still on in carry"),
    (LeftOn, "off_and_never_are_the_base", {}, "it differs when off"),
    (Unprojected, "carry_and_project_use_the_models_own_weights", {}, "project uses none of the model's weights"),
    (Replaced, "carry_and_project_use_the_models_own_weights", {}, "project uses none of the model's weights"),
    (Halved, "shapes", {}, "the prompts hold"),
    (Coarse, "shapes", {}, r"project gave \(2, 2, 32\) instead of \(2, 4, 32\)"),
    (Halved, "record_fills_states", {}, "the prompts hold"),
    (Elsewhere, "placeholders", {}, "are not where its placeholder stands"),
    (OtherMedium, "placeholders", {}, "are not where its placeholder stands"),
    (Crossed, "short_targets", {}, "is not on the way of extra tokens"),
    (Crossed, "long_targets", {}, "is not in the language model"),
    (Crossed, "lora_is_on_for_extra_tokens_only", {}, "does not change what carry gives"),
    (Crossed, "what_trains_changes_and_nothing_else", {"context": "cache"}, "short.adapter.* has not changed"),
    (Broad, "short_targets", {}, r"language_model.* is not on the way of extra tokens"),
    (Broad, "long_targets", {}, r"visual.* is not in the language model"),
    (Meddling, "record_changes_nothing", {}, "enters or leaves the language model differs"),
    (Clinging, "record_changes_nothing", {}, "hooks are left"),
    (Clinging, "detached_as_it_was", {}, "a call changes the model's hooks"),
    (Wearing, "detached_as_it_was", {}, "it differs when invoked"),
    (Wearing, "what_trains_changes_and_nothing_else", {"context": "cache"}, "the base's weights changed"),
    (Forgetful, "encode_replays", {}, "not close"),
    (Silencing, "foreign_adapters", {"first": "memory"}, "the adapter does not act where memory is formed"),
    (Silencing, "foreign_adapters", {"first": "adapter"}, "the adapter does not act where memory is formed"),
    (Flat, "forward_equals_decoding", {}, "not close"),
    (Grasping, "matches_its_own_models", {}, "it matches a single linear layer"),
]


@pytest.mark.parametrize(
    ("mutant", "check", "arguments", "reason"), MUTANTS, ids=[f"{own.__name__}-{check}" for own, check, _, _ in MUTANTS]
)
def test_a_wrong_backbone_fails(mutant: type[Backbone], check: str, arguments: dict[str, Any], reason: str) -> None:
    fails(mutant, check, arguments, reason)


@pytest.mark.parametrize("family", [Qwen2_5_VL, *dict.fromkeys(mutant for mutant, *_ in MUTANTS)])
def test_a_wrong_backbone_passes_what_it_leaves_alone(family: type[Backbone]) -> None:
    contract(family).test_language_model()
    contract(family).test_devices_and_precisions()


# What the core itself does, broken in one place each.

DECODE = Decoder.__call__


def without(argument: str, nothing: Any) -> Callable[..., Any]:
    """The decoding loop without one of its arguments."""

    def call(self: Decoder, model: Any, input_ids: Tensor, **arguments: Any) -> Any:
        return DECODE(self, model, input_ids, **(arguments | {argument: nothing(arguments[argument])}))

    return call


def unheard(self: Decoder, *args: Any, **arguments: Any) -> Any:
    self.streamer = None
    return DECODE(self, *args, **arguments)


def length_alone(criteria: StoppingCriteriaList) -> StoppingCriteriaList:
    return StoppingCriteriaList([own for own in criteria if hasattr(own, "max_length")])


def uncopied(self: VisionStates, counts: Sequence[Sequence[int]]) -> None:
    self.rows = [[row] if row < len(self.tokens) else [] for row in range(len(counts[0]))]


def formless(memory: Memory, prompts: Any, answers: Any) -> None:
    """Latents that hold nothing."""
    FORM(memory, prompts, answers)
    for own in answers:
        own.latents = {index: torch.zeros_like(latents) for index, latents in own.latents.items()}


FORM = forward.form
CHOICES = Decoder._choices


def blurred(self: Decoder, logits: Tensor, *args: Any) -> Any:
    """Logits that the loop changes, by little."""
    return CHOICES(self, logits * (1 + 1e-6), *args)


def everything(self: RoomCache, window: int | None, chunked: bool = False, width: int = 1) -> Tensor:
    """All that there is, whoever looks."""
    return torch.ones_like(self._seen)[:, None].expand(-1, width, -1)


@contextmanager
def for_all(self: Memory, **values: Any) -> Iterator[None]:
    """Switches that belong to nobody."""
    before, self._usual = self._usual, replace(self._usual, **values)
    yield
    self._usual = before


BROKEN: list[tuple[Any, str, Any, str, str]] = [
    (Decoder, "__call__", without("logits_processor", lambda own: LogitsProcessorList()), "logits_processors", "wrote"),
    (Decoder, "__call__", without("stopping_criteria", length_alone), "stopping_criteria", "goes on|something else"),
    (Decoder, "__call__", without("stopping_criteria", length_alone), "end_of_turn_per_row", "=="),
    (Decoder, "_select", lambda self, scores, sample: scores.argmax(-1), "sampling", "two seeds, one answer"),
    (loop, "ROOM", 0, "latents_cost_no_tokens", r"\(4, 2\) new ids for 1"),
    (Decoder, "_force", staticmethod(lambda scores, forced: scores), "latents_cost_no_tokens", "=="),
    (Decoder, "__call__", unheard, "streamer", "it got other ids"),
    (VisionStates, "assign", uncopied, "copies_see_their_prompts_images", "forms other memory"),
    (checkpoint.Stored, "fill", lambda self, memory: None, "checkpoints_round_trip", "answers otherwise"),
    (checkpoint, "fingerprint", lambda backbone: "", "checkpoints_refuse_other_bases", "made for other weights"),
    (forward, "form", formless, "forward_equals_decoding", "not close"),
    (RoomCache, "seen", everything, "static_caches", "not close|other answers"),
    (Memory, "_switched", for_all, "calls_at_once", "switched off in another"),
    (InjectionHook, "remove", lambda self: None, "detached_as_it_was", "does not restore"),
    (Decoder, "_choices", blurred, "the_loop_itself_is_the_base", "its logits differ at step 0"),
    (loop, "_check", lambda config, model_kwargs: None, "right_padding_is_refused", "they are answered"),
    (Backbone, "media", property(lambda self: []), "rollouts_write_no_media", "they wrote"),
    (Session, "took_in", lambda self, rows, *latents: None, "insertion_equals_one_pass", "differs"),
    (MemoryTokens, "vectors", lambda self, ids, like: like, "ragged_insertion_equals_one_pass", "differs"),
]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "insertion_equals_one_pass": {"spec": "schedule:1=short", "packs": False},
    "ragged_insertion_equals_one_pass": {"packs": False},
    "replay_equals_rollout": {"context": "cache", "dropout": 0.0},
    "static_caches": {"compiled": True},
}


def unmoved(self: kv.StateLayer, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
    """States that a pass does not bring forward."""
    return recurrent_states


# What rows carry beside keys and values: states of convolutions and linear attention.
STATES: list[tuple[Any, str, Any, str, str]] = [
    (kv.StateLayer, "take_over", lambda self, other, rows: None, "ragged_insertion_equals_one_pass", "differs"),
    (kv.StateLayer, "update_recurrent_state", unmoved, "insertion_equals_one_pass", "differs"),
    (kv, "_once", lambda layer, then, rows: kv.StateLayer.of(layer, rows), "replay_equals_rollout", "not close"),
]


def tiny_qwen() -> tuple[Any, Any]:
    return tiny.qwen(tied=False)


def tiny_qwen3_5() -> tuple[Any, Any]:
    return build("qwen3_5")


@pytest.mark.parametrize(
    ("family", "made", "owner", "name", "broken", "check", "reason"),
    [(Qwen2_5_VL, tiny_qwen, *own) for own in BROKEN] + [(Qwen3_5, tiny_qwen3_5, *own) for own in STATES],
    ids=[f"{own[1]}-{own[3]}" for own in BROKEN + STATES],
)
def test_a_broken_core_fails(
    family: type[Backbone],
    made: Callable[[], tuple[Any, Any]],
    owner: Any,
    name: str,
    broken: Any,
    check: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, broken)
    fails(family, check, ARGUMENTS.get(check, {}), reason, made)


def contract(family: type[Backbone], made: Callable[[], tuple[Any, Any]] = tiny_qwen) -> BackboneContract:
    """The suite as the author of ``family`` would write it."""

    class Contract(BackboneContract):
        backbone = family

        def load(self) -> tuple[Any, Any]:
            return made()

    return Contract()


def fails(
    family: type[Backbone],
    check: str,
    arguments: dict[str, Any],
    reason: str,
    made: Callable[[], tuple[Any, Any]] = tiny_qwen,
) -> None:
    """The check fails for that reason, and says which contract is broken."""
    test = getattr(contract(family, made), f"test_{check}")
    with pytest.raises(AssertionError, match=reason) as failure:
        test(**arguments)
    assert str(failure.value).startswith(f"{test.sentence}; see vismem_core.")
