"""Arguments and options that several commands of `dsmoe labs` have."""

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)

lab_argument = click.argument("lab")
students_option = click.option("--students", type=FILE, help="CSV file of the students: id, and if known name, email.")
secret_option = click.option(
    "--secret",
    type=FILE,
    default=Path("course.secret"),
    show_default=True,
    help="The course's secret, from which the variants are drawn. Keep it, and keep it to yourself.",
)
