"""The Typer app; commands of plugins are imported only when they run."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
import typer.core

from vismem_core import plugins
from vismem_core.errors import PluginError
from vismem_core.plugins import Entry

from . import backbones, data, demo, doctor, eval, experiment, infer, probe, push, train
from . import plugins as plugins_command
from .console import warn


class PluginCommand(typer.core.TyperCommand):
    """Stands for a plugin's command in the list of commands, and becomes it when it runs."""

    def __init__(self, entry: Entry) -> None:
        description = str(entry.facts.get("description", f"A command of {entry.distribution}."))
        super().__init__(entry.name, callback=None, help=description)
        self.entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        loaded = self.entry.load()
        if not isinstance(loaded, typer.Typer):
            if not callable(loaded):
                raise PluginError(f"command {self.entry.name!r}: {self.entry.target} is no typer app and no function")
            function, loaded = loaded, typer.Typer(add_completion=False)
            loaded.command()(function)
        return typer.main.get_command(loaded).make_context(info_name, args, parent=parent, **extra)


class Commands(typer.core.TyperGroup):
    """The built-in commands, then those of plugins."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        entries = plugins.registry("commands").entries()
        for entry in entries:
            if entry.name in own:
                warn(f"the command {entry.name!r} of {entry.distribution} is hidden by vismem's own")
        return own + [entry.name for entry in entries if entry.name not in own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if command := super().get_command(ctx, cmd_name):
            return command
        entries = {entry.name: entry for entry in plugins.registry("commands").entries()}
        return PluginCommand(entries[cmd_name]) if cmd_name in entries else None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Example: vismem train --backbone qwen2_5_vl",
)
app.command("train", epilog=train.EXAMPLE)(train.train)
app.command("infer", epilog=infer.EXAMPLE)(infer.infer)
app.command("eval", epilog=eval.EXAMPLE)(eval.eval_)
app.command("experiment", epilog=experiment.EXAMPLE)(experiment.experiment)
app.command("probe", epilog=probe.EXAMPLE)(probe.probe)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("push", epilog=push.EXAMPLE)(push.push)
app.command("plugins", epilog=plugins_command.EXAMPLE)(plugins_command.plugins)
app.command("data", epilog=data.EXAMPLE)(data.data)
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)
app.command("backbones", epilog=backbones.EXAMPLE)(backbones.backbones)


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
