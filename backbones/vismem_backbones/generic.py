"""Any image-text-to-text model of transformers, by what its public methods give and what it does with a blank image.

The language model is found here. Whether and how extra tokens go through its vision encoder, an
:class:`~vismem_backbones.encoder.Encoder` finds out.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vismem_core.base import cache as kv
from vismem_core.base.backbone import Backbone
from vismem_core.base.media import Media, arguments
from vismem_core.base.videos import STILL, Frame, Still
from vismem_core.base.vision import VisionStates
from vismem_core.errors import AttachError
from vismem_core.plugins import reason

from .encoder import Encoder
from .probing import blocks_in, cast, targets_in

SIDE, FRAMES = 224, 4
"""Pixels of the blank image's sides, before the processor has resized it; and frames of a video that is tried."""
GIVEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "cache", "past_key_values"}
"""What memory knows to give to a language model."""
REFUSED = {
    "emu3": "transformers makes other tokens of images in a batch than of one alone",
    "minimax_m3_vl": "transformers cuts its sparse attention into blocks by columns, and padding moves them",
    "unlimited_ocr": "transformers shows padded prompts their padding once its window has moved",
    "hunyuan_vl": "transformers gives its images other positions in a batch than alone",
    "nemotron_h_omni": "transformers feeds single tokens to its states without the least time step that longer "
    "passes have, so what it says hangs on how it was read",
}
"""Types that break a promise in ways that calling them once does not show."""
PROMPT_ONLY = {
    *("deepstack_visual_embeds", "visual_pos_masks", "deepstack_features", "vision_mask", "moe_mm_token_type_ids")
}
"""What language models take beside embeddings of images alone: what follows a prompt has none of it."""


