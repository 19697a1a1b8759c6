"""Vision encoders whose input has one size: an image is one entry of their batch, or several, its tiles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vismem_core.base.backbone import Backbone
from vismem_core.base.vision import VisionStates, attend, beside

PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Language models whose layers hand their keyword arguments on to plain sdpa attention."""


class Tiles(Backbone):
    """What families with such an encoder share: positions enter at its input, so keys and values hold none.

    A memory token attends to all patches of all tiles of its row's images, class tokens among them, as each patch
    does within its tile. It leaves the blocks where the features do that the projector reads.
    """

    packs = True
    towers: ClassVar[tuple[str, ...]]
    """Model types of the encoders whose blocks are known."""
    stack: ClassVar[str]
    attention: ClassVar[str]
    norm: ClassVar[str]
    """Names of the list of blocks in the encoder, of a block's attention and of the norm in front of it."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        text = model.config.text_config
        if text.model_type not in PLAIN or getattr(text, "sliding_window", None) is not None:
            self.packs = False

    @classmethod
    def matches(cls, model: Any) -> bool:
        return super().matches(model) and model.config.vision_config.model_type in cls.towers

    @property
    def tower(self) -> Any:
        """The vision encoder."""
        return self.model.model.vision_tower

    @property
    def layers(self) -> list[int]:
        """States that the projector reads: the outputs of so many blocks, side by side."""
        chosen = self.model.config.vision_feature_layer
        count = 1 + len(self.tower.get_submodule(self.stack))
        return [layer % count for layer in ([chosen] if isinstance(chosen, int) else chosen)]

    @property
    def blocks(self) -> list[Any]:
        """The blocks that the features come from; encoders have some beyond."""
        return list(self.tower.get_submodule(self.stack))[: max(self.layers)]

    @property
    def class_tokens(self) -> int:
        """How many of a tile's tokens the projector does not get; they come first."""
        return int(self.model.config.vision_feature_select_strategy == "default")

    @property
    def vision_width(self) -> int:
        return int(self.tower.config.hidden_size)

    @property
    def merge(self) -> int:
        return 1

    @property
    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.image_token_id}

    @property
    def lora_targets(self) -> dict[str, str]:
        # An adapter on a block beyond the features would never be trained.
        used = "|".join(map(str, range(max(self.layers))))
        stack = self.stack.replace(".", r"\.")
        return {
            "short": rf"model\.vision_tower\.{stack}\.({used})\.{self.attention}\.(q_proj|v_proj)",
            "long": r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
        }

    @property
    def vision_device(self) -> torch.device:
        return getattr(self.blocks[0], self.norm).weight.device  # type: ignore[no-any-return]

    @property
    def vision_dtype(self) -> torch.dtype:
        return getattr(self.blocks[0], self.norm).weight.dtype  # type: ignore[no-any-return]

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tiles, length = output.last_hidden_state.shape[:2]
            states.patches += [length] * tiles
            states.tokens += [self.tokens(length)] * tiles
            if inputs:
                states.inputs.append({"pixel_values": args[0] if args else kwargs["pixel_values"]})

        with ExitStack() as stack:
            stack.callback(self.tower.register_forward_hook(leave, with_kwargs=True).remove)
            for index, block in enumerate(self.blocks if keep else []):
                for handle in self.keep(getattr(block, self.attention), index, states):
                    stack.callback(handle.remove)
            yield

    def tokens(self, length: int) -> int:
        """Language tokens that a tile of ``length`` tokens, class tokens among them, comes to."""
        return (length - self.class_tokens) // self.merge

    def keep(self, attention: Any, block: int, states: VisionStates) -> list[RemovableHandle]:
        """Hooks that add a block's keys and values to ``states``."""
        kept: dict[str, Tensor] = {}

        def after_attention(module: nn.Module, args: Any, output: Any) -> None:
            keys, values = (
                rearrange(kept.pop(name), "tiles patches (heads w) -> (tiles patches) heads w", w=attention.head_dim)
                for name in ("keys", "values")
            )
            states.extend(block, keys, values)

        last = getattr(attention, "k_norm", attention.k_proj)
        return [
            last.register_forward_hook(lambda module, args, output: kept.update(keys=output)),
            attention.v_proj.register_forward_hook(lambda module, args, output: kept.update(values=output)),
            attention.register_forward_hook(after_attention),
        ]

    def heads(self, attention: Any, normed: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of tokens (.., D), each (.., heads, head width)."""
        fused = [getattr(attention, f"{name}_proj")(normed) for name in "qkv"]
        if hasattr(attention, "q_norm"):
            fused[:2] = attention.q_norm(fused[0]), attention.k_norm(fused[1])
        return [rearrange(own, "... (heads w) -> ... heads w", w=attention.head_dim) for own in fused]

    def encode(self, inputs: dict[str, Tensor]) -> None:
        self.tower(**inputs)

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        where = states.gather(rows)
        passed = [extra]
        for index, block in enumerate(self.blocks):
            attention, extra = getattr(block, self.attention), beside(extra, block)
            normed = getattr(block, self.norm)(extra)
            queries, keys, values = (own.transpose(1, 2) for own in self.heads(attention, normed))
            mixed = attend(queries, keys, values, states, index, where)
            extra = self.step(block, extra, mixed)
            passed.append(extra)
        return torch.cat([passed[layer].to(extra.device) for layer in self.layers], dim=-1)

    @abstractmethod
    def step(self, block: Any, extra: Tensor, mixed: Tensor) -> Tensor:
        """What a block makes of its input and what attention gave for it, before its output projection.

        Args:
            extra: (R, E, D)
            mixed: (R, E, D)

        Returns:
            (R, E, D)
        """

    def project(self, tokens: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(tokens)  # type: ignore[no-any-return]


@contextmanager
def listen(owner: Any, name: str, note: Callable[..., None]) -> Iterator[None]:
    """Call ``note(result, *args, **kwargs)`` after each call of a method that is no module's ``forward``."""
    before, own = getattr(owner, name), name in vars(owner)

    @wraps(before)  # ``generate`` looks at its signature
    def call(*args: Any, **kwargs: Any) -> Any:
        result = before(*args, **kwargs)
        note(result, *args, **kwargs)
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)
