"""What a stage gives to the training loop; an objective is a class of this form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from vismem_core.config import StageConfig
from vismem_core.memory.memory import Memory

from .balance import Pieces
from .batches import Batch
from .processes import Processes


class Stage(ABC):
    """One stage of training.

    Args:
        settings: its steps, batch, rate and limits.
        processes: that train together.

    Attributes:
        draw: gives so many further samples of the data, this process's part of them, which may be none; all processes
            must ask for the same number.
    """

    pieces: Pieces | None = None
    """The pieces of work on a sample, where several processes may share it."""

    def __init__(self, memory: Memory, settings: StageConfig, processes: Processes | None = None) -> None:
        self.memory, self.settings, self.processes = memory, settings, processes or Processes(memory.model)
        self.draw: Callable[[int], Batch] | None = None

    @property
    def ways(self) -> Sequence[str]:
        """How held-out questions are answered to see how well it does, as conditions of an evaluation."""
        return ("memory",)

    @abstractmethod
    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        """What trains: name, tensor, learning rate relative to the stage's."""

    @abstractmethod
    def accumulate(self, batch: Batch, key: str, progress: float) -> dict[str, float]:
        """Add up the gradients of one step; figures for the log, ``loss`` among them.

        Args:
            batch: this process's part of the step's batch.
            key: all chance comes from it, the samples' ids and torch's default generator.
            progress: from 0 to 1.
        """

    def stepped(self) -> None:
        """Called after every step of the optimiser."""
        return

    def finish(self) -> None:
        """Called once after the last step."""
        return

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know beyond the parameters."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        return


class LikelihoodStage(Stage):
    """A stage that is a loss on given answers, with adapters' dropout on."""

    def accumulate(self, batch: Batch, key: str, progress: float) -> dict[str, float]:
        self.memory.train()
        with only(self.memory, self.parameters()):
            loss, figures = self.loss(batch, key)
            loss.backward()
        return figures

    @abstractmethod
    def loss(self, batch: Batch, key: str) -> tuple[Tensor, dict[str, float]]:
        """This process's part of the loss, and figures for the log."""


@contextmanager
def only(memory: Memory, parameters: Sequence[tuple[str, nn.Parameter, float]]) -> Iterator[None]:
    """Gradients for the given parameters of a memory and no others, those of its base included, inside the context."""
    chosen = {name for name, _, _ in parameters}
    others = [tensor for name, tensor in memory.trained().items() if name not in chosen]
    others = [tensor for tensor in (*others, *memory.model.parameters()) if tensor.requires_grad]
    for tensor in others:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in others:
            tensor.requires_grad_(True)
