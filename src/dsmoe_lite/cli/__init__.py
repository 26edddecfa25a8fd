"""The `dsmoe` command: one module per subcommand, imported only when the subcommand is called."""

import importlib
import io
import sys

import click

from dsmoe_lite import __version__
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.paths import IS_CLONE, install_command

COMMANDS = {  # name -> one line of help; module dsmoe_lite.cli.<name> defines `command`
    "lab": "Open JupyterLab at your copy of a chapter.",
    "run": "Run one chapter with the parameters you give.",
    "labs": "For instructors: labs with variants and grades, and sweeps.",
    "course": "Run every chapter and print how long each takes.",
    "corpus": "Make a corpus of real text from packages of Debian.",
    "train": "Train the model that a config file describes.",
    "experiment": "Train the runs that a grid of models and seeds lacks.",
    "replay": "Train a recorded run again and keep its weights.",
    "bench": "Time layers, training, attention or kernels.",
    "count": "Count parameters, FLOPs and KV cache of a model.",
    "claims": "Recompute the claims of the papers and our verdicts.",
    "check": "Print what this machine has and which profile suits it.",
    "book": "Build the chapters as web pages.",
    "refresh": "Execute chapters and store their outputs (authors).",
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
    """DeepSeekMoE, built step by step.

    `dsmoe COMMAND --help` explains one command.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors are one line; exit 2 on bad input, 1 on failure, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # "?" for what the terminal's encoding lacks, such as "…" in ASCII
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = group.main(arguments, prog_name="dsmoe", standalone_mode=False)
    except click.exceptions.Abort:
        _exit("stopped", 130)
    except click.ClickException as error:
        _exit(error.format_message(), 2)
    except InputError as error:
        _exit(str(error), 2)
    except (RunError, OSError) as error:
        _exit(str(error), 1)
    except KeyboardInterrupt:
        _exit("stopped", 130)
    except ModuleNotFoundError as error:
        alternative = ", or `pip install -e '.[course]'`" if IS_CLONE else ""
        _exit(f"{error.name} is not installed: run `{install_command()}`{alternative}", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _exit(message: str, status: int) -> None:
    click.echo(f"dsmoe: {message}", err=True)
    sys.exit(status)
