"""What comes before the training of a family that builds on another's `mini`, as published models build on parts.

Its language model and words start as the teacher's. Its encoder and projector then learn to say of every image token
what the teacher's encoder says of the cell under it, and in which row and column of the mosaic that cell is: where
positions are one-dimensional, nothing else tells the language model.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from .packing import Packer, pixels

SIZES = (1, 2, 3)
RATE = 3e-3
NEW = ("embed_tokens.weight", "o_proj.bias", "q_norm.weight", "k_norm.weight")
"""Parameters that a language model may have beside the teacher's: the teacher's queries and keys are about as long as
those that come out of fresh norms."""
BEHIND = {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
"""Gemma's norms behind the halves of a layer, which start at the length of what the teacher's halves give."""


def inherit(model: Any, processor: Any, teacher: Any, teacher_processor: Any) -> None:
    """Copies the teacher's language model, and the row of every word that both know.

    Raises:
        ValueError: a language model of another shape.
    """
    ours, theirs = model.get_decoder(), teacher.get_decoder()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("embed_tokens")}
    scale = float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))
    if hasattr(ours.layers[0], "pre_feedforward_layernorm"):
        state = _as_gemmas(state, theirs, scale)
    missing, unexpected = ours.load_state_dict(state, strict=False)
    lost = [name for name in missing if not name.endswith(NEW)]
    if lost or unexpected:
        raise ValueError(f"the language models differ in {', '.join([*lost, *unexpected])}")
    known = teacher_processor.tokenizer.get_vocab()
    rows = [(i, known[word]) for word, i in processor.tokenizer.get_vocab().items() if word in known]
    here, there = torch.tensor(rows).T
    with torch.no_grad():
        model.get_input_embeddings().weight[here] = teacher.get_input_embeddings().weight[there] / scale


def _as_gemmas(state: dict[str, Tensor], theirs: Any, scale: float) -> dict[str, Tensor]:
    """A language model's weights under Gemma's names, whose norms hold what is added to one, and whose tied table is as
    many times smaller as embeddings are multiplied by."""
    named = {name.replace(BEHIND["self_attn"], "pre_feedforward_layernorm"): own for name, own in state.items()}
    named["norm.weight"] = named["norm.weight"] * scale
    for name, size in _sizes(theirs).items():
        named[name] = torch.full_like(state["norm.weight"], size)
    return {name: own - 1 if "norm.weight" in name else own for name, own in named.items()}


@torch.no_grad()
def _sizes(theirs: Any) -> dict[str, float]:
    """Root mean square of what the halves of the teacher's layers give for words in no order."""
    found: dict[str, float] = {}
    handles = []
    for number, layer in enumerate(theirs.layers):
        for half, norm in BEHIND.items():

            def note(module: Any, args: Any, output: Any, name: str = f"layers.{number}.{norm}.weight") -> None:
                given = output[0] if isinstance(output, tuple) else output
                found[name] = float(given.float().pow(2).mean().sqrt())

            handles.append(getattr(layer, half).register_forward_hook(note))
    words = torch.randint(len(theirs.embed_tokens.weight), (16, 32), generator=torch.Generator().manual_seed(0))
    theirs(input_ids=words, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def features(model: Any, shown: dict[str, Tensor]) -> Tensor:
    """The projected tokens of pictures of one size, (B, T, d)."""
    return torch.stack([image.flatten(0, -2) for image in model.model.get_image_features(**shown).pooler_output])


def align(
    model: Any, processor: Any, teacher: Any, teacher_processor: Any, *, steps: int, seed: int = 0, count: int = 48
) -> Iterator[tuple[int, float]]:
    """Trains encoder and projector; yields the number of steps done and the relative squared error after every step."""
    decoder = {id(weight) for weight in (*model.get_decoder().parameters(), *model.lm_head.parameters())}
    trained = [weight for weight in model.parameters() if id(weight) not in decoder]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    pack = Packer(model, processor, SIZES)
    codes = torch.randn(2, max(SIZES), model.get_input_embeddings().embedding_dim, generator=torch.manual_seed(seed))
    model.train()
    for done in range(steps):
        rng = Random(f"{seed}/align/{done}")
        size = rng.choices(SIZES, (0.1, 0.4, 0.5))[0]
        cells = pack.cells(rng, size, count)[1]
        with torch.inference_mode():
            said = features(teacher, pixels(teacher_processor, cells, size)).unflatten(1, (size, size))  # (B, G, G, d)
        said = said.clone()
        scale = said.pow(2).mean().sqrt()
        wanted = said + scale * 0.5 * (codes[0, :size, None] + codes[1, None, :size])
        seen = features(model, pixels(processor, cells, size))
        side = int(seen.shape[1] ** 0.5)
        under = torch.arange(side) * size // side  # the cell's row or column, of every token's
        error = (seen.unflatten(1, (side, side)) - wanted[:, under][:, :, under]).pow(2).mean() / scale**2
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        yield done + 1, error.item()
