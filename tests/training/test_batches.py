"""Batches: an order that a seed fixes, and prompts that grow without moving their padding."""

import torch
from transformers import BatchFeature

from vismem_core.training.batches import Sampler, extended


def test_every_epoch_is_a_permutation_and_positions_resume() -> None:
    sampler = Sampler(10, 4, seed=3)
    drawn = [index for _ in range(5) for index in sampler.draw()]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))
    later = Sampler(10, 4, seed=3)
    later.position = 8
    assert later.draw() == drawn[8:12]
    assert Sampler(10, 4, seed=4).draw() != drawn[:4]


def test_extended_prompts_are_padded_on_the_left_again() -> None:
    inputs = BatchFeature(
        {
            "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
            "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            "mm_token_type_ids": torch.tensor([[0, 1, 0], [1, 0, 0]]),
            "pixel_values": torch.ones(2, 4),
        }
    )
    grown = extended(inputs, [[1, 2, 3], []], pad=0)
    assert grown["input_ids"].tolist() == [[5, 6, 1, 2, 3], [0, 0, 7, 8, 9]]
    assert grown["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert grown["mm_token_type_ids"].tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert grown["pixel_values"] is inputs["pixel_values"]
