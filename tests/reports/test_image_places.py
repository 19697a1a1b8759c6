"""Each image stands where its ``<image>`` is, and the text is free of it, in every family."""

from __future__ import annotations

import re
from typing import Any

import pytest
from bases import FAMILIES, Base, llava, tied
from tiny import picture

from vismem_core.base.backbone import Backbone
from vismem_core.base.families import find_backbone
from vismem_core.errors import AttachError

IMAGES = [picture(24, 24, 0), picture(32, 24, 1)]


def backbone(base: Base) -> Backbone:
    return find_backbone(base.model)(base.model, base.processor)


def shape(told: Backbone, inputs: Any, row: int = 0) -> str:
    """A prompt's words, with one ``[I]`` for each run of visual tokens; markup around them is left out."""
    tokenizer = told.processor.tokenizer
    media = set(told.placeholders.values())
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
    text = "".join("[I]" if token in media else tokenizer.decode([token]) for token in ids)
    text = text.partition("user\n")[2].partition("<|im_end|>")[0]
    text = re.sub(r"(<(?!image>)[^>]*>|\s)*(\[I\]\s*)+(<(?!image>)[^>]*>)*", "[I]", text)
    return " ".join(text.replace("[I]", " [I] ").split())


@pytest.mark.parametrize(
    ("prompt", "images", "expected"),
    [
        ("is it a bag ?", 1, "[I] is it a bag ?"),
        ("<image>\nis it a bag ?", 1, "[I] is it a bag ?"),
        ("is it a bag ?\n<image>", 1, "is it a bag ? [I]"),
        ("is <image> left of <image> ?", 2, "is [I] left of [I] ?"),
        ("<image>\na bag , and <image>\n?", 2, "[I] a bag , and [I] ?"),
    ],
)
@pytest.mark.parametrize("family", [tied, *FAMILIES])
def test_images_stand_where_their_marks_are(family: Any, prompt: str, images: int, expected: str) -> None:
    told = backbone(family())
    inputs = told.inputs([prompt], [IMAGES[:images]])
    assert shape(told, inputs) == expected


def test_leading_marks_are_the_images_in_front(any_base: Base) -> None:
    told = backbone(any_base)
    assert told.prompt("<image>\nwhat is it ?", 1) == told.prompt("what is it ?", 1)
    assert told.prompt("<image><image> what is it ?", 2) == told.prompt("what is it ?", 2)


def test_a_template_that_puts_images_first_does_not_move_them() -> None:
    """As the published LLaVA-1.5 has it: all images of a message, then its texts."""
    base = llava()
    base.processor.chat_template = (
        "{% for message in messages %}user\n"
        "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}"
        "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
        "<|im_end|>{% endfor %}"
    )
    told = backbone(base)
    assert told.prompt("is <image> left of <image> ?", 2) == "user\nis <image> left of <image> ?<|im_end|>"
    assert told.prompt("<image>\nis it ?", 1) == "user\n<image>\nis it ?<|im_end|>"


def test_a_template_that_numbers_images_numbers_them_in_place() -> None:
    base = llava()
    base.processor.chat_template = (
        "{% for message in messages %}{% set told = namespace(n=0) %}"
        "{% for part in message.content %}{% if part.type == 'image' %}{% set told.n = told.n + 1 %}"
        "Picture {{ told.n }}: <image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    told = backbone(base)
    assert told.prompt("<image> and <image> ?", 2) == "Picture 1: <image>\nand Picture 2: <image> ?"


def test_marks_and_images_must_agree(any_base: Base) -> None:
    told = backbone(any_base)
    for images in ([], IMAGES):
        with pytest.raises(AttachError, match=f"the prompt has 1 <image>, and images: {len(images)}"):
            told.inputs(["what is <image> ?"], [images])


@pytest.mark.parametrize("family", [tied, *FAMILIES])
def test_a_row_without_images_among_others(family: Any) -> None:
    told = backbone(family())
    inputs = told.inputs(["a bag ?", "<image> a bag ?"], [[], IMAGES[:1]])
    assert [shape(told, inputs, row).count("[I]") for row in range(2)] == [0, 1]


@pytest.mark.parametrize("family", [tied, *FAMILIES])
def test_conversations(family: Any) -> None:
    """Earlier turns stand in front, images where they are shown; the last turn is asked as it is alone."""
    told = backbone(family())
    before = [("system", "be brief"), ("user", "<image> this ?"), ("assistant", "red <image>")]
    whole = told.prompt("and ?", 2, before)
    alone = told.prompt("and ?", 0)
    assert whole.endswith(alone[alone.index("and ?") :])
    first, second = told.prompt("this ?", 1), told.prompt("x <image> ?", 1)
    image = second[second.index("x ") + 2 : second.index(" ?")]
    assert first[: first.index("this ?") + 6] in whole and f"red {image}" in whole
    assert whole.index("be brief") < whole.index("this ?") < whole.index("red ") < whole.index("and ?")
    assert told.prompt("and ?", 1, [("user", "<image>this ?"), ("assistant", "red")]) == told.prompt(
        "and ?", 1, [("user", "this ?"), ("assistant", "red")]
    )
    with pytest.raises(AttachError, match="has 2 <image>, and images: 1"):
        told.prompt("and ?", 1, before)
    pictures = [picture(28, 28, 1), picture(28, 28, 2)]
    turned = told.inputs(["and ?", "what ?"], [pictures, pictures[:1]], [before, ()])
    plain = told.inputs(["what ?"], [pictures[:1]])
    length = plain["input_ids"].shape[1]
    assert turned["input_ids"][1, -length:].equal(plain["input_ids"][0])
    words = told.processor.tokenizer.decode(turned["input_ids"][0])
    assert words.index("be brief") < words.index("this ?") < words.index("red") < words.index("and ?")
