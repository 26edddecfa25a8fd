"""`dsmoe labs`: sweeps over parameters, and labs that are handed out, collected and graded."""

import click

from dsmoe_lite.cli.labs.grading import export, grade
from dsmoe_lite.cli.labs.handouts import list_labs, release, show
from dsmoe_lite.cli.labs.reports import report
from dsmoe_lite.cli.labs.sweeps import run


@click.group(name="labs")
def command() -> None:
    """For instructors: sweeps over parameters, and labs with variants, grades and feedback."""


for one in (list_labs, show, run, report, release, grade, export):
    command.add_command(one)
