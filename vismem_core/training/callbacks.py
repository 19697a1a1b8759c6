"""Who is told of a stage's steps, in the words of transformers' ``Trainer``: a callback written for it fits as it is.

Each stage is a training of its own: it begins, takes steps, and ends, perhaps before its last step. Events come in the
order of the ``Trainer``, and ``control`` is honoured; there are no epochs that begin and end.
https://huggingface.co/docs/transformers/main_classes/callback
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from vismem_core.config import StageConfig, TrainConfig
from vismem_core.errors import ConfigError, TrainingError
from vismem_core.memory.memory import Memory
from vismem_core.plugins import reason, registry

from .processes import Processes

FLAGS = ("should_training_stop", "should_evaluate", "should_save")
OVER = {
    "on_step_begin": ("should_log", "should_evaluate", "should_save"),
    "on_log": ("should_log",),
    "on_evaluate": ("should_evaluate",),
    "on_save": ("should_save",),
}
"""Which flags of the control an event puts down before anyone hears of it."""


def parse(specs: Sequence[str]) -> list[TrainerCallback]:
    """Callbacks from specs ``NAME[:ARGUMENT]``; what is registered is called with the argument where there is one.

    Raises:
        PluginError: an unknown name.
        ConfigError: it cannot be made so, or is no callback.
    """
    return [_made(*spec.partition(":")) for spec in specs]


def _made(name: str, colon: str, argument: str) -> TrainerCallback:
    make = registry("callbacks").get(name)
    try:
        return checked(make(argument) if colon else make(), name)
    except ConfigError:
        raise
    except Exception as error:  # whatever a class makes of its argument
        raise ConfigError(f"callback {name}{colon}{argument} cannot be made: {reason(error)}") from error


def checked(given: object, name: str = "") -> TrainerCallback:
    """``given``, if it is a callback.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(given, TrainerCallback):
        found = given.__name__ if isinstance(given, type) else type(given).__name__
        raise ConfigError(f"callback {name or found}: {found} is no instance of transformers.TrainerCallback")
    return given


