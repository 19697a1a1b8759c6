"""A vision encoder of which nothing is known but what it does with a blank image.

The blank image is encoded once. It tells what the encoder's blocks are called with, which of them the projector reads,
and which patches make up each language token. From then on extra tokens go through the blocks on calls of their own,
and through all that follows in the places of the blank image's patches.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vismem_core.base.vision import VisionStates, attend
from vismem_core.errors import AttachError
from vismem_core.plugins import reason

from .probing import Call, blocks_in, cast, entry, features, heads, seen_keys, sources, targets_in
from .tiles import listen

Run = Callable[[], Any]
"""The attention that a block would have run."""
LOOKED_AT = 32
"""How many of the blank image's language tokens are looked into, at most."""
IMAGES = 16
"""Copies of the blank image in one pass of the projector, at most."""


class Encoder:
    """One stack of blocks with attention, and any projector that makes each language token of patches of its own.

    Args:
        model: whose encoder it is.
        batch: what the processor makes of a prompt with a blank image.
        found: is told what was found, by part.

    Attributes:
        stack: the encoder's blocks.
        layers: the blocks that the projector reads.
        merge: patches that make up one language token.
        images: blank images that vectors pass the projector in at a time, at most; 1 where they do not pass alike.

    Raises:
        AttachError: extra tokens have no way through it, and why.
    """

    def __init__(self, model: Any, batch: dict[str, Any], found: dict[str, str]) -> None:
        self.found, self.images = found, IMAGES
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._find_stack(model)
        self._find_calls(batch)
        self._find_projector()
        found["projector"] = f"reads block {', '.join(map(str, self.layers))}, {self.merge} patches to a token"
        self._try_projector()

    @property
    def blocks(self) -> list[Any]:
        """The blocks that the features come from; encoders have some beyond."""
        return self.stack[: max(self.layers) + 1]

    @property
    def width(self) -> int:
        """D"""
        return int(self.calls[0].shape[-1])

    @property
    def targets(self) -> str:
        """A regular expression for the linear layers that make queries and values."""
        return targets_in(self._path, self.blocks)

    @property
    def device(self) -> torch.device:
        return self._norm.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self._norm.dtype  # type: ignore[no-any-return]

    @property
    def _norm(self) -> Any:
        return next(own for own in self.stack[0].parameters() if own.ndim == 1 and own.is_floating_point())

    # What is found once

    def _find_stack(self, model: Any) -> None:
        base, tower = model.base_model, model.get_encoder(modality="image")
        self.owner = base if hasattr(base, "get_image_features") else model
        if not hasattr(self.owner, "get_image_features"):
            raise AttachError("it has no get_image_features()")
        if tower is None or tower is model or tower is base:
            raise AttachError("it has no vision encoder of its own")
        self.found["vision encoder"] = self._name(tower)
        stack = blocks_in(tower)
        if stack is None:
            raise AttachError("its vision encoder has no list of blocks with attention")
        self.stack: list[Any] = list(stack)
        self._path = self._name(stack)
        self.found["blocks"] = f"{len(self.stack)} in {self._path}"
        self._kinds = {own.config._attn_implementation for own in tower.modules() if hasattr(own, "config")}

    def _name(self, module: Any) -> str:
        if id(module) not in self._names:
            raise AttachError(f"its {type(module).__name__} is none of its own modules")
        return self._names[id(module)]

    def _find_calls(self, batch: dict[str, Any]) -> None:
        ways = {kind: getattr(self.owner, f"get_{kind}_features", None) for kind in ("image", "video")}
        self._parameters = {kind: list(inspect.signature(way).parameters) for kind, way in ways.items() if way}
        self.blank = {name: cast(self.dtype, own) for name, own in batch.items() if name in self._parameters["image"]}
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
                raise AttachError(f"its get_image_features() fails on a blank image: {reason(error)}") from error
        self.calls = [calls[index] for index in sorted(calls)]
        shapes = {call.shape for call in self.calls}
        if len(calls) != len(self.stack) or len(shapes) != 1 or len(self.calls[0].shape) not in (2, 3):
            raise AttachError("its blocks do not all take the same patches in rows of one width")
        if any(seen[index] != call.shape[:-1].numel() for index, call in calls.items()):
            raise AttachError(
                "its blocks' attention does not see each patch once, or is not transformers' own interface"
            )

    def _find_projector(self) -> None:
        generator = torch.Generator().manual_seed(0)
        place, kind = self.device, self.dtype
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
            raise AttachError("its projector makes no language token of patches that are its own")
        self.merge = sizes.most_common(1)[0][0]
        self.places = [at for at, own in enumerate(made) if alone[at] and len(own) == self.merge]
        self.groups = [made[at] for at in self.places]

    def _try_projector(self) -> None:
        """Extra tokens must pass, and each vector be made of its own tokens alone."""
        generator, kind = torch.Generator().manual_seed(1), self.dtype
        count = (len(self.groups) + 1) * self.merge
        noise = torch.randn(1, count, self.width * len(self.layers), generator=generator)
        extra = noise.to(self.device, kind)
        zeros = extra.new_zeros(2, self.merge, self.width)
        try:
            with torch.no_grad():
                with self.record(VisionStates(), keep=False, inputs=False):
                    self.encode(self.blank)
                self.project(self.carry(zeros, VisionStates(rows=[[], []]), [0, 1]))
                parts = extra.split(self.merge, dim=1)
                told = [0, 1, len(parts) - 1]  # the last one in an image of its own
                alone = torch.cat([self.project(parts[at]) for at in told], dim=1)
                try:
                    if not _alike(self.project(extra)[:, told], alone):
                        self.images = 1
                except Exception:  # blank images do not pass side by side
                    self.images = 1
                whole = self.project(extra)[:, told]
        except Exception as error:  # as models do
            raise AttachError(f"extra tokens do not pass its vision encoder or projector: {reason(error)}") from error
        if not _alike(whole, alone):
            raise AttachError("its projector makes a vector of more than the vector's own tokens")

    # Memory's ways in

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
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

        def leave(kind: str, result: Any, *args: Any, **kwargs: Any) -> None:
            if not lengths:  # a method for images that it called has noted them
                return
            named = dict(zip(self._parameters[kind], args, strict=False)) | kwargs
            grid, pixels = named.get(f"{kind}_grid_thw"), named.get("pixel_values_videos")
            frames = pixels.shape[1] if kind == "video" and isinstance(pixels, Tensor) and pixels.ndim == 5 else 1
            patches, tokens = self._counts(features(result), lengths, grid, frames)
            states.patches += patches
            states.tokens += tokens
            for index in sorted(kept):
                states.extend(index, *map(torch.cat, zip(*kept[index], strict=True)))
            if inputs:
                states.inputs.append({name: own for name, own in named.items() if own is not None})
            lengths.clear()
            kept.clear()

        with self._attending(look), ExitStack() as stack:
            for kind in self._parameters:
                stack.enter_context(listen(self.owner, f"get_{kind}_features", partial(leave, kind)))
            yield

    def _counts(
        self, made: list[Tensor], lengths: list[int], grid: Tensor | None, frames: int
    ) -> tuple[list[int], list[int]]:
        """Patches and language tokens of each image or video."""
        tokens, patches = [len(own) for own in made], lengths
        if grid is not None:
            patches = grid.prod(-1).tolist()
        elif len(set(lengths)) == 1 and frames > 1:
            patches = [frames * lengths[0]] * len(tokens)
        elif len(lengths) != len(tokens) > 1:
            patches = [own * self.merge for own in tokens]
        if len(patches) != len(tokens) and sum(patches) == sum(tokens) * self.merge:  # tokens of all images in one
            tokens = [own // self.merge for own in patches]
        if sum(patches) != sum(lengths) or len(patches) != len(tokens):
            raise AttachError(f"cannot tell which of {sum(lengths)} patches belong to which of {len(tokens)} images")
        return list(patches), tokens

    def encode(self, inputs: dict[str, Tensor]) -> None:
        videos = "pixel_values_videos" in inputs
        (self.owner.get_video_features if videos else self.owner.get_image_features)(**inputs)

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
        made = torch.cat([self._in_place(own) for own in vectors.split(len(self.groups) * self.images)])
        return rearrange(made, "(r n) d -> r n d", r=len(tokens))

    def _in_place(self, vectors: Tensor) -> Tensor:
        """(n, merge, D), at most as many as the blank images have groups of patches -> (n, d)."""
        images, shape = -(-len(vectors) // len(self.groups)), self.calls[0].shape
        patches = torch.arange(images)[:, None] * shape[:-1].numel() + torch.tensor(self.groups).flatten()
        index = patches.flatten()[: len(vectors) * self.merge].to(vectors.device)
        outputs: list[Tensor | None] = [None] * len(self.calls)
        for layer, own in zip(self.layers, vectors.flatten(0, 1).split(self.width, dim=-1), strict=True):
            whole = own.new_zeros(images * shape[:-1].numel(), self.width)
            outputs[layer] = whole.index_copy(0, index, own).view(images * shape[0], *shape[1:])
        made: Tensor = self._behind(outputs, images).unflatten(0, (images, -1))
        return made[:, self.places].flatten(0, 1)[: len(vectors)]

    def _behind(self, outputs: Sequence[Tensor | None], images: int = 1) -> Tensor:
        """So many blank images' language tokens (T, d) with other outputs of the blocks; None: their input."""
        with ExitStack() as stack:
            for block, call, output in zip(self.stack, self.calls, outputs, strict=True):
                stack.enter_context(call.instead(block, output))
            blank = {
                name: torch.cat([cast(self.dtype, own)] * images) if isinstance(own, Tensor) else own
                for name, own in self.blank.items()
            }
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


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-2, rtol=1e-2)
