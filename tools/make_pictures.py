"""Makes the README's pictures from a finished quickstart: docs/strip.png, and docs/plan.svg from what `runner plan` prints.

python -m tools.make_pictures recipes/quickstart/run.toml
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
from pathlib import Path

from rich.console import Console
from rich.text import Text

from runner.cli.common import plan_figures, prepared_run, shown_plan
from runner.plan.diff import make_plan

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    given = parser.parse_args()
    prepared = prepared_run(given.run, tuple(given.settings))
    plan = make_plan(prepared)
    console = Console(record=True, width=132, file=io.StringIO(), force_terminal=True)
    name = " ".join(f"--set {setting}" for setting in given.settings)
    console.print(Text(f"$ runner plan run.toml {name}\n"))
    console.print(Text.from_ansi(shown_plan(plan, plan_figures(plan)).replace(str(prepared.folder), "~/hearts")))
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="runner plan"), flags=re.DOTALL)
    (DOCS / "plan.svg").write_text(svg, encoding="utf-8")
    shutil.copyfile(prepared.output_dir / "strip.png", DOCS / "strip.png")


if __name__ == "__main__":
    main()
