"""Training batches: a mosaic is shown once for several questions.

The questions stand one after the other behind the image, have the positions that each would have alone, and
cannot see each other, so that a step is worth that many single prompts at a fraction of the cost.
A share of the answers follows an aside, so that the model learns to read past what stands between a question
and its answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vismem_plugins.mosaic import CELL, DOMAINS, QUESTIONS, Domain, Grid, draw_grid, draw_photos
from vismem_plugins.mosaic.domains import CLOTHES

IGNORED = -100
FOREIGN = -1
"""In place of an id: a vector that is no word's."""
NAMES = "|".join(name for domain in DOMAINS.values() for name in domain.classes)
ARGUMENT = re.compile(rf"row \d column \d|\b(?:{NAMES})\b")
"""The part of a question that can be said elsewhere."""
# How often a type is asked, relative to the others; "list" names every cell, and so is worth many.
WEIGHTS = {
    "read": 2.0,
    "count": 3.0,
    "where": 4.0,
    "left": 1.0,
    "above": 1.0,
    "same": 2.0,
    "list": 1.0,
    "fact": 0.3,
}


@dataclass(frozen=True)
class Layout:
    """What surrounds a question in a prompt of one image."""

    prefix: list[int]  # up to and with the image
    suffix: list[int]  # between question and answer
    positions: Tensor  # of the prefix: (3, len(prefix)) with M-RoPE, else (1, len(prefix))


@dataclass(frozen=True)
class Batch:
    """B mosaics of one size, each with its questions: sequences of L tokens."""

    size: int
    cells: Tensor  # (B * size**2, 28, 28) of bytes
    ids: Tensor  # (B, L), with FOREIGN where no word stands
    labels: Tensor  # (B, L): the next token where it belongs to an answer, else IGNORED
    positions: Tensor  # (3 or 1, B, L)
    mask: Tensor  # (B, 1, L, L): True where a token may look


def encode(processor: Any, images: Sequence[Sequence[Any]], prompts: Sequence[str]) -> Any:
    """Chat prompts with their images as padded model inputs."""
    chats = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": i} for i in row), {"type": "text", "text": text}],
            }
        ]
        for row, text in zip(images, prompts, strict=True)
    ]
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )


def layout(model: Any, processor: Any, size: int) -> Layout:
    """The layout of a prompt, read off two prompts that differ in a question of one word."""
    image = np.zeros((size * CELL, size * CELL, 3), np.uint8)
    inputs = encode(processor, [[image], [image]], ["list", "is"])
    one, two = inputs["input_ids"].tolist()
    cut = next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
    positions = torch.arange(cut)[None]
    if hasattr(model.model, "get_rope_index"):
        grids = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids")}
        positions = model.model.get_rope_index(inputs["input_ids"], **grids)[0][:, 0, :cut]
    return Layout(one[:cut], one[cut + 1 :], positions)


