"""What all parts of the suite share: what an author gives, and failures that name the contract they break."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec

import pytest

from vismem_core.base.backbone import Backbone
from vismem_core.errors import AttachError
from vismem_core.plugins import registry

from .base import Base, Question
from .liveliness import picture

P = ParamSpec("P")


def holds(sentence: str, where: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Let every failure of a test begin with the contract it holds and the place that describes it."""

    def decorate(test: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(test)
        def told(*args: P.args, **kwargs: P.kwargs) -> None:
            __tracebackhide__ = True
            try:
                test(*args, **kwargs)
            except Exception as error:  # a backbone may fail in any way
                reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                raise AssertionError(f"{sentence}; see {where}\n{reason}") from error

        vars(told).update(sentence=sentence, where=where)
        return told

    return decorate


class Contract:
    """What an author gives; see :class:`vismem_core.testing.BackboneContract`."""

    backbone: ClassVar[str | type[Backbone]]
    """Registered name, or the class itself."""
    several_images: ClassVar[bool] = True
    """Whether a prompt may hold more than one image."""
    text_only: ClassVar[bool] = True
    """Whether a prompt may hold no image, beside others that do."""
    device: ClassVar[str] = os.environ.get("VISMEM_TEST_DEVICE", "cpu")
    """Where the checks run, such as ``cuda``; the environment variable says it for all."""

    def load(self) -> tuple[Any, Any]:
        """A tiny random model in fp32, made on the CPU, and its processor; called anew for every test.

        Give it two layers in each tower and :func:`vismem_core.testing.liven` it.
        """
        raise NotImplementedError(f"{type(self).__name__}.load must return a model and its processor")

    def questions(self) -> list[Question]:
        """Prompts of different lengths about images of different sizes; the first two with one image each."""
        questions: list[Question] = [
            ("what is on the left ?", [picture(32, 32, 0)]),
            ("is it a boot , or is it a coat ?", [picture(24, 56, 1)]),
        ]
        if self.several_images:
            questions.append(("a bag , a coat . and a boot ?", [picture(48, 32, 2), picture(16, 40, 3)]))
        if self.text_only:
            questions.append(("what is it ?", []))
        return questions

    def base(self) -> Base:
        """The model and processor of this test, with memory not yet attached."""
        model, processor = self.load()
        if isinstance(self.backbone, str):
            return Base(model, processor, registry("backbones").get(self.backbone), self.backbone, self.device)
        return Base(model, processor, self.backbone, device=self.device)

    def packing(self, base: Base, packs: bool) -> None:
        """Let latents enter in the neighbours' pass, or in one of their own; skip what the backbone never does."""
        if packs and not base.backbone.packs:
            pytest.skip("the backbone does not pack")
        base.backbone.packs = packs

    def rereading(self, base: Base, context: str) -> None:
        """Skip ``context="recompute"`` where the backbone does not read prompts again, and attaching says so."""
        if context == "recompute" and not base.backbone.rereads:
            with pytest.raises(AttachError, match=r"memory\.long\.context=cache"):
                base.attach(context=context)
            pytest.skip("prompts are not read again")
