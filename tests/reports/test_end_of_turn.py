"""An answer ends with what the chat template writes after an assistant's turn, wherever the settings have it."""

from __future__ import annotations

import pytest
from bases import Base, tied
from samples import SAMPLES

from vismem_core.errors import AttachError
from vismem_core.training.batches import make_batch

END, OTHER = "<|im_end|>", "<|endoftext|>"


def ends(base: Base, *names: str) -> Base:
    ids = base.processor.tokenizer.convert_tokens_to_ids(list(names))
    base.model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    return base


def name(base: Base) -> str:
    memory = base.attach()
    told = [answer[-1] for answer in make_batch(memory.backbone, SAMPLES).answers]
    assert set(told) == {memory.backbone.end_of_turn}
    return str(base.processor.tokenizer.convert_ids_to_tokens(memory.backbone.end_of_turn))


@pytest.mark.parametrize("order", [(OTHER, END), (END, OTHER), (END,)])
def test_the_turns_own_end_counts_in_any_order(order: tuple[str, ...]) -> None:
    base = ends(tied(), *order)
    base.processor.tokenizer.eos_token = OTHER
    assert name(base) == END


def test_every_family(any_base: Base) -> None:
    assert name(any_base) == END


def test_a_template_that_writes_none_leaves_it_to_the_tokenizer() -> None:
    base = ends(tied(), OTHER, END)
    base.processor.chat_template = base.processor.chat_template.replace(END, "")
    assert name(base) == END  # the tokenizer's own end is among those that end generate
    base = ends(tied(), OTHER)
    base.processor.chat_template = base.processor.chat_template.replace(END, "")
    assert name(base) == OTHER  # and here it is not


def test_a_template_without_turns_of_an_assistant() -> None:
    base = ends(tied(), OTHER, END)
    refusing = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    base.processor.chat_template = refusing + base.processor.chat_template
    assert name(base) == END


def test_a_base_without_any_end_is_told() -> None:
    base = tied()
    base.model.generation_config.eos_token_id = base.processor.tokenizer.eos_token = None
    with pytest.raises(AttachError, match="names no token that ends an answer: set eos_token_id"):
        name(base)
