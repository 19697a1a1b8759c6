"""Memory beside the model alone: nothing here knows of backbones, sessions and caches.

A copy of the model that never had memory reads prompt, answer and latents in one pass without a cache. It reads them
as ids, its padding's where a latent or a memory token stands; only what leaves its embedding is replaced there. So
positions, masks, token types and whatever else it makes of ids are its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vismem_core as vismem
from vismem_core.config import FormerConfig, MemoryConfig, QueryConfig
from vismem_core.memory.trigger import Decision, Row, Trigger

OPTIONS: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOLD: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
CONFIG = MemoryConfig(
    QueryConfig(length=4), FormerConfig(length=3, rank=4, alpha=8), FormerConfig(length=5, rank=4, alpha=8), distance=1
)


@dataclass
class Pair:
    """A model and its untouched copy.

    Attributes:
        tolerance: 20 times what the copy's logits with a cache, in a batch, differ from those of one pass over a row.
    """

    model: Any
    plain: Any
    processor: Any
    prompts: list[Any]
    batch: Any
    tolerance: float = 0.0


def pair(model: Any, processor: Any, prompts: list[Any], batch: Any) -> Pair:
    """With the tolerance measured on the copy."""
    own = Pair(model, copy.deepcopy(model), processor, prompts, batch)
    answers, logits = written(own.plain, batch)
    apart = [
        (one_pass(own.plain, prompt, answer, {}, {}) - said).abs().max().item()
        for prompt, answer, said in zip(prompts, answers, logits, strict=True)
    ]
    own.tolerance = 20 * max(apart)
    return own


def written(model: Any, inputs: Any) -> tuple[list[list[int]], Tensor]:
    """Answers (B lists of A ids), and what each was chosen from, (B, A, V)."""
    output = model.generate(**inputs, **OPTIONS, **TOLD)
    begin = inputs["input_ids"].shape[1]
    return output.sequences[:, begin:].tolist(), torch.stack(output.logits, dim=1).float()


@torch.no_grad()
def one_pass(
    model: Any, prompt: Any, answer: Sequence[int], latents: Mapping[int, Tensor], tokens: Mapping[int, Tensor]
) -> Tensor:
    """What one pass says before each id of an answer, (A, V).

    Args:
        prompt: one row's inputs.
        latents: (N, d), by the index of the id that they follow.
        tokens: vectors (d,) of ids that the model does not know.
    """
    blank = model.generation_config.pad_token_id
    ids: list[int] = []
    instead: dict[int, Tensor] = {}
    places = [0]
    begin = prompt["input_ids"].shape[1]
    for at, token in enumerate(answer):
        if token in tokens:
            instead[begin + len(ids)] = tokens[token]
        ids.append(blank if token in tokens else token)
        for vector in latents.get(at, ()):
            instead[begin + len(ids)] = vector
            ids.append(blank)
        places.append(len(ids))
    told = {}
    for name, own in prompt.items():
        alike = isinstance(own, Tensor) and own.shape == prompt["input_ids"].shape
        told[name] = F.pad(own, (0, len(ids)), value=int(name == "attention_mask")) if alike else own
    told["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([ids])], dim=1)

    def replace(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for place, vector in instead.items():
            output[0, place] = vector.to(output)
        return output

    handle = model.get_input_embeddings().register_forward_hook(replace)
    logits: Tensor = model(**told, use_cache=False).logits[0].float()
    handle.remove()
    before = [begin - 1 + place for place in places[:-1]]
    for at in latents:  # a token after latents is chosen before them
        if at + 1 < len(before):
            before[at + 1] -= len(latents[at])
    return logits[before]


def staggered() -> Trigger:
    """Both kinds, at steps that each prompt has to itself."""
    turns: dict[int, int] = {}
    kinds: dict[int, Decision] = {0: "short", 4: "long"}

    def decide(row: Row) -> Decision:
        return kinds.get((row.step - turns.setdefault(row.seed, len(turns))) % 8, "none")

    return Trigger(decide, spec="staggered")


def attached(own: Pair) -> Any:
    """Memory of which every trained tensor has an effect."""
    memory = vismem.attach(own.model, own.processor, config=CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in memory.trained().values():
            tensor.add_((0.2 * torch.randn(tensor.shape, generator=generator)).to(tensor))
    memory.trigger = staggered()
    return memory
