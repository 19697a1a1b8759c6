"""Trains a `mini`: `python -m vismem_plugins.mini.train --family qwen2_5_vl --output DIR`.

Without the curriculum (one cell, then few, then many) the model falls into a constant answer and stays there. To read
past what stands between a question and its answer takes a second phase of its own (`PHASES`): asides from the start
slow all else down, and at the end of the first phase the rate is too low to learn it.

With one-dimensional positions it takes longer: the one run of `llava` from scratch did not find cells in 3,500 such
steps. So these families build on the `mini` of Qwen2.5-VL (`align`), need the second phase alone, and are done sooner.

A step depends on the seed, its number and what the steps before it made, so that a run that was interrupted goes on
where it last saved itself, to the same weights.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vismem_plugins.mosaic import DOMAINS, GROUPS, mosaic

from . import path
from .align import align, inherit
from .build import FAMILIES, build
from .packing import FOREIGN, IGNORED, Batch, Packer, encode, pixels
from .state import load, save

SIZES = (1, 2, 3)
PHASES = ((0.625, 2e-3), (0.375, 1e-3))
"""Share of the steps, and highest learning rate."""
STATE = "training.safetensors"
"""Where a run that is not done keeps its weights and the optimizer's averages."""


def phase_at(done: int, steps: int, first: int = 0) -> tuple[int, float]:
    """The phase, and the share of it that is behind, after so many of all steps, beginning with phase `first`."""
    left = sum(share for share, _ in PHASES[first:])
    ends = [round(steps * sum(share for share, _ in PHASES[first : last + 1]) / left) for last in range(len(PHASES))]
    phase = next(phase for phase, end in enumerate(ends) if done < end)
    start = ends[phase - 1] if phase > first else 0
    return phase, (done - start) / (ends[phase] - start)


def size_at(progress: float, rng: Random) -> int:
    """The curriculum: single cells, then mostly 2 x 2, then both of the sizes that `mosaic` mixes."""
    shares = (1.0, 0.0, 0.0) if progress < 0.05 else (0.1, 0.8, 0.1) if progress < 0.2 else (0.02, 0.33, 0.65)
    return rng.choices(SIZES, shares)[0]


def rate_at(progress: float, peak: float) -> float:
    """The learning rate: linear to its peak over the first 2% of a phase, and a cosine to zero."""
    return peak * min(1.0, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress))


def asides_at(phase: int, progress: float) -> float:
    """Share of the answers that follow an aside."""
    return 0.5 if phase else 0.4 if progress > 0.7 else 0.0


def foreign(ids: Tensor, table: Any, seen: Tensor) -> Tensor:
    """Vectors that mean nothing where they stand, (*ids.shape, d): noise of the words' size, or tokens of any image."""
    words = table(torch.arange(len(table.weight))).detach()  # some tables multiply what they hold
    scale = words.pow(2).mean().sqrt() * torch.empty(*ids.shape, 1).uniform_(0.3, 3)
    noise = scale * torch.randn(*ids.shape, seen.shape[-1])
    borrowed = seen.detach()[torch.randint(len(seen), ids.shape)]
    return torch.where(torch.rand(len(ids), 1, 1) < 0.6, noise, borrowed)


def masks(model: Any, batch: Batch) -> Any:
    """What tokens may look at, as the language model takes it.

    Gemma's image tokens see each other both ways, and its layers differ in how far they look back; a question's place
    is the one that it would have alone.
    """
    kinds = getattr(model.get_decoder().config, "layer_types", None) or []
    if "sliding_attention" not in kinds:
        return batch.mask
    image, places = batch.ids == model.config.image_token_id, batch.positions[0]
    seen = batch.mask | (image[:, None, :] & image[:, :, None])[:, None]
    far = places[:, :, None] - places[:, None, :] >= model.get_decoder().config.sliding_window
    return {"full_attention": seen, "sliding_attention": seen & ~far[:, None]}


def loss_of(model: Any, batch: Batch, shown: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the answers' tokens; `shown` are the mosaics as the model takes them."""
    told = model.model.get_image_features(**shown)
    seen = torch.cat([image.flatten(0, -2) for image in told.pooler_output])  # (image tokens of the batch, d)
    is_image = (batch.ids == model.config.image_token_id)[..., None]
    deep: dict[str, Any] = {}
    if "deepstack_features" in told:
        layers = [torch.cat(list(layer)) for layer in told.deepstack_features]  # of all images
        deep = {"visual_pos_masks": is_image[..., 0], "deepstack_visual_embeds": layers}
    table = model.get_input_embeddings()
    strange = (batch.ids == FOREIGN)[..., None]
    embeds = torch.where(strange, foreign(batch.ids, table, seen), table(batch.ids.clamp(min=0)))
    hidden = model.get_decoder()(
        inputs_embeds=embeds.masked_scatter(is_image, seen),
        attention_mask=masks(model, batch),
        position_ids=batch.positions if len(batch.positions) > 1 else batch.positions[0],
        use_cache=False,
        **deep,
    ).last_hidden_state
    wanted = batch.labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), batch.labels[wanted])


