"""Any image-text-to-text model of transformers, by what its public methods give and how its vision encoder behaves.

A blank image is encoded once when memory is attached. It tells what the encoder's blocks are called with, which of
them the projector reads, and which patches make up each language token. From then on extra tokens go through the
blocks on calls of their own, and through all that follows in the places of the blank image's patches.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vismem_core.base import cache as kv
from vismem_core.base.backbone import Backbone
from vismem_core.base.vision import VisionStates, attend
from vismem_core.errors import AttachError
from vismem_core.plugins import reason

from .probing import Call, blocks_in, cast, entry, features, heads, seen_keys, sources, targets_in
from .tiles import listen

Run = Callable[[], Any]
"""The attention that a block would have run."""
SIDE = 224
"""Pixels of the blank image's sides, before the processor has resized it."""
GIVEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "cache", "past_key_values"}
"""What memory knows to give to a language model."""
REFUSED = {
    "cohere2_vision": "its features' last bits depend on whether its weights need gradients, so off is not the base",
    "emu3": "transformers makes other tokens of images in a batch than of one alone",
    "minimax_m3_vl": "transformers cuts its sparse attention into blocks by columns, so padded prompts have others than alone",
    "unlimited_ocr": "transformers shows padded prompts their padding once as many tokens are written as its window has",
    "hunyuan_vl": "transformers gives its images other positions in a batch than alone",
}
"""Types that break a promise in ways that calling them once does not show."""
PROMPT_ONLY = {"deepstack_visual_embeds", "visual_pos_masks", "moe_mm_token_type_ids"}
"""What language models take beside embeddings of images alone: what follows a prompt has none of it."""
LOOKED_AT = 32
"""How many of the blank image's language tokens are looked into, at most."""