class Generic(Backbone):
    """A decoder-only language model behind a vision encoder with one stack of blocks, and any projector that makes
    each language token of patches of its own. Images only.

    Attributes:
        found: what was found of the model, by part; refusals say it too.
    """

    name = "generic"
    _sees_videos = False
    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.found: dict[str, str] = {}
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._find_language_model()
        batch = self._blank()
        self._find_context(batch)
        try:
            self.encoder = Encoder(model, batch, self.found)
            self._try_two()
        except AttachError as error:
            self.blind = str(error)
        self._try_video()
        self._find_targets()

    @classmethod
    def matches(cls, model: Any) -> bool:
        if cls.model_types:
            return super().matches(model)
        known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        return isinstance(model, PreTrainedModel) and model.config.model_type in known

    @classmethod
    def outlook(cls, config: Any) -> tuple[bool | None, str, dict[str, str]]:
        record = json.loads((Path(__file__).parent / "model_types.json").read_text(encoding="utf-8"))
        told = record["types"].get(config.model_type, {"outcome": "not built", "why": "no such type", "without": ""})
        without = {}
        if "recompute" in told["without"]:
            without["memory.long.context=recompute"] = "its prompts carry more than embeddings"
        if "encoder" in told["without"]:
            without["memory.short.name=lora"] = "extra tokens have no way through its vision encoder"
        by = f"tiny models of transformers {record['transformers']}"
        if told["outcome"] == "passes":
            return True, f"{by} of this type pass the conformance suite", without
        return (None if told["outcome"] == "not built" else False), f"{by}: {told['outcome']}, {told['why']}", without

    def _name(self, module: nn.Module) -> str:
        if id(module) not in self._names:
            self._refuse(f"its {type(module).__name__} is none of its own modules")
        return self._names[id(module)]

    def _refuse(self, why: str) -> NoReturn:
        found = "; ".join(f"{part}: {what}" for part, what in self.found.items())
        kind = self.model.config.model_type
        raise AttachError(f"memory cannot work with model type {kind!r}: {why} (found: {found or 'nothing'})")

    # What is found once

    def _find_language_model(self) -> None:
        text = self.model.config.get_text_config(decoder=True)
        if why := REFUSED.get(self.model.config.model_type):
            self._refuse(why)
        if self.model.config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
            self._refuse("it is an encoder-decoder")
        if "inputs_embeds" not in inspect.signature(self.model.forward).parameters:
            self._refuse("its forward() takes no inputs_embeds")
        if self.head is None or not hasattr(self.head, "weight"):
            self._refuse("none of its modules names an output head")
        if not self.placeholders:
            takes = inspect.signature(self.model.forward).parameters
            sees = hasattr(self.model, "get_image_features") or any(name.startswith("pixel_") for name in takes)
            self._refuse("its config names no token that stands for an image" if sees else "it takes no images")
        if getattr(type(self.model), "generate", None) is not GenerationMixin.generate:
            self._refuse("its class has a generate() of its own, which need not do what transformers' does")
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            self._refuse("its forward() takes no position_ids, so rows cannot grow apart")
        try:
            kv.check(DynamicCache(config=text))
        except AttachError as error:
            self._refuse(str(error))
        self.found["language model"] = self._name(self.decoder)

    def _blank(self, noise: bool = False) -> dict[str, Any]:
        """A prompt with a blank image, or with one that is not."""
        size = (SIDE, SIDE)
        image = Image.new("RGB", size, "gray")
        if noise:  # coarse, so that some is left of it in a small image
            image = Image.effect_noise((16, 16), 100).resize(size, Image.Resampling.NEAREST).convert("RGB")
        try:
            batch = self.inputs(["?"], [[image]])
        except Exception as error:  # processors fail in any way
            self._refuse(f"its processor makes no inputs of a blank image: {reason(error)}")
        tower = self.model.get_encoder(modality="image")
        kind = next((own.dtype for own in tower.parameters() if own.is_floating_point()), self.dtype)
        return {name: cast(kind, own) for name, own in batch.items()}

    def _find_context(self, batch: dict[str, Any]) -> None:
        """Hidden states must follow from embeddings, the padding and positions, or memory would miss the rest."""
        given, entered, last, told = self._hear(batch)
        lowest = told == torch.finfo(told.dtype).min
        self._never = lowest.flatten(0, -2).all(0).nonzero().flatten()
        if not torch.allclose(self.logits(last), told, atol=1e-2, rtol=1e-2):
            self._refuse("its logits are not what its head makes of the last hidden states")
        mask, ids, embeds = given.get("attention_mask"), batch["input_ids"], given.get("inputs_embeds")
        # Image tokens that see those after them are in the cache when memory comes.
        both_ways = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
        taken = {name for name, own in given.items() if isinstance(own, Tensor | list | tuple | dict)} - GIVEN
        prompts = PROMPT_ONLY | {name for name in batch if name.startswith("pixel_")}
        if further := sorted(taken - prompts - set(self.companions(batch["input_ids"]))):
            self._refuse(f"its language model takes more than embeddings: {', '.join(further)}")
        here = torch.isin(ids, torch.tensor(list(self.placeholders.values()), device=ids.device))
        others = self._hear(self._blank(noise=True))
        self._late = not self._stand(embeds, others[0].get("inputs_embeds"), ids, here)
        if self._late and not self._stand(entered, others[1], ids, here):
            self._refuse("its images do not enter the language model in the places of their tokens")
        self.rereads = not both_ways and not taken and not self._late

    def _hear(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None, Tensor, Tensor]:
        """What the language model is called with and what enters its first layer, its last hidden states, logits."""
        given: dict[str, Any] = {}
        entered: list[Any] = []
        last: list[Tensor] = []
        first = self._first

        def enter(module: Any, args: Any, named: Any) -> None:
            entered.append(next(iter((*args, *named.values()))))

        with ExitStack() as stack, torch.no_grad():
            for handle in (
                self.decoder.register_forward_pre_hook(lambda _, args, named: given.update(named), with_kwargs=True),
                self.decoder.register_forward_hook(lambda module, args, output: last.append(output[0])),
                *([first.register_forward_pre_hook(enter, with_kwargs=True)] if first is not None else []),
            ):
                stack.callback(handle.remove)
            try:
                told = self.model(**batch).logits
            except Exception as error:  # as models do
                self._refuse(f"its forward() fails on {self._fails_on(batch)}: {reason(error)}")
        return given, next((own for own in entered if isinstance(own, Tensor)), None), last[0], told

    def _fails_on(self, batch: dict[str, Any]) -> str:
        text = batch["input_ids"][:, -1:]  # which ends the prompt, behind all images
        try:
            self.model(input_ids=text)
        except Exception:  # whatever it is given
            return "whatever it is given, text too"
        return "a blank image"

    def _stand(self, embeds: Any, others: Any, ids: Tensor, here: Tensor) -> bool:
        """Whether visual tokens stand in the places of their placeholders, other ones for another image."""
        if not isinstance(embeds, Tensor) or embeds.shape[:2] != ids.shape or others.shape != embeds.shape:
            return False
        same, moved = (embeds == self.embeddings(ids)).all(-1), (embeds != others).any(-1)
        return bool(moved.any()) and not bool((same & here | moved & ~here).any())

    def _try_two(self) -> None:
        """Images of two shapes, in prompts of their own, must be dealt out to them."""
        images = [[Image.new("RGB", (SIDE, side), "gray")] for side in (SIDE, SIDE // 2)]
        states = VisionStates()
        try:
            batch = {name: cast(self.vision_dtype, own) for name, own in self.inputs(["?"] * 2, images).items()}
            with torch.no_grad(), self.record(states, keep=False, inputs=False):
                self.model(**batch)
            states.assign([(batch["input_ids"] == self.placeholders["image"]).sum(-1).tolist()])
        except Exception as error:  # as models do
            raise AttachError(f"its images cannot be dealt out to their prompts: {reason(error)}") from error

    def _try_video(self) -> None:
        """Whether memory sees videos: the encoder's patches must be dealt out as those of images are."""
        token, states = self._media.get("video"), VisionStates()
        if token is None or self.no_video_input:
            return
        video = [Image.effect_noise((SIDE, SIDE), 100).convert("RGB") for _ in range(FRAMES)]
        for at, image in enumerate(video):
            image.info[STILL] = Still(Frame(Path("noise"), at, FRAMES), at, 2.0, FRAMES)
        told = arguments([Media(["?"], [video])])
        try:
            made = self.processor(text=[self.prompt("?", ["video"])], return_tensors="pt", **told).to(self.device)
            batch = {name: cast(self.vision_dtype, own) for name, own in made.items()}
            with torch.no_grad(), self.record(states, keep=True, inputs=False):
                self.model(**batch)
            count = int((batch["input_ids"] == token).sum())
            states.assign([[count]])
            if not count or not (self.blind or states.rows[0]):
                raise AttachError("its encoder did not see one")
        except Exception as error:  # as models do
            self.found["videos"] = f"not seen by memory: {reason(error)}"
        else:
            self._sees_videos = True

    def _find_targets(self) -> None:
        layers = self._layers
        self._targets = {
            "short": "" if self.blind else self.encoder.targets,
            "long": targets_in(self._name(layers), list(layers)) if layers is not None else "",
        }
        for kind, pattern in self._targets.items():
            if not pattern and not (kind == "short" and self.blind):
                self._refuse(f"no linear layers that make queries and values are known, for the LoRA of {kind} memory")

    # Anatomy

    def positions(self, inputs: dict[str, Any]) -> Tensor:
        told, ids, mask = super().positions(inputs), inputs["input_ids"], inputs["attention_mask"]
        kept = self.model.prepare_inputs_for_generation(ids, attention_mask=mask, position_ids=told, use_cache=True)
        if (own := kept.get("position_ids")) is None:  # its language model counts for itself, padding included
            return torch.arange(told.shape[-1], device=told.device).expand_as(told)
        return own  # type: ignore[no-any-return]

    @property
    def decoder(self) -> nn.Module:
        told: Any = super().decoder  # of some models it has a head of its own, or is the whole
        parts = [told.get_decoder(), *(own for own in told.modules() if isinstance(own, PreTrainedModel))]
        return next(own for own in parts if self.head not in own.modules())  # type: ignore[no-any-return]

    @property
    def _layers(self) -> nn.ModuleList | None:
        return blocks_in(self.decoder, getattr(self._text_config, "num_hidden_layers", 0))

    @property
    def _first(self) -> nn.Module | None:
        return None if self._layers is None else self._layers[0]

    @property
    def entrance(self) -> nn.Module | None:
        return self._first if self._late else None

    def logits(self, states: Tensor) -> Tensor:
        logits = super().logits(states)  # of some columns the model itself says that they are never to be
        return logits.index_fill(-1, self._never.to(logits.device), torch.finfo(logits.dtype).min)

    @property
    def vision_width(self) -> int:
        return self.width if self.blind else self.encoder.width

    @property
    def merge(self) -> int:
        return 1 if self.blind else self.encoder.merge

    @property
    def placeholders(self) -> dict[str, int]:
        config = self.model.config
        named = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        known = [token for token in named if isinstance(token, int)]
        seen = (
            {}
            if not self._sees_videos
            else {medium: token for medium, token in self._media.items() if medium == "video"}
        )
        return {"image": known[0], **seen} if known else {}

    @property
    def unseen(self) -> dict[str, int]:  # type: ignore[override]
        return {medium: token for medium, token in self._media.items() if token not in self.placeholders.values()}

    @property
    def _media(self) -> dict[str, int]:
        """Ids that stand for what is no image."""
        config, found = self.model.config, {}
        for medium in ("video", "audio"):
            token = getattr(config, f"{medium}_token_id", getattr(config, f"{medium}_token_index", None))
            if isinstance(token, int):
                found[medium] = token
        return found

    @property
    def no_videos(self) -> str:
        told = super().no_videos
        return self.found.get("videos", told) if told else ""

    @property
    def lora_targets(self) -> dict[str, str]:
        return self._targets

    @property
    def vision_device(self) -> torch.device:
        return self.device if self.blind else self.encoder.device

    @property
    def vision_dtype(self) -> torch.dtype:
        return self.dtype if self.blind else self.encoder.dtype

    # Memory's ways in

    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.blind else self.encoder.record(states, keep=keep, inputs=inputs)

    def encode(self, inputs: dict[str, Tensor]) -> None:
        self.encoder.encode(inputs)

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        return self.encoder.carry(extra, states, rows)

    def project(self, tokens: Tensor) -> Tensor:
        return self.encoder.project(tokens)
