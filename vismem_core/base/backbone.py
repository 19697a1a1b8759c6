"""What VisMem must know of one VLM family: the interface a backbone plugin implements."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, DynamicCache

from vismem_core.errors import AttachError, DataError
from vismem_core.plugins import reason

from . import cache as kv
from . import chat, media
from .images import Picture, decode
from .media import Media
from .vision import VisionStates

NO_TOKEN = -1
"""In place of an id: a vector that is no token's."""


class Backbone(ABC):
    """One instance around one loaded model. It holds data and small methods, no decoding and no training.

    What is written here fits most transformers image-text-to-text models; a family overrides what differs and must
    say how extra tokens go through its vision encoder (:meth:`record` and :meth:`carry`).

    Shapes: B rows, L tokens, d the language model's width, D the vision encoder's width, E extra tokens.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    blind: str = ""
    """Why extra tokens have no way through the vision encoder, where they have none: then short memory is formed of the
    projected visual tokens, by a former that stands alone."""
    unseen: Mapping[str, int] = {}
    """Media whose patches short memory does not see, and the id of the token that stands for one in a prompt."""
    video_pixels: ClassVar[str] = "pixel_values_videos"
    """Under which name a video's pixels enter; where it is that of images, its tokens are those of images too."""
    rereads: bool = True
    """Whether the language model's states follow from embeddings, padding and positions alone, so that a prompt can be
    read again, as ``context="recompute"`` does."""
    undivided: ClassVar[str] = ""
    """Why processes cannot hold a base together (:mod:`vismem_core.base.tensor`), where transformers' plan errs."""
    packs: bool = False
    """Whether the language model's attention is plain ``sdpa`` and gets its keyword arguments from ``forward``, so that
    latents can enter in the neighbours' pass (:mod:`vismem_core.decoding.packing`) instead of in one of their own."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Whether this class knows ``model`` (by default: its ``config.model_type`` is listed)."""
        return getattr(model.config, "model_type", None) in cls.model_types

    @classmethod
    def load(cls, source: str, **options: Any) -> tuple[Any, Any]:
        """Model and processor from a hub id or a folder; ``options`` go to ``from_pretrained``."""
        shared = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
        processor = AutoProcessor.from_pretrained(source, **shared)
        return AutoModelForImageTextToText.from_pretrained(source, **options).eval(), processor

    @classmethod
    def outlook(cls, config: Any) -> tuple[bool | None, str, dict[str, str]]:
        """Whether memory would attach to a model of this configuration, None if only the model can tell; and why.

        With what it would be ``without``: settings that are refused, and why.
        """
        return True, "its family has an adapter of its own", {}

    # Anatomy

    @property
    def decoder(self) -> nn.Module:
        """The bare language model; gives ``last_hidden_state`` (B, L, d) after its final norm."""
        return self.model.get_decoder()  # type: ignore[no-any-return]

    @property
    def entrance(self) -> nn.Module | None:
        """The module whose first argument (B, L, d) has visual tokens in their places, where what the decoder is called
        with has none; by default the decoder's embeddings have."""
        return None

    @property
    def embeddings(self) -> Any:
        """The input embedding, a module with ``weight`` (V, d)."""
        return self.model.get_input_embeddings()

    @property
    def head(self) -> Any:
        """The output head, a module (.., d) -> (.., V) with ``weight`` (V, d)."""
        return head_of(self.model)

    def logits(self, states: Tensor) -> Tensor:
        """Logits (.., V) of last hidden states (.., d): the head's, scaled and capped where the model does so."""
        config, logits = self._text_config, self.head(states)
        if (scale := getattr(config, "output_multiplier", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits  # type: ignore[no-any-return]

    @cached_property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def width(self) -> int:
        """d"""
        return int(self.embeddings.weight.shape[1])

    @property
    @abstractmethod
    def vision_width(self) -> int:
        """D"""

    @property
    @abstractmethod
    def merge(self) -> int:
        """Vision tokens that the projector merges into one language token."""

    @property
    @abstractmethod
    def placeholders(self) -> dict[str, int]:
        """Id of the token that stands for one visual token in a prompt, by medium (``image``, ``video``)."""

    @property
    def media(self) -> list[int]:
        """The ids that stand for what is no text, as far as the head knows them."""
        ids = [*self.placeholders.values(), *self.unseen.values()]
        return [token for token in ids if token < len(self.head.weight)]

    @property
    @abstractmethod
    def lora_targets(self) -> dict[str, str]:
        """Regular expressions over module names: ``short`` in the vision encoder, ``long`` in the language model."""

    @property
    def device(self) -> torch.device:
        """Where embeddings enter the language model."""
        return self.embeddings.weight.device  # type: ignore[no-any-return]

    @property
    @abstractmethod
    def vision_device(self) -> torch.device:
        """Where extra tokens enter the vision encoder."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the embeddings that enter the language model."""
        return self.embeddings.weight.dtype  # type: ignore[no-any-return]

    @property
    @abstractmethod
    def vision_dtype(self) -> torch.dtype:
        """Precision of the tokens inside the vision encoder."""

    def embedding_scale(self) -> float:
        """Root mean square of what tokens enter as, from the first rows of the embedding table."""
        first = torch.arange(min(4096, len(self.embeddings.weight)), device=self.device)
        with torch.no_grad():  # the module is asked, since some multiply what their tables hold
            return float(self.embeddings(first).float().pow(2).mean().sqrt())

    # Inputs

    @property
    def no_videos(self) -> str:
        """Why a video enters as its frames, each an image; empty where it enters as the model's own video input."""
        seen = "video" in self.placeholders or self.video_pixels == "pixel_values"
        return self.no_video_input or ("" if seen else "memory does not see this model's own")

    @cached_property
    def no_video_input(self) -> str:
        """Why the model has no video input that a prompt can use; empty where it has."""
        if getattr(self.processor, "video_processor", None) is None:
            return "its processor takes none"
        if not chat.shows(self.processor, "video"):
            return "its chat template has no place for one"
        takes = inspect.signature(type(self.model).forward).parameters
        return "" if self.video_pixels in takes else "its forward() takes none"

    def prompt(self, text: str, images: int | Sequence[str], before: Sequence[tuple[str, str]] = ()) -> str:
        """The chat-formatted prompt for ``text`` over ``images`` images, ready for the answer to follow.

        Each image stands where a text has its ``<image>``, as published data has it; without any, and where they
        lead, the images are in front as the chat template puts them.

        Args:
            images: how many; or what each is, ``image`` or ``video``, where some are videos (and :attr:`no_videos` is
                empty).
            before: earlier turns, role (``system``, ``user`` or ``assistant``) and text of each. Images without a mark
                are the first user's.

        Raises:
            AttachError: the marks are not as many as the images, or the template has no place for images.
        """
        return chat.prompt(self.processor, text, images, before)

    @cached_property
    def end_of_turn(self) -> int:
        """The id that ends an answer: the first of those that end ``generate`` in what the chat template writes after
        an assistant's turn.

        Where it writes none of them, the tokenizer's own end counts if it ends ``generate``, or else the first that
        does.

        Raises:
            AttachError: the model names no token that ends an answer.
        """
        return chat.end_of_turn(self.processor, self.model.generation_config.eos_token_id)

    @cached_property
    def opening(self) -> list[int]:
        """Ids that the chat template writes before an answer, such as those of ``<|im_start|>assistant``."""
        return chat.opening(self.processor)

    def inputs(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Picture]] = (),
        before: Sequence[Sequence[tuple[str, str]]] = (),
    ) -> BatchFeature:
        """Left-padded model inputs for ``generate``, on the model's device.

        Args:
            prompts: the questions of the rows.
            images: each row's images, none by default; the model sees them as a person does
                (:mod:`vismem_core.base.images`). All frames of a video side by side are one video, where the model
                takes videos (:attr:`no_videos`).
            before: each row's earlier turns, none by default (:meth:`prompt`).

        Raises:
            AttachError: the processor or its chat template does not take them.
            DataError: an image that does not decode.
        """
        if isinstance(prompts, str) or any(isinstance(own, Picture) for own in images):
            raise AttachError("prompts are a list of texts, and images a list for each: inputs([text], [[image]])")
        images = images or [[] for _ in prompts]
        if len(prompts) != len(images):
            raise AttachError(f"{len(prompts)} prompts, and lists of images for {len(images)}")
        decoded = [[_decoded(image, row, at) for at, image in enumerate(own)] for row, own in enumerate(images)]
        rows: list[Media] = []
        try:
            told = [own or () for own in before] or [()] * len(prompts)
            asked = list(zip(prompts, decoded, told, strict=True))
            rows += [self._shown([*(said for _, said in turns), text], own) for text, own, turns in asked]
            texts = [self._asked(row, turns) for row, turns in zip(rows, told, strict=True)]
            self.processor.tokenizer.padding_side = "left"
            batch = self.processor(text=texts, padding=True, return_tensors="pt", **media.arguments(rows))
        except Exception as error:  # the model's own code; often a chat template without a place for images
            raise AttachError(f"the processor takes no such {media.named(rows)}: {reason(error)}") from error
        return batch.to(self.device)  # type: ignore[no-any-return]

    def _shown(self, texts: Sequence[str], pictures: Sequence[Image]) -> Media:
        together = Media.of(texts, pictures)
        if together.videos and self.no_videos:
            warnings.warn(f"videos enter this model as images, a frame each: {self.no_videos}", stacklevel=2)
        return Media(list(texts), list(pictures)) if self.no_videos else together

    def _asked(self, row: Media, turns: Sequence[tuple[str, str]]) -> str:
        said = [(role, text) for (role, _), text in zip(turns, row.texts, strict=False)]
        return self.prompt(row.texts[-1], row.kinds if row.videos else len(row.shown), *([said] if said else []))

    def positions(self, inputs: dict[str, Any]) -> Tensor:
        """Position ids of a prompt as ``generate`` would make them, (.., B, L)."""
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        return self.model._prepare_position_ids_for_generation(inputs["input_ids"], rest)  # type: ignore[no-any-return]

    # Memory's ways in

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (.., d) of text, as they enter the language model."""
        return self.embeddings(ids)  # type: ignore[no-any-return]

    @property
    def embedders(self) -> dict[nn.Module, int]:
        """The modules that the model embeds tokens with, and for each an id that it knows."""
        return {self.embeddings: 0}

    @property
    def further_tables(self) -> dict[nn.Module, int]:
        """Where else the language model looks tokens up by their ids, and the id to look up for what is no token."""
        return {}

    def companions(self, ids: Tensor) -> dict[str, Tensor]:
        """What the language model takes beside the embeddings of such tokens, as named arguments.

        Args:
            ids: (R, E); ``NO_TOKEN`` where a vector stands that has none, such as a latent. Memory tokens are none of
                the model's either.
        """
        return {}

    @abstractmethod
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> AbstractContextManager[None]:
        """Fill ``states`` while the vision encoder runs inside the context.

        Args:
            keep: store every block's keys and values.
            inputs: store the arguments of the encoder's calls, for :meth:`encode`.
        """

    @abstractmethod
    def encode(self, inputs: dict[str, Tensor]) -> None:
        """Run the vision encoder again on arguments that :meth:`record` stored."""

    @abstractmethod
    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        """Take extra tokens through the vision encoder, where they attend to all patches of their row's images.

        Args:
            extra: (R, E, D)
            states: what :meth:`record` filled, for the whole batch.
            rows: the R rows of the batch that ``extra`` belongs to.

        Returns:
            (R, E, D), as the encoder hands its tokens to the projector; wider than D where it hands over the states
            of several blocks side by side.
        """

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """The model's own projector: (R, N * merge, D) -> (R, N, d)."""

    def continue_(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None,
        **companions: Tensor,
    ) -> Tensor:
        """Last hidden states of the language model over ``embeds`` that follow a cache, which grows.

        Args:
            embeds: (R, E, d)
            attention_mask: (R, past + E); or additive, what each token may look at, (R, 1, E, past + E).
            positions: (.., R, E)
            companions: what comes with ``embeds`` (:meth:`companions`); by default they are no tokens'.

        Returns:
            (R, E, d), after the final norm, on :attr:`device` wherever the last layer is.
        """
        alone = torch.full(embeds.shape[:2], NO_TOKEN, device=embeds.device)
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=positions,
            **kv.given(self.decoder, cache),
            use_cache=cache is not None,
            **(companions or self.companions(alone)),
        )
        return output.last_hidden_state.to(self.device)  # type: ignore[no-any-return]


def head_of(model: Any) -> Any:
    """The output head of a model, which in some only their language model knows; None without any."""
    parts = (own for own in model.modules() if hasattr(own, "get_output_embeddings"))
    return next((head for own in parts if (head := own.get_output_embeddings()) is not None), None)


def _decoded(image: Picture, row: int, at: int) -> Image:
    try:
        return decode(image)
    except DataError as error:
        raise DataError(f"image {at} of prompt {row} {error}") from error
