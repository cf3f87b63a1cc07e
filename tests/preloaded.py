"""What the server of tests/forked.py imports: all that a command may, so that no child imports it again."""

from runner.cli import apply, edge, explain, export, gc, new, plan, report, sample, select, status, validate  # noqa: F401
from runner.execute import apply as applying  # noqa: F401
from runner.execute import export as exporting  # noqa: F401
from runner.execute import publish, sampling  # noqa: F401
from runner.families.registry import family
from runner.networks import attach, merge, quantize  # noqa: F401
from runner.optim import build, schedules  # noqa: F401
from runner.registry import FAMILIES
from runner.stages import cache, score, train  # noqa: F401
from runner.stages import sample as sampling_stage  # noqa: F401
from runner.stages import select as selecting  # noqa: F401

for _name in FAMILIES:
    family(_name)
