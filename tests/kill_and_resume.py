"""Kills an apply at twenty places and compares what it comes to with an undisturbed run, byte for byte.

    python -m tests.kill_and_resume [FOLDER]

Places: at least two in each stage, while a state is written, and while files are published. The fast suite runs a few
of them (tests/test_resume.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.support import Place, new_place, run_bytes

STEPS, STATE_EVERY = 12, 3
SETTINGS = {
    "network": {"rank": 4, "dropout": 0.1, "conv_rank": 2},
    "dataset": {"batch_size": 2, "caption_dropout_rate": 0.2, "flip_aug": True},
    "training": {
        "max_train_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "checkpoints": {"every_n_steps": 4, "state_every_n_steps": STATE_EVERY},
        "scheduler": {"type": "cosine", "warmup_steps": 2},
        "ema": {"decay": 0.9},
    },
    "sampling": {"every_n_steps": 4},
    "caching": {"latent_batch_size": 2, "text_batch_size": 2},
    "selection": {
        "publish": [{"directory": "published", "mode": "copy"}, {"directory": "all", "which": "all", "mode": "symlink"}]
    },
}
PLACES = [
    "rename:items/latents:2:after",
    "rename:items/latents:9:before",
    "rename:items/text:2:before",
    "rename:items/text:2:after",
    "fsync:states/.tmp:1:before",
    "fsync:states/.tmp:3:after",
    "rename:states/state-00000003:1:after",
    "rename:checkpoints/step-:1:before",
    "rename:checkpoints/step-:1:after",
    "rename:items/samples:1:after",
    "rename:states/state-00000009:1:before",
    "rename:train.json:1:after",
    "rename:artifacts/train:1:before",
    "rename:artifacts/train:1:after",
    "rename:items/samples:2:before",
    "rename:items/samples:2:after",
    "rename:items/scores:2:before",
    "rename:items/scores:3:after",
    "rename:artifacts/select:1:before",
    "rename:exports/:1:before",
    "rename:published/:1:before",
    "rename:published/:1:after",
    "rename:all/:2:before",
    "rename:report.html:1:before",
]
FEW = [PLACES[index] for index in (0, 4, 8, 12, 15, 21)]


def executed_steps(place: Place) -> int:
    """Steps that were logged over all attempts, those that were done again among them."""
    lines = (place.output / "logs" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return sum(1 for event in events if event["type"] == "step")


def compare(folder: Path, model: Path, places: list[str]) -> int:
    """Runs both ways and asserts that they are equal; returns the number of kills."""
    calm, hunted = new_place(folder / "calm", model), new_place(folder / "hunted", model)
    for place in (calm, hunted):
        place.write(SETTINGS)
    calm.run("apply", fresh=True).ok()  # with hashes of its own
    kills = 0
    for where in places:
        result = hunted.run("apply", kill=where)
        assert result.code in (-9, 0), f"{where}: exit {result.code}\n{result.err}"
        assert "Traceback" not in result.err, f"{where}\n{result.err}"
        kills += result.code == -9
        print(f"{where}: {'killed' if result.code == -9 else 'did not come by'}", flush=True)
    hunted.run("apply").ok()
    again = hunted.run("plan", "--detailed-exitcode")
    assert again.code == 0, again.out
    ours, theirs = run_bytes(hunted.output), run_bytes(calm.output)
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))
    differing = [name for name in ours if ours[name] != theirs[name]]
    assert not differing, f"other bytes: {differing}"
    for part in ("published", "all"):
        first = {path.name: path.read_bytes() for path in (hunted.folder / part).iterdir()}
        second = {path.name: path.read_bytes() for path in (calm.folder / part).iterdir()}
        assert first == second, f"{part}: {sorted(first)} against {sorted(second)}"
    steps = executed_steps(hunted)
    assert steps <= STEPS + kills * STATE_EVERY, f"{steps} steps executed with {kills} kills"
    print(f"{kills} kills, {steps} steps executed for {STEPS}, all files equal")
    return kills


def main() -> None:
    from runner.families.sd.tiny import write_tiny

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    write_tiny(folder / "model")
    kills = compare(folder, folder / "model", PLACES)
    assert kills >= 20, f"only {kills} of the places were reached"


if __name__ == "__main__":
    main()
