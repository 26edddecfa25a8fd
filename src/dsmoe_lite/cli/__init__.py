"""The `dsmoe` command: one file a subcommand, imported only when it is called."""

import importlib
import sys

import click

from dsmoe_lite import __version__
from dsmoe_lite.common.errors import InputError, RunError

COMMANDS = {  # name -> one line of help; module dsmoe_lite.cli.<name> holds `command`
    "lab": "Open JupyterLab at a working copy of a chapter.",
    "run": "Run one chapter with parameters into runs/.",
    "course": "Run every chapter and print the table of times.",
    "train": "Train a model from a config file.",
    "experiment": "Run what a named grid of runs is still missing.",
    "replay": "Train a recorded run again, to have its weights.",
    "bench": "Measure ratios in one process.",
    "count": "Count parameters, FLOPs and cache of a preset or config.",
    "claims": "Recompute what papers claim, and print what came out.",
    "check": "Print what this machine has and the profile it would use.",
    "book": "Build the book.",
    "refresh": "Write the chapters' reference outputs (authors).",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"dsmoe_lite.cli.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsmoe")
def group() -> None:
    """DeepSeekMoE, built step by step."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit 2 on bad input, 1 on failure, 130 on Ctrl-C, always in one line."""
    try:
        status = group.main(arguments, prog_name="dsmoe", standalone_mode=False)
    except click.exceptions.Abort:
        _leave("stopped", 130)
    except click.ClickException as error:
        _leave(error.format_message(), 2)
    except InputError as error:
        _leave(str(error), 2)
    except (RunError, OSError) as error:
        _leave(str(error), 1)
    except KeyboardInterrupt:
        _leave("stopped", 130)
    except ModuleNotFoundError as error:
        _leave(f"{error.name} is not installed: run `make setup`, or `pip install -e '.[course]'`", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _leave(message: str, status: int) -> None:
    click.echo(f"dsmoe: {message}", err=True)
    sys.exit(status)