class Generic(Backbone):
    """A decoder-only language model behind a vision encoder with one stack of blocks, and any projector that makes
    each language token of patches of its own. Images only.

    Attributes:
        found: what was found of the model, by part; refusals say it too.
    """

    name = "generic"
    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.found: dict[str, str] = {}
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._find_language_model()
        batch = self._blank()
        self._find_positions()
        self._find_context(batch)
        try:
            self._find_encoder()
            self._find_calls(batch)
            self._find_projector()
        except AttachError:
            self.blind = self._why
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
        self._why = why
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
            self._refuse("get_output_embeddings() gives no head")
        if not self.placeholders:
            self._refuse("its config names no token that stands for an image")
        if getattr(type(self.model), "generate", None) is not GenerationMixin.generate:
            self._refuse("its class has a generate() of its own, which need not do what transformers' does")
        try:
            kv.check(DynamicCache(config=text))
        except AttachError as error:
            self._refuse(str(error))
        self.found["language model"] = self._name(self.decoder)

    def _find_encoder(self) -> None:
        base, tower = self.model.base_model, self.model.get_encoder(modality="image")
        self.owner = base if hasattr(base, "get_image_features") else self.model
        if not hasattr(self.owner, "get_image_features"):
            self._refuse("it has no get_image_features()")
        if tower is None or tower is self.model or tower is base:
            self._refuse("it has no vision encoder of its own")
        self.found["vision encoder"] = self._name(tower)
        stack = blocks_in(tower)
        if stack is None:
            self._refuse("its vision encoder has no list of blocks with attention")
        self.stack: list[Any] = list(stack)
        self.found["blocks"] = f"{len(self.stack)} in {self._name(stack)}"
        self._stack_name = self._name(stack)
        self._kinds = {own.config._attn_implementation for own in tower.modules() if hasattr(own, "config")}

    def _blank(self) -> dict[str, Any]:
        """A prompt with a blank image."""
        try:
            batch = self.inputs(["?"], [[Image.new("RGB", (SIDE, SIDE), "gray")]])
        except Exception as error:  # processors fail in any way
            self._refuse(f"its processor makes no inputs of a blank image: {reason(error)}")
        tower = self.model.get_encoder(modality="image")
        kind = next((own.dtype for own in tower.parameters() if own.is_floating_point()), self.dtype)
        return {name: cast(kind, own) for name, own in batch.items()}

    def _find_calls(self, batch: dict[str, Any]) -> None:
        self._parameters = list(inspect.signature(self.owner.get_image_features).parameters)
        self.blank = {name: cast(self.vision_dtype, own) for name, own in batch.items() if name in self._parameters}
        calls: dict[int, Call] = {}
        seen: Counter[int] = Counter()

        def look(index: int, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any) -> Any:
            seen[index] += query.shape[0] * query.shape[2]
            return run()

        with ExitStack() as stack, torch.no_grad():
            for index, block in enumerate(self.stack):
                stack.callback(Call.hear(block, index, calls).remove)
            stack.enter_context(self._attending(look))
            try:
                self.owner.get_image_features(**self.blank)
            except Exception as error:  # and so do models
                self._refuse(f"its get_image_features() fails on a blank image: {reason(error)}")
        self.calls = [calls[index] for index in sorted(calls)]
        shapes = {call.shape for call in self.calls}
        if len(calls) != len(self.stack) or len(shapes) != 1 or len(self.calls[0].shape) not in (2, 3):
            self._refuse("its blocks do not all take the same patches in rows of one width")
        if any(seen[index] != call.shape[:-1].numel() for index, call in calls.items()):
            self._refuse("its blocks' attention does not see each patch once, or is not transformers' own interface")

    def _find_positions(self) -> None:
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            self._refuse("its forward() takes no position_ids, so rows cannot grow apart")

    def _find_context(self, batch: dict[str, Any]) -> None:
        """Hidden states must follow from embeddings, the padding and positions, or memory would miss the rest."""
        given: dict[str, Any] = {}
        last: list[Tensor] = []
        handle = self.decoder.register_forward_pre_hook(lambda _, args, named: given.update(named), with_kwargs=True)
        after = self.decoder.register_forward_hook(lambda module, args, output: last.append(output[0]))
        try:
            with torch.no_grad():
                told = self.model(**batch)
        except Exception as error:  # as models do
            self._refuse(f"its forward() fails on a blank image: {reason(error)}")
        finally:
            handle.remove()
            after.remove()
        if not torch.allclose(self.logits(last[0]), told.logits, atol=1e-2, rtol=1e-2):
            self._refuse("its logits are not what its head makes of the last hidden states")
        mask = given.get("attention_mask")
        # Image tokens that see those after them are in the cache when memory comes.
        both_ways = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
        taken = {name for name, own in given.items() if isinstance(own, Tensor | list | tuple)} - GIVEN
        self.rereads = not both_ways and not taken
        if further := sorted(taken - PROMPT_ONLY - set(self.companions(batch["input_ids"]))):
            self._refuse(f"its language model takes more than embeddings: {', '.join(further)}")
        embeds, ids = given.get("inputs_embeds"), batch["input_ids"]
        here = torch.isin(ids, torch.tensor(list(self.placeholders.values()), device=ids.device))
        entered = isinstance(embeds, Tensor) and embeds.shape[:2] == ids.shape
        if not entered or not here.any() or (embeds == self.embeddings(ids))[here].all(-1).any():
            self._refuse("its images do not enter the language model in the places of their tokens")

    def _find_projector(self) -> None:
        generator = torch.Generator().manual_seed(0)
        place, kind = self.vision_device, self.vision_dtype
        noise = [torch.randn(call.shape, generator=generator) for call in self.calls]
        leaves = [own.to(place, kind).requires_grad_() for own in noise]
        with torch.enable_grad():
            tokens = self._behind(leaves)
            told = torch.randn(tokens.shape[-1], generator=generator).to(tokens)
            patches = [sources((own * told).sum(), leaves) for own in tokens[:LOOKED_AT]]
        self.layers = sorted({layer for own in patches for layer in own})
        made = [own.get(self.layers[-1], []) if self.layers else [] for own in patches]
        readers = Counter(patch for own in made for patch in own)
        alone = [own and all(readers[patch] == 1 for patch in own) for own in made]
        sizes = Counter(len(own) for own, free in zip(made, alone, strict=True) if free)
        if not sizes:
            self._refuse("its projector makes no language token of patches that are its own")
        self.merge_ = sizes.most_common(1)[0][0]
        self.places = [at for at, own in enumerate(made) if alone[at] and len(own) == self.merge_]
        self.groups = [made[at] for at in self.places]
        self.found["projector"] = f"reads block {', '.join(map(str, self.layers))}, {self.merge_} patches to a token"
        try:
            extra = torch.zeros(2, self.merge_, self.vision_width, device=place, dtype=kind)
            with torch.no_grad():
                with self.record(VisionStates(), keep=False, inputs=False):
                    self.encode(self.blank)
                self.project(self.carry(extra, VisionStates(rows=[[], []]), [0, 1]))
                self._try_projector()
                self._try_two()
        except Exception as error:
            self._refuse(f"extra tokens do not pass its vision encoder or projector: {reason(error)}")

    def _try_projector(self) -> None:
        """Each vector must be made of its own tokens alone."""
        width, kind = self.vision_width * len(self.layers), self.vision_dtype
        noise = torch.randn(1, 2 * self.merge_, width, generator=torch.Generator().manual_seed(1))
        extra = noise.to(self.vision_device, kind)
        alone = torch.cat([self.project(own) for own in extra.split(self.merge_, dim=1)], dim=1)
        if not torch.allclose(self.project(extra), alone, atol=1e-2, rtol=1e-2):
            raise AttachError("its projector makes a vector of more than the vector's own tokens")

    def _try_two(self) -> None:
        """Images of two shapes, in prompts of their own, must be dealt out to them."""
        images = [Image.new("RGB", (SIDE, side), "gray") for side in (SIDE, SIDE // 2)]
        batch = {
            name: cast(self.vision_dtype, own)
            for name, own in self.inputs(["?"] * 2, [[one] for one in images]).items()
        }
        states = VisionStates()
        with self.record(states, keep=False, inputs=False):
            self.model(**batch)
        token = self.placeholders["image"]
        states.assign([(batch["input_ids"] == token).sum(-1).tolist()])

    def _find_targets(self) -> None:
        layers = blocks_in(self.decoder)
        self._targets = {
            "short": "" if self.blind else targets_in(self._stack_name, self.blocks),
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
        decoder: Any = super().decoder  # of some models it has a head of its own, or is the whole
        return decoder.get_decoder()  # type: ignore[no-any-return]

    @property
    def blocks(self) -> list[Any]:
        """The blocks that the features come from; encoders have some beyond."""
        return self.stack[: max(self.layers) + 1]

    @property
    def vision_width(self) -> int:
        return self.width if self.blind else int(self.calls[0].shape[-1])

    @property
    def merge(self) -> int:
        return 1 if self.blind else self.merge_

    @property
    def placeholders(self) -> dict[str, int]:
        config = self.model.config
        named = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        known = [token for token in named if isinstance(token, int)]
        return {"image": known[0]} if known else {}

    @property
    def unseen(self) -> dict[str, int]:  # type: ignore[override]
        config, found = self.model.config, {}
        for medium in ("video", "audio"):
            token = getattr(config, f"{medium}_token_id", getattr(config, f"{medium}_token_index", None))
            if isinstance(token, int) and token not in self.placeholders.values():
                found[medium] = token
        return found

    @property
    def lora_targets(self) -> dict[str, str]:
        return self._targets

    @property
    def _norm(self) -> Any:
        return next(own for own in self.stack[0].parameters() if own.ndim == 1 and own.is_floating_point())

    @property
    def vision_device(self) -> torch.device:
        return self.device if self.blind else self._norm.device

    @property
    def vision_dtype(self) -> torch.dtype:
        return self.dtype if self.blind else self._norm.dtype

    # Memory's ways in

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        if self.blind:
            yield
            return
        lengths: list[int] = []
        kept: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)

        def look(index: int, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any) -> Any:
            seen = seen_keys(key, mask)
            if index == 0:
                lengths.extend(seen.sum(-1).tolist())
            if keep and index < len(self.blocks):
                own_keys, own_values = (heads(own, query.shape[1])[seen] for own in (key, value))
                kept[index].append((own_keys, own_values))
            return run()

        def leave(result: Any, *args: Any, **kwargs: Any) -> None:
            named = dict(zip(self._parameters, args, strict=False)) | kwargs
            patches, tokens = self._counts(features(result), lengths, named.get("image_grid_thw"))
            states.patches += patches
            states.tokens += tokens
            for index in sorted(kept):
                states.extend(index, *map(torch.cat, zip(*kept[index], strict=True)))
            if inputs:
                states.inputs.append({name: own for name, own in named.items() if own is not None})
            lengths.clear()
            kept.clear()

        with self._attending(look), listen(self.owner, "get_image_features", leave):
            yield

    def _counts(self, made: list[Tensor], lengths: list[int], grid: Tensor | None) -> tuple[list[int], list[int]]:
        """Patches and language tokens of each image."""
        tokens, patches = [len(own) for own in made], lengths
        if grid is not None:
            patches = grid.prod(-1).tolist()
        elif len(lengths) != len(tokens) > 1:
            patches = [own * self.merge for own in tokens]
        if len(patches) != len(tokens) and sum(patches) == sum(tokens) * self.merge:  # tokens of all images in one
            tokens = [own // self.merge for own in patches]
        if sum(patches) != sum(lengths) or len(patches) != len(tokens):
            raise AttachError(f"cannot tell which of {sum(lengths)} patches belong to which of {len(tokens)} images")
        return list(patches), tokens

    def encode(self, inputs: dict[str, Tensor]) -> None:
        self.owner.get_image_features(**inputs)

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        where = states.gather(rows)

        def mix(index: int, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any) -> Any:
            count = query.shape[1]
            scale = (scaling or query.shape[-1] ** -0.5) * query.shape[-1] ** 0.5
            split = (heads(own, count).reshape(*extra.shape[:2], count, -1) for own in (query * scale, key, value))
            queries, keys, values = (own.transpose(1, 2) for own in split)
            mixed = attend(queries, keys, values, states, index, where)
            return mixed.reshape(*query.transpose(1, 2).shape[:3], -1), None

        passed = []
        with self._attending(mix):
            for block, call in zip(self.blocks, self.calls, strict=False):
                extra = call.again(block, extra)
                passed.append(extra)
        return torch.cat([passed[layer].to(extra.device) for layer in self.layers], dim=-1)

    def project(self, tokens: Tensor) -> Tensor:
        vectors = rearrange(tokens, "r (n patches) D -> (r n) patches D", patches=self.merge)
        made = torch.cat([self._in_place(own) for own in vectors.split(len(self.groups))])
        return rearrange(made, "(r n) d -> r n d", r=len(tokens))

    def _in_place(self, vectors: Tensor) -> Tensor:
        """(n, merge, D), at most as many as the blank image has groups of patches -> (n, d)."""
        index = torch.tensor(self.groups[: len(vectors)], device=vectors.device).flatten()
        outputs: list[Tensor | None] = [None] * len(self.calls)
        for layer, own in zip(self.layers, vectors.flatten(0, 1).split(self.vision_width, dim=-1), strict=True):
            whole = own.new_zeros(self.calls[layer].shape[:-1].numel(), self.vision_width)
            outputs[layer] = whole.index_copy(0, index, own).view(self.calls[layer].shape)
        return self._behind(outputs)[self.places[: len(vectors)]]

    def _behind(self, outputs: Sequence[Tensor | None]) -> Tensor:
        """The blank image's language tokens (T, d) with other outputs of the blocks; None: their input."""
        with ExitStack() as stack:
            for block, call, output in zip(self.stack, self.calls, outputs, strict=True):
                stack.enter_context(call.instead(block, output))
            blank = {name: cast(self.vision_dtype, own) for name, own in self.blank.items()}
            return torch.cat(features(self.owner.get_image_features(**blank)))

    @contextmanager
    def _attending(self, instead: Callable[..., Any]) -> Iterator[None]:
        """``instead(index, run, query, key, value, mask, scaling)`` is called for attention in the encoder's blocks."""
        place = {id(own): index for index, block in enumerate(self.stack) for own in block.modules()}
        with ExitStack() as stack:
            for kind in self._kinds:
                usual = ALL_ATTENTION_FUNCTIONS.get(kind)

                def attention(
                    module: Any,
                    query: Tensor,
                    key: Tensor,
                    value: Tensor,
                    *args: Any,
                    _usual: Any = usual,
                    **named: Any,
                ) -> Any:
                    own = _usual or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
                    run = partial(own, module, query, key, value, *args, **named)
                    if id(module) not in place:
                        return run()
                    mask = args[0] if args else named.get("attention_mask")
                    return instead(place[id(module)], run, query, key, value, mask, named.get("scaling"))

                stack.enter_context(entry(ALL_ATTENTION_FUNCTIONS._local_mapping, kind, attention))
            yield
