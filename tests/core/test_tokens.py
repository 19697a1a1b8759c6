"""The four tokens: ids, rows laid over the base's matrices, and the tokenizer that knows them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from bases import Base, tied, untied
from torch import nn

from vismem_core.memory.tokens import NAMES, MemoryTokens, delimiter_ids


@pytest.mark.parametrize(
    "text",
    [
        "what is on the left of the boot ? <ms_I><ms_E> a bag <ml_I><ml_E>, a coat .",
        "<ml_I>naïve ☃<ms_I> 你<ms_E>好\n\ttab<ml_E>  two spaces<ms_I>",
        "<ms_i> <ms_ <ml_I <ms_I><ms_I>",
        "",
    ],
)
def test_texts_with_tokens_there_and_back(text: str) -> None:
    memory = tied().attach()
    tokenizer = memory.backbone.processor.tokenizer
    ids = memory.encode(text)
    assert memory.decode(ids) == text
    plain = re.sub("<m[sl]_[IE]>", "", text)
    assert tokenizer.decode(ids) == plain
    assert [token for token in ids if token >= memory.tokens.first] == [
        memory.tokens.first + NAMES.index(name) for name in re.findall("<m[sl]_[IE]>", text)
    ]


def test_a_token_within_a_character() -> None:
    memory = tied().attach()
    ids = memory.encode("a ☃")
    assert len(ids) > 3  # the character is several tokens
    ids.insert(-1, memory.tokens.invocation("short"))
    assert memory.decode(ids) == "a <ms_I>☃"


@pytest.mark.parametrize(("spare", "make"), [(0, tied), (0, untied), (7, tied), (7, untied)])
def test_ids_begin_where_the_vocabulary_ends(spare: int, make: Any) -> None:
    base = make(spare=spare)
    size = len(base.processor.tokenizer)
    memory = base.attach()
    assert memory.tokens.first == size + spare == base.model.get_input_embeddings().weight.shape[0]
    assert [memory.tokens.kind(memory.tokens.first + at) for at in range(-1, 4)] == [None, "short", "long", None, None]
    assert len(base.processor.tokenizer) == size
    assert memory.encode("".join(NAMES)) == [
        *(memory.tokens.invocation(kind) for kind in ("short", "long")),
        *(memory.tokens.end(kind) for kind in ("short", "long")),
    ]
    assert memory.tokens.width == memory.tokens.first + 4
    output = base.generate(("what ?", []), max_new_tokens=6)
    assert all(own.shape[1] == memory.tokens.first + 4 for own in output.logits)


def test_rows_lie_over_the_embedding(base: Base) -> None:
    table = base.model.get_input_embeddings()
    ids = torch.tensor([[3, 0, 1], [2, 5, 9]])
    plain = table(ids)
    memory = base.attach()
    assert table(ids).equal(plain)
    first = memory.tokens.first
    mixed = torch.tensor([[first, 3, first + 3], [first + 1, first + 2, 9]])
    got = table(mixed)
    rows = torch.cat([memory.tokens.invoke, memory.tokens.close])
    expected = torch.stack([torch.stack([rows[0], plain[0, 0], rows[3]]), torch.stack([rows[1], rows[2], plain[1, 2]])])
    assert got.equal(expected)
    got.sum().backward()
    assert memory.tokens.invoke.grad.eq(1).all()  # type: ignore[union-attr]
    with pytest.raises(IndexError):
        table(torch.tensor([first + 4]))


def test_rows_begin_near_a_delimiters() -> None:
    torch.manual_seed(0)
    embeddings, head = nn.Embedding(50, 256), nn.Linear(256, 50, bias=False)
    tokens = MemoryTokens.like(7, embeddings, head, 50)
    for rows, source in ((tokens.invoke, embeddings), (tokens.close, embeddings), (tokens.head, head)):
        near = torch.cosine_similarity(rows, source.weight[7], dim=-1)
        assert (near > 0.99).all()
        assert (near < 1).all()
        assert not rows[0].equal(rows[1])


@pytest.mark.parametrize(
    ("delimiters", "texts"),
    [((",", "."), [",", "."]), ((".", ","), [".", ","]), (("?",), ["?"]), (("\n",), ["\n"]), (("☃",), [])],
)
def test_delimiters(delimiters: tuple[str, ...], texts: list[str]) -> None:
    tokenizer = tied().processor.tokenizer
    ids = delimiter_ids(tokenizer, delimiters)
    alone = [tokenizer.decode([token]).strip(" ") for token in ids]
    assert sorted(set(alone), key=alone.index)[: len(texts)] == texts
    assert all(text.endswith(delimiters) for text in alone)
    assert not set(ids) & set(tokenizer.all_special_ids)
    missed = set(tokenizer.get_vocab().values()) - set(ids) - set(tokenizer.all_special_ids)
    assert not any(tokenizer.decode([token]).strip(" ").endswith(delimiters) for token in missed)
