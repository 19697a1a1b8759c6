"""The four tokens: ids, rows laid over the base's matrices, and the tokenizer that knows them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from bases import Base, mini, tied, untied
from tokenizers import Tokenizer, models
from torch import nn

from vismem_core.errors import AttachError
from vismem_core.memory.tokens import NAMES, MemoryTokens, delimiter_ids, taught

TEXTS = [
    "what is on the left of the boot ? a bag , a coat .",
    "naïve ☃ 你好\n\ttab  two spaces",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|> what<|im_end|>",
    "<ms_i> <ms_ <ml_I <|vismem_unused_291|",
    "",
]


@pytest.mark.parametrize("make", [tied, mini])
@pytest.mark.parametrize("spare", [0, 1, 40])
def test_a_taught_tokenizer_reads_everything_else_as_before(make: Any, spare: int) -> None:
    backend = make().processor.tokenizer._tokenizer
    state, size = backend.to_str(), 1 + max(backend.get_vocab().values())
    first = size + spare
    grown = taught(backend, first)
    assert backend.to_str() == state
    for text in TEXTS:
        plain, informed = backend.encode(text), grown.encode(text)
        assert informed.ids == plain.ids
        assert informed.tokens == plain.tokens
        assert grown.decode(plain.ids) == backend.decode(plain.ids)
    for name, token in backend.get_vocab(with_added_tokens=True).items():
        assert grown.token_to_id(name) == token
        assert grown.id_to_token(token) == name
    assert [grown.token_to_id(name) for name in NAMES] == list(range(first, first + 4))
    assert set(grown.get_vocab().values()) == set(backend.get_vocab().values()) | set(range(size, first + 4))
    ids = grown.encode("bag<ms_I><ms_E> a<ml_I><ml_E>").ids
    assert [token for token in ids if token >= first] == [first, first + 2, first + 1, first + 3]
    assert grown.decode(ids, skip_special_tokens=True) == backend.decode([token for token in ids if token < first])
    assert Tokenizer.from_str(grown.to_str()).encode("<ms_I>").ids == [first]  # it can be saved


def test_tokenizers_whose_vocabulary_is_a_list() -> None:
    backend = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0))
    with pytest.raises(AttachError, match="tokenizer of type Unigram"):
        taught(backend, 9)


@pytest.mark.parametrize(("spare", "make"), [(0, tied), (0, untied), (7, tied), (7, untied)])
def test_ids_begin_where_the_vocabulary_ends(spare: int, make: Any) -> None:
    base = make(spare=spare)
    size = len(base.processor.tokenizer)
    memory = base.attach()
    assert memory.tokens.first == size + spare == base.model.get_input_embeddings().weight.shape[0]
    assert [memory.tokens.kind(memory.tokens.first + at) for at in range(-1, 4)] == [None, "short", "long", None, None]
    assert len(base.processor.tokenizer) == memory.tokens.first + 4
    assert base.processor.tokenizer.convert_tokens_to_ids(list(NAMES)) == [
        *(memory.tokens.invocation(kind) for kind in ("short", "long")),
        *(memory.tokens.end(kind) for kind in ("short", "long")),
    ]
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


def test_vocabulary_of_a_saved_tokenizer_has_no_holes() -> None:
    base = tied(spare=3)
    base.attach()
    state = json.loads(base.processor.tokenizer._tokenizer.to_str())
    assert sorted(state["model"]["vocab"].values()) == list(range(len(state["model"]["vocab"])))
