"""Memory as the model of other trainers: transformers' ``Trainer``, TRL's, accelerate, a loop of your own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vismem_core.config import KINDS
from vismem_core.decoding.forward import IGNORED, forward
from vismem_core.errors import DataError
from vismem_core.memory.memory import Memory

from .batches import extended


def trainable(memory: Memory) -> Trainable:
    """A model for any trainer of sequences: its parameters are memory's, its forward the one with memory.

    Sequences hold memory tokens as ids (:func:`collate` and :meth:`Memory.encode <vismem_core.Memory.encode>` write
    them), or none: they too are scored as the policy's, which could have asked. The base's parameters need no gradients
    from now on, until ``memory.detach()``.

    Trainers that make a reference model for themselves, as TRL's do for ``beta`` above 0, make it of the base, which
    knows no memory tokens: leave ``beta`` at 0.
    """
    return Trainable(memory)


def collate(memory: Memory, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a trainer feeds to the model, of rows with ``prompt``, ``answer``, and ``image`` or ``images`` if there are
    some; the loss is about the answers.

    Answers may spell memory tokens: ``<ms_I><ms_E> four`` invokes short-term memory first. The end of the turn is
    added. End tokens have no label: nobody has a choice there.

    Raises:
        DataError: there are no rows, a row lacks its prompt or its answer, or they are no texts, or an answer's memory
            tokens stand alone.
    """
    if not rows:
        raise DataError("there are no rows")
    for number, row in enumerate(rows):
        for name in ("prompt", "answer"):
            if not isinstance(row.get(name), str):
                raise DataError(f"row {number}: {name!r} must be a text; rows have prompt, answer, and image or images")
    backbone = memory.backbone
    images = [row["images"] if "images" in row else [row["image"]] if "image" in row else [] for row in rows]
    prompts = backbone.inputs([row["prompt"] for row in rows], images)
    answers = [[*memory.encode(row["answer"]), backbone.end_of_turn] for row in rows]
    inputs = extended(prompts, answers, int(backbone.processor.tokenizer.pad_token_id))
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for at, answer in enumerate(answers):
        labels[at, -len(answer) :] = inputs["input_ids"][at, -len(answer) :]
    for number, answer in enumerate(answers):
        if (odd := memory.tokens.unpaired(answer)) is not None:
            raise DataError(f"row {number}: in its answer, {odd}")
    ends = labels >= memory.tokens.end(KINDS[0])
    return inputs | {"labels": labels.masked_fill(ends, IGNORED)}


class Trainable(nn.Module):
    """What :func:`trainable` gives. Whatever it does not know itself, such as ``config``, is the base model's."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        memory.freeze()
        self.memory = memory
        own = {id(tensor) for tensor in memory.parameters()}
        adapters = {name: tensor for name, tensor in memory.trained().items() if id(tensor) not in own}
        # Names of parameters hold no dots; those of adapters have them.
        self.adapters = nn.ParameterDict({name.replace(".", "/"): tensor for name, tensor in adapters.items()})
        self._checkpointing, self._temperature = False, 1.0
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_modules"]["memory"].model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # TRL puts a forward around this one, which knows the temperature of log-probabilities
            function = inspect.unwrap(getattr(value, "__func__", value), stop=_knows_temperature)
            if _knows_temperature(function):
                self._temperature = inspect.getclosurevars(function).nonlocals["temperature"]
        super().__setattr__(name, value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **inputs: Any,
    ) -> Any:
        """As :func:`vismem_core.decoding.forward.forward`, for answers that nothing is to follow."""
        inputs |= {"checkpointing": self._checkpointing and self.training, "finished": True}
        return forward(self.memory, input_ids, attention_mask, labels, logits_to_keep, **inputs)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        # TRL computes log-probabilities with the base's head, which knows no memory tokens.
        if not inputs.pop("fused_lm_head", False):
            return super().__call__(*args, **inputs)
        labels = inputs.pop("labels")
        first = int((labels[:, 1:] != IGNORED).any(0).int().argmax())
        keep = labels.shape[1] - first
        logits = super().__call__(*args, **inputs, logits_to_keep=keep).logits
        return _scored(logits[:, :-1].float() / self._temperature, labels[:, first + 1 :], first)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, with memory."""
        return self.memory.model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Compute the decoder's layers again in the backward pass instead of keeping their insides."""
        self._checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self._checkpointing = False

    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable

    def save_pretrained(self, folder: str | Path, **about: Any) -> None:
        """Write the memory, as :meth:`Memory.save <vismem_core.Memory.save>` does."""
        self.memory.save(folder)


@dataclass
class Scores(ModelOutput):
    """Per label what TRL's trainers ask for, (B, L - 1) with zeros where there is none."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def _scored(logits: Tensor, labels: Tensor, left_out: int) -> Scores:
    """Scores of labels (B, K) before which there are ``left_out`` columns without any."""
    mask = labels != IGNORED
    labels = labels.clamp(min=0).to(logits.device)
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()

    def padded(own: Tensor) -> Tensor:
        return nn.functional.pad(own.masked_fill(~mask.to(own.device), 0), (left_out, 0))

    chosen = padded(logprobs.gather(2, labels[..., None]).squeeze(2))
    with torch.no_grad():
        squares, means = padded((2 * logprobs).logsumexp(-1)), padded(logits.mean(-1))
        best = padded(logits.argmax(-1) == labels)
    return Scores(
        loss=-chosen.sum() / mask.sum().clamp(min=1),
        log_probs=chosen,
        entropy=padded(-(probabilities * logprobs).sum(-1)),
        log_sum_sq_probs=squares,
        mean_logits=means,
        is_top1=best,
        label_mask=nn.functional.pad(mask, (left_out, 0)),
    )


def _knows_temperature(function: Any) -> bool:
    return "temperature" in getattr(getattr(function, "__code__", None), "co_freevars", ())
