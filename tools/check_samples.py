"""Makes pictures of a fixed list of prompts with a run's checkpoint and says how many show what their prompt says.

    python -m tools.check_samples recipes/quickstart/run.toml --checkpoint base
    python -m tools.check_samples recipes/quickstart/run.toml --checkpoint best --shapes heart

The list is tools/micro_prompts.txt: 200 prompts of the base model's shapes, then 48 of the quickstart's heart.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runner.core.process import prepare_environment
from runner.pictures import read_picture
from tools.classify_shapes import classify
from tools.draw_shapes import BASE_SHAPES

PROMPTS = Path(__file__).parent / "micro_prompts.txt"
_PROMPT = re.compile(r"an? (\w+) (\w+) on (\w+)")


@dataclass(frozen=True)
class Quality:
    """Shares, 0 to 1: colour right, shape right (of all and by shape), and what was seen of each asked shape."""

    count: int
    colour: float
    shape: float
    by_shape: dict[str, float]
    seen: dict[str, Counter[str]]

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {share:.1%}" for name, share in self.by_shape.items())
        return f"{self.count} prompts: colour right {self.colour:.1%}, shape right {self.shape:.1%} ({shapes})"


def quality(prompts: Sequence[str], pictures: Sequence[Path]) -> Quality:
    """Compares what the classifier sees with what the prompts say."""
    colours = shapes = 0
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    seen: dict[str, Counter[str]] = {}
    for prompt, file in zip(prompts, pictures, strict=True):
        match = _PROMPT.match(prompt)
        assert match, prompt
        colour, shape, _ = match.groups()
        with read_picture(file) as picture:
            verdict = classify(picture)
        asked[shape] += 1
        seen.setdefault(shape, Counter())[verdict.shape] += 1
        colours += verdict.colour == colour
        shapes += verdict.shape == shape
        right[shape] += verdict.shape == shape
    by_shape = {shape: right[shape] / asked[shape] for shape in sorted(asked)}
    return Quality(len(prompts), colours / len(prompts), shapes / len(prompts), by_shape, seen)


def make(run_file: Path, checkpoint: str, wanted: Sequence[str], folder: Path, cfg_scale: float, steps: int) -> Quality:
    """Makes the pictures of the wanted shapes with `runner sample`'s own code."""
    from runner.cli.common import prepared_run
    from runner.config.prompts import read_prompt_file
    from runner.execute.sampling import Sampling
    from runner.families.prompts import Readying
    from runner.plan.prompts import prompt_file

    prepared = prepared_run(run_file, may_defer=False)
    prompts = [p for p in read_prompt_file(PROMPTS, "kohya") if p.prompt.split()[2] in wanted]
    sampling = prepared.config.sampling.model_copy(update={"cfg_scale": cfg_scale, "num_inference_steps": steps})
    files = partial(prompt_file, prepared.store, prepared.folder)
    readying = Readying(
        sampling=sampling,
        spec=prepared.spec,
        model=prepared.model,
        seed=prepared.config.run.seed,
        drawn={},
        files=files,
    )
    ready = [readying.ready(index, prompt) for index, prompt in enumerate(prompts)]
    pictures = list(Sampling(prepared, checkpoint, keep_loaded=False).make(ready, folder))
    return quality([prompt.prompt for prompt in prompts], pictures)


def main() -> None:
    prepare_environment()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", default="best")
    parser.add_argument("--shapes", nargs="+", default=list(BASE_SHAPES))
    parser.add_argument("--out", type=Path, default=Path("samples-checked"))
    parser.add_argument("--cfg-scale", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    found = make(given.run, given.checkpoint, given.shapes, given.out, given.cfg_scale, given.steps)
    print(found)
    for shape, counts in sorted(found.seen.items()):
        print(f"  asked for {shape}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main()
