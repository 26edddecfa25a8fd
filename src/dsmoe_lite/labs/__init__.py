"""What a chapter calls and what runs chapters. Importing this package loads no torch, IPython or papermill."""

from dsmoe_lite.labs.begin import begin
from dsmoe_lite.labs.claims import claim
from dsmoe_lite.labs.exercises import check_exercise, predict
from dsmoe_lite.labs.results import report
from dsmoe_lite.labs.session import check_parameters

__all__ = ["begin", "check_exercise", "check_parameters", "claim", "predict", "report"]
