"""The Typer app. A command is imported when it runs, vismem's own as well as those of plugins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import typer
import typer.core

from vismem_core import plugins
from vismem_core.errors import PluginError
from vismem_core.plugins import Entry, resolve

from .console import warn
from .options import OUTPUT

OWN = {
    "train": ("train:train", "Train latent vision memory on a frozen model, and report what it changed."),
    "infer": ("infer:infer", "Answer a question, or a file of questions, and show where which memory was invoked."),
    "demo": ("demo:demo", "Put up a page to ask on: answers with memory and without it, and where memory looked."),
    "serve": ("serve:serve", "Answer requests of OpenAI's clients with a model that has memory."),
    "eval": ("eval:eval_", "Compare answers with memory, without it, and over another question's image."),
    "probe": ("probe:probe", "Put other things in the latents' places, and see what answers lose."),
    "experiment": ("experiment:experiment", "Run experiments: train what they compare, ask it, and write a page."),
    "data": ("data:data", "Say what is understood of some data, and what is wrong with it."),
    "push": ("push:push", "Publish a trained memory: weights, description, report and card."),
    "backbones": ("backbones:backbones", "List the families of models that memory can be attached to."),
    "plugins": ("plugins:plugins", "List the plugins, and why any of them did not load."),
    "doctor": ("doctor:doctor", "Say what is installed here, what loads and what does not."),
}
"""vismem's commands: where the function is, and what the list of commands says; its docstring says more."""


class Command(typer.core.TyperCommand):
    """A command whose help has a panel for every option, ``--help`` among them."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = _bare(super().get_params(ctx))
        for own in params:
            if own.name == "help":
                own.rich_help_panel = OUTPUT
        return params


class Later(typer.core.TyperCommand):
    """Stands for a command in the list of commands, and becomes it when it runs."""

    def __init__(self, name: str, told: str, become: Callable[[], Any]) -> None:
        super().__init__(name, callback=None, help=told)
        self.become = become

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self.become().make_context(info_name, args, parent=parent, **extra)


def own_command(name: str) -> Any:
    """One of vismem's own commands."""
    module, _, function = OWN[name][0].partition(":")
    app = typer.Typer(add_completion=False)
    example = resolve(f"{__package__}.{module}:EXAMPLE")
    app.command(name, cls=Command, epilog=example)(resolve(f"{__package__}.{module}:{function}"))
    return typer.main.get_command(app)


def plugin_command(entry: Entry) -> Any:
    """A plugin's command: a typer app, or a function."""
    loaded = entry.load()
    if not isinstance(loaded, typer.Typer):
        if not callable(loaded):
            raise PluginError(f"command {entry.name!r}: {entry.target} is no typer app and no function")
        function, loaded = loaded, typer.Typer(add_completion=False)
        loaded.command()(function)
    return typer.main.get_command(loaded)


class Commands(typer.core.TyperGroup):
    """vismem's own commands, then those of plugins."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _bare(super().get_params(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        entries = plugins.registry("commands").entries()
        for entry in entries:
            if entry.name in OWN and not ctx.resilient_parsing:
                warn(f"the command {entry.name!r} of {entry.distribution} is hidden by vismem's own")
        return [*OWN, *(entry.name for entry in entries if entry.name not in OWN)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in OWN:
            return Later(cmd_name, OWN[cmd_name][1], partial(own_command, cmd_name))
        entries = {entry.name: entry for entry in plugins.registry("commands").entries()}
        if (entry := entries.get(cmd_name)) is None:
            return None
        told = str(entry.facts.get("description", f"A command of {entry.distribution}."))
        return Later(cmd_name, told, partial(plugin_command, entry))


def _bare(params: list[Any]) -> list[Any]:
    """The same parameters; in the help, no type stands beside a flag."""
    for own in params:
        if getattr(own, "is_flag", False) and own.metavar is None:
            own.metavar = ""
    return params


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, epilog="Example: vismem train --backbone qwen2_5_vl")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vismem {version('vismem')}")
        raise typer.Exit


@app.callback()
def vismem(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Latent vision memory for any vision-language model."""
