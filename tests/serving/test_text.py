"""Text that leaves in pieces is the text as a whole, whatever the tokenizer, and it ends before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vismem_core.serving.writing import Text
from vismem_plugins.mini import path

Decode = Callable[[Sequence[int]], str]


def words() -> Any:
    """Words, and spaces between them."""
    return AutoTokenizer.from_pretrained(path("qwen2_5_vl"))


def pieces() -> Any:
    """Words that are joined from pieces."""
    vocab = {own: at for at, own in enumerate(["[UNK]", "play", "##ing", "##s", "a", "ball", "##.", "."])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def bytes_() -> Any:
    """Bytes, of which several make a character."""
    return tiny.qwen_processor().tokenizer


def metaspace() -> Any:
    """Spaces are in front of words, and bytes stand for rare characters."""
    vocab: list[tuple[str, float]] = [("<unk>", 0.0), ("▁a", 0.0), ("▁", 0.0), ("b", 0.0), ("▁bag", 0.0), (".", 0.0)]
    vocab += [(f"<0x{byte:02X}>", 0.0) for byte in "é€😀".encode()]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def tokenizer(make: Callable[[], Any]) -> Any:
    return make()


@pytest.mark.parametrize("make", [words, pieces, bytes_, metaspace])
@pytest.mark.parametrize("seed", range(9))
def test_pieces_are_the_whole(make: Callable[[], Any], seed: int) -> None:
    own, chance = tokenizer(make), Random(seed)
    whole = 6 if make is metaspace else len(own)  # bytes that are no characters take others with them
    ids = chance.choices(range(whole), k=chance.randrange(1, 30))
    if make in (bytes_, metaspace) and seed % 2:
        ids = own("b é a € 😀 a é.", add_special_tokens=False)["input_ids"] + ids[:5]

    def decode(some: Sequence[int]) -> str:
        return str(own.decode(list(some), skip_special_tokens=True))

    full = decode(ids)
    stop = [full[at : at + chance.randrange(1, 4)] for at in [chance.randrange(len(full))] * (seed % 3)] if full else []
    text, sent, seen = Text(decode, stop), [], ""
    for count, token in enumerate(ids, 1):
        text.add(token)
        seen = decode(ids[:count])
        sent.append(text.ready(last=text.stopped or count == len(ids)))
        assert not any(mark in "".join(sent) for mark in stop) and "".join(sent) == "".join(sent).lstrip()
        if text.stopped:
            break
    met = [at for mark in stop if (at := seen.find(mark)) >= 0]
    assert "".join(sent) == (seen[: min(met)] if met else full).strip()
    assert bool(met) == text.stopped or seen.endswith("\ufffd")


def test_what_may_be_a_stop_waits() -> None:
    text = Text(lambda ids: "".join("ab \n<"[own] for own in ids), ["\n<b"])
    got = []
    for token in (2, 0, 3, 4, 0, 2, 3, 4, 1):
        text.add(token)
        got.append(text.ready())
    assert got == ["", "a", "", "", "\n<a", "", "", "", ""]
    assert text.stopped and text.ready(last=True) == ""