class Patience(EarlyStoppingCallback):
    """Early stopping as transformers has it, without its word on what is kept: that is a setting of its own here."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        return


class Callbacks:
    """All callbacks of a run, told of one stage after the other.

    Args:
        given: people's; after them comes early stopping, where the settings ask for it.

    Attributes:
        state: transformers' own, of the stage: ``global_step`` counts its steps.
        control: what callbacks ask for.
        best: the step of the best evaluation, and whether the stage was finished; None before the first.
    """

    def __init__(
        self,
        given: Sequence[TrainerCallback],
        config: TrainConfig,
        memory: Memory,
        processes: Processes,
        folder: Path,
    ) -> None:
        self.config, self.memory, self.processes, self.folder = config, memory, processes, folder
        evaluation = config.evaluation
        own = [Patience(evaluation.patience, evaluation.min_delta)] if evaluation.patience else []
        self._told = list(zip(_names([*given, *own]), [*given, *own], strict=True))
        self.state, self.control = TrainerState(), TrainerControl()
        self.best: tuple[int, bool] | None = None
        self._args: TrainingArguments | None = None
        self._given: dict[str, Any] = {}

    @property
    def stopping(self) -> bool:
        """Whether a callback asked for the stage's end."""
        return bool(self.control.should_training_stop)

    def open(self, stage: str, settings: StageConfig, optimizer: torch.optim.Optimizer) -> None:
        """A stage is about to begin or to go on."""
        known = self._args is not None
        self._args = _arguments(self.config, settings, stage, self.folder) if self._told else None
        self.control, self.best = TrainerControl(), None
        self.state = TrainerState(
            max_steps=settings.steps,
            logging_steps=1,
            eval_steps=self.config.evaluation.every,
            save_steps=self.config.save_every,
            train_batch_size=settings.batch,
            num_train_epochs=1,
            is_local_process_zero=self.processes.first,
            is_world_process_zero=self.processes.first,
        )
        self._given = {
            "model": self.memory.model,
            "processing_class": self.memory.backbone.processor,
            "optimizer": optimizer,
            "lr_scheduler": None,
            "train_dataloader": None,
            "eval_dataloader": None,
            "memory": self.memory,
            "stage": stage,
        }
        if not known:
            self.tell("on_init_end")
        self.to_json()  # what could not be saved is told now

    def tell(self, event: str, **more: Any) -> None:
        """Tell all of an event, in order.

        Raises:
            TrainingError: one of them raised; the message names it.
        """
        for flag in OVER.get(event, ()):
            setattr(self.control, flag, False)
        for name, own in self._told:
            try:
                answer = getattr(own, event)(self._args, self.state, self.control, **self._given, **more)
            except Exception as error:  # whatever a callback does wrong
                raise TrainingError(f"callback {name} failed in {event}: {reason(error)}") from error
            self.control = answer or self.control

    def stepped(self, step: int, epoch: float, row: Mapping[str, Any]) -> None:
        """A step of the optimiser is done, and ``row`` is what is logged of it."""
        self.state.global_step, self.state.epoch = step, epoch
        self.tell("on_optimizer_step")
        self.tell("on_step_end")
        self._agree()
        self._log(row)

    def evaluated(self, figures: Mapping[str, float], finished: bool) -> bool:
        """An evaluation is done; whether it is the best so far."""
        self._log(figures)
        self.tell("on_evaluate", metrics=dict(figures))
        self._agree()
        score, best = figures[f"eval_{self.config.metric.partition(':')[0]}"], self.state.best_metric
        if best is not None and score <= best:
            return False
        self.state.best_metric, self.state.best_global_step = score, self.state.global_step
        self.best = (self.state.global_step, finished)
        return True

    def to_json(self) -> str:
        """What a resumed run must know of them: callbacks with a ``state`` are asked for theirs.

        Raises:
            TrainingError: what a callback says of itself is no JSON.
        """
        told: dict[str, Any] = {"best": self.best, "metric": self.state.best_metric, "stopping": self.stopping}
        told["own"] = own = {}
        for name, callback in self._told:
            if isinstance(callback, ExportableState):
                own[name] = callback.state()["attributes"]
                try:
                    json.dumps(own[name])
                except (TypeError, ValueError) as error:
                    raise TrainingError(f"callback {name}: its state is no JSON: {reason(error)}") from error
        return json.dumps(told)

    def restore(self, step: int, text: str) -> None:
        """Go on from what :meth:`to_json` gave."""
        told = json.loads(text)
        self.state.global_step = step
        self.control.should_training_stop = told["stopping"]
        if told["best"]:
            self.best, self.state.best_metric = tuple(told["best"]), told["metric"]
            self.state.best_global_step = told["best"][0]
        for name, callback in self._told:
            for attribute, value in told["own"].get(name, {}).items():
                setattr(callback, attribute, value)

    def _log(self, row: Mapping[str, Any]) -> None:
        figures = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        figures |= {"epoch": self.state.epoch}
        self.state.log_history.append({**figures, "step": self.state.global_step})
        self.tell("on_log", logs=figures)

    def _agree(self) -> None:
        """What one process's callback asks for, all do."""
        if self._told and self.processes.count > 1:
            asked = torch.tensor([float(getattr(self.control, flag)) for flag in FLAGS])
            for flag, count in zip(FLAGS, self.processes.total(asked).tolist(), strict=True):
                setattr(self.control, flag, count > 0)


def _names(callbacks: Sequence[TrainerCallback]) -> list[str]:
    """Their types' names, numbered from the second on."""
    seen: Counter[str] = Counter()
    names = []
    for own in callbacks:
        name = type(own).__name__
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return names


def _arguments(config: TrainConfig, settings: StageConfig, stage: str, folder: Path) -> TrainingArguments:
    """A stage's settings by the names that transformers has for them."""
    every = config.evaluation.every
    told = TrainingArguments(
        output_dir=str(folder),
        run_name=stage,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        seed=config.seed,
        logging_steps=1,
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        save_steps=config.save_every,
        metric_for_best_model=f"eval_{config.metric.partition(':')[0]}",
        greater_is_better=True,
        report_to="none",
        disable_tqdm=True,
        accelerator_config={"use_configured_state": True},  # or it would forget the other processes
    )
    told.load_best_model_at_end = config.evaluation.keep == "best"
    return told