def augment(cells: NDArray[np.uint8], rng: np.random.Generator, mirrored: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Cells (N, 28, 28) flipped where they may be (N,), moved by up to two pixels and brightened at random."""
    count = len(cells)
    padded = np.pad(cells, ((0, 0), (2, 2), (2, 2)))
    rows = rng.integers(0, 5, (count, 1)) + np.arange(CELL)
    columns = rng.integers(0, 5, (count, 1)) + np.arange(CELL)
    columns = np.where((rng.random((count, 1)) < 0.5) & mirrored[:, None], columns[:, ::-1], columns)
    moved = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].astype(np.float32)
    gain = rng.uniform(0.7, 1.2, (count, 1, 1)).astype(np.float32)
    return np.asarray(np.clip(moved * gain, 0, 255).round(), np.uint8)


def pixels(processor: Any, cells: Tensor, size: int) -> dict[str, Tensor]:
    """What the image processor makes of mosaics of the cells (B * size**2, 28, 28): `get_image_features` takes it."""
    squares = cells.view(-1, size, size, CELL, CELL).transpose(2, 3)
    pictures = squares.reshape(-1, 1, size * CELL, size * CELL).expand(-1, 3, -1, -1)
    inputs = processor.image_processor(images=list(pictures), return_tensors="pt")
    return {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}


def ask(grid: Grid, count: int, rng: Random) -> list[tuple[str, str]]:
    """`count` questions that fit the grid, with their answers."""
    asked: list[tuple[str, str]] = []
    while len(asked) < count:
        (name,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if (question := QUESTIONS[name](grid, rng)) is not None:
            asked.append(question)
    return asked


class Packer:
    """Makes batches of mosaics of some domains; a source of random numbers settles all of one.

    Args:
        between: share of the questions that something meaningless stands in front of, behind the image.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        sizes: Sequence[int],
        domains: Sequence[Domain] = (CLOTHES,),
        between: float = 0.0,
    ) -> None:
        self._domains, self._between = domains, between
        self._layouts = {size: layout(model, processor, size) for size in sizes}
        self._words: dict[str, int] = processor.tokenizer.get_vocab()
        self._text = sorted(token for word, token in self._words.items() if not word.startswith("<"))
        self._end: int = processor.tokenizer.eos_token_id
        self._pad: int = processor.tokenizer.pad_token_id

    def __call__(self, rng: Random, size: int, count: int, questions: int, asides: float = 0.0) -> Batch:
        """`count` mosaics of a size with `questions` questions each; a share of the answers follows an aside."""
        place = self._layouts[size]
        grids, cells = self.cells(rng, size, count)
        rows = [self._row(place, ask(grid, questions, rng), asides, rng) for grid in grids]
        length = max(len(row[0]) for row in rows)
        ids, labels, steps, parts = (
            torch.tensor([row[i] + [fill] * (length - len(row[i])) for row in rows])
            for i, fill in enumerate((self._pad, IGNORED, 0, -1))
        )
        positions = steps.expand(len(place.positions), -1, -1).clone()
        positions[:, :, : len(place.prefix)] = place.positions[:, None]
        mask = ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])).tril()[:, None]
        return Batch(size, cells, ids, labels, positions, mask)

    def cells(self, rng: Random, size: int, count: int) -> tuple[list[Grid], Tensor]:
        """`count` mosaics of a size: what is on them, and the bytes (count * size**2, 28, 28)."""
        grids = [draw_grid(size, rng, self._domains[at % len(self._domains)]) for at in range(count)]
        photos = np.concatenate([draw_photos(grid, "train", rng) for grid in grids])
        mirrored = np.repeat([grid.domain.mirrored for grid in grids], size**2)
        return grids, torch.from_numpy(augment(photos, np.random.default_rng(rng.getrandbits(32)), mirrored))

    def _aside(self, prompt: list[str], rng: Random) -> tuple[list[str], list[int]]:
        """What may stand between a question and its answer: words or foreign vectors that mean nothing.

        Half of the time a part of the question is moved into it and called "this" in the prompt. So the model learns
        to read past what does not matter and to use what does, as a large model does with its own thoughts. One that
        saw bare answers only loses the question over the first thing that comes between, memory included.
        """
        aside = self._nothing(rng)
        length = len(aside)
        if rng.random() < 0.5 and (part := ARGUMENT.search(" ".join(prompt))):
            at = rng.randint(0, length)
            aside[at:at] = [self._words[word] for word in part[0].split()]
            prompt = ARGUMENT.sub("this", " ".join(prompt), count=1).split()
        if rng.random() < 0.7:
            aside.append(self._words[rng.choice((",", "."))])
        return prompt, aside

    def _nothing(self, rng: Random) -> list[int]:
        length = rng.choice((1, 2, 4, 8, 10, 13, 17, 19))
        return [FOREIGN] * length if rng.random() < 0.6 else rng.choices(self._text, k=length)

    def _row(
        self, place: Layout, asked: list[tuple[str, str]], asides: float, rng: Random
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """One sequence: ids, labels, positions (0 in the prefix), and the question a token belongs to."""
        head = len(place.prefix)
        start = int(place.positions.max()) + 1
        ids, labels, steps, parts = list(place.prefix), [IGNORED] * head, [0] * head, [0] * head
        for part, (prompt, answer) in enumerate(asked, 1):
            words, aside = prompt.split(), list[int]()
            if rng.random() < asides:
                words, aside = self._aside(words, rng)
            before = self._nothing(rng) if self._between and rng.random() < self._between else []
            question = [*before, *(self._words[word] for word in words), *place.suffix, *aside]
            said = [*(self._words[word] for word in answer.split()), self._end]
            ids += question + said
            labels += [IGNORED] * (len(question) - 1) + said + [IGNORED]
            steps += range(start, start + len(question) + len(said))
            parts += [part] * (len(question) + len(said))
        return ids, labels, steps, parts