def adamw(model: Any) -> torch.optim.Optimizer:
    """A fresh optimizer."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)


def train(
    model: Any,
    processor: Any,
    *,
    steps: int,
    seed: int = 0,
    first: int = 0,
    count: int = 32,
    questions: int = 8,
    domains: Sequence[str] = ("clothes",),
    between: float = 0.0,
    state: Path | None = None,
    save_every: int = 500,
) -> Iterator[tuple[int, float]]:
    """Trains the model; yields the number of steps done and the loss after every step.

    Args:
        first: the phase to begin with.
        count: mosaics in a step.
        questions: about each of them.
        domains: what they show, in turn.
        between: share of the questions that do not follow the image at once.
        state: a file to go on from, where there is one, and to save to every `save_every` steps.
    """
    optimizer = adamw(model)
    done = load(state, model, optimizer) if state is not None and state.is_file() else 0
    pack = Packer(model, processor, SIZES, [DOMAINS[name] for name in domains], between)
    model.train()
    while done < steps:
        phase, progress = phase_at(done, steps, first)
        if progress == 0:
            optimizer = adamw(model)
        rng = Random(f"{seed}/{done}")
        torch.manual_seed(rng.getrandbits(32))
        batch = pack(rng, size_at(1.0 if phase else progress, rng), count, questions, asides_at(phase, progress))
        loss = loss_of(model, batch, pixels(processor, batch.cells, batch.size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate_at(progress, PHASES[phase][1])
        optimizer.step()
        done += 1
        if state is not None and done % save_every == 0:
            save(state, model, optimizer, done)
        yield done, loss.item()
    model.eval()


@torch.inference_mode()
def answers(model: Any, processor: Any, images: Sequence[Sequence[Any]], prompts: Sequence[str]) -> list[str]:
    """The model's greedy answers."""
    said: list[str] = []
    for i in range(0, len(prompts), 50):
        inputs = encode(processor, images[i : i + 50], prompts[i : i + 50])
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(output, skip_special_tokens=True)
    return said


def evaluate(
    model: Any, processor: Any, count: int = 200, size: int | None = None, domain: str = "clothes"
) -> dict[str, dict[str, float]]:
    """Held-out accuracy of every type, and that of its questions over the next sample's image ("blind")."""
    table: dict[str, dict[str, float]] = {}
    for name in (name for group in GROUPS.values() for name in group):
        samples = list(mosaic("heldout", types=[name], size=size, domain=domain)[:count])
        images, prompts = [sample.images for sample in samples], [sample.prompt for sample in samples]
        table[name] = {}
        for column, shown in (("accuracy", images), ("blind", images[1:] + images[:1])):
            said = answers(model, processor, shown, prompts)
            right = sum(one == sample.answer for one, sample in zip(said, samples, strict=True))
            table[name][column] = right / len(samples)
    return table


def show(table: dict[str, dict[str, float]]) -> Table:
    """The table of `evaluate` for a terminal."""
    view = Table("group", "type", "accuracy", "blind")
    for group, names in GROUPS.items():
        for name in names:
            view.add_row(group, name, *(f"{value:.2f}" for value in table[name].values()))
    return view


def load_mini(place: Path) -> tuple[Any, Any]:
    """A model and its processor from a directory."""
    return AutoModelForImageTextToText.from_pretrained(place), AutoProcessor.from_pretrained(place)


def follow(stages: Sequence[tuple[str, int, Iterator[tuple[int, float]]]]) -> None:
    """Runs named stages of so many steps, and shows how far they are."""
    with Progress(console=Console(stderr=True)) as bar:
        for name, steps, stage in stages:
            task, losses = bar.add_task(name, total=steps), list[float]()
            for done, loss in stage:
                losses.append(loss)
                bar.update(task, completed=done, description=f"{name}: loss {loss:.3f}")
                if done % 100 == 0:
                    bar.console.print(f"{name}: {done} steps, loss {mean(losses[-100:]):.3f}")


def main() -> None:
    """Trains, saves in bfloat16, loads that again, measures it, and writes the table to `base.json` beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=FAMILIES)
    parser.add_argument("--output", type=Path, required=True, help="the directory to write")
    parser.add_argument("--steps", type=int, help="by default the family's own number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    family, state = FAMILIES[args.family], args.output / STATE
    model, processor = build(args.family, args.seed)
    stages = []
    if family.teacher and not state.is_file():
        teacher = load_mini(path(family.teacher))
        if family.align:
            inherit(model, processor, *teacher)
            lessons = align(model, processor, *teacher, steps=family.align, seed=args.seed)
            stages.append(("align", family.align, lessons))
        else:
            model.load_state_dict(teacher[0].state_dict())
    steps, first = args.steps or family.steps, 1 if family.teacher else 0
    shown: dict[str, Any] = {"domains": family.domains, "between": family.between}
    lessons = train(model, processor, steps=steps, seed=args.seed, first=first, **shown, state=state)
    stages.append(("train", steps, lessons))
    follow(stages)
    # Half the size on disk; the configuration still says float32, so that this is what a plain load gives.
    weights = {name: weight.bfloat16() for name, weight in model.named_parameters()}
    model.save_pretrained(args.output, state_dict=weights)
    processor.save_pretrained(args.output)
    state.unlink(missing_ok=True)
    saved = load_mini(args.output)
    for domain in family.domains:
        table = evaluate(*saved, domain=domain)
        name = "base.json" if domain == family.domains[0] else f"base_{domain}.json"
        (args.output / name).write_text(json.dumps(table, indent=1) + "\n")
        Console().print(domain, show(table))


if __name__ == "__main__":
    main()
