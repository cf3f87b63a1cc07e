"""What a matrix of small runs comes to, as sha256: a change of the code's structure gives the same ones.

    python -m tests.digests [--few]     compares with tests/data/digests.json
    python -m tests.digests --record    writes them: only for a change of results that the log gives a reason for

Each run is applied in this process, to the end or after a stop. Digests are of the numbers, not of the files around them:
of each checkpoint's tensors, of each sample's pixels, of the candidates' losses and the chosen step. Arithmetic differs
between kinds of processors, so the probe, a few operations without any code of ours, tells whether figures can be compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the same kernels on as many processors as can be
    os.environ.update(
        MKL_CBWR="COMPATIBLE", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", OMP_NUM_THREADS="1"
    )

from runner.core.process import prepare_environment
from tests.support import DATA, Place, draw_clips, draw_pictures, family_changes, merged, new_place

RECORD = DATA / "digests.json"
_CLIPS = {"path": "clips", "kind": "video"}
_BASE: dict[str, Any] = {
    "run": {"device": "cpu"},
    "network": {"rank": 2},
    "training": {"max_train_steps": 4, "checkpoints": {"every_n_steps": 2, "state_every_n_steps": 1}},
    "selection": {"publish": []},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {"dataset": {"flip_aug": True, "shuffle_caption": True}},
    "sdxl": {"training": {"components": {"text_encoder_2": True}}, "network": {"conv_rank": 2}},
    "sd3": {"dataset": {"caption_dropout_rate": 0.2}},
    "hunyuan_video": {
        "dataset": {"sources": [{**_CLIPS, "target_frames": [1, 5], "frame_extraction": "chunk"}, {"path": "pics"}]},
        "sampling": {"prompts": [{"prompt": "a thing", "frames": 5}]},
    },
    "framepack": {},
    "framepack_i2v": {
        "model": {"variant": "i2v"},
        "dataset": {"held_out": {"count": 1}, "sources": [{**_CLIPS, "frame_extraction": "full"}]},
        "sampling": {"prompts": [{"prompt": "a thing", "image": "pics/0.png", "sections": 2, "control_images": None}]},
    },
}
"""What makes each family's run show more of it."""
_ACCUMULATED = {"training": {"gradient_accumulation_steps": 2, "ema": {"decay": 0.5}}}
_SWAPPED = {"training": {"memory": {"blocks_to_swap": 1, "gradient_checkpointing": True}}}
_WHOLE = {"network": None, "training": {"components": {"text_encoder_2": None}}}
_UNCACHED = {"caching": {"latents": "off", "text": "off"}}
METHODS: dict[str, tuple[dict[str, Any], int | None]] = {
    "lora cached": (_ACCUMULATED, 1),
    "lora uncached": (merged(_SWAPPED, _UNCACHED), None),
    "full cached": (merged(_WHOLE, {"training": {"memory": {"gradient_checkpointing": True}}}), None),
    "full uncached": (merged(merged(_WHOLE, _ACCUMULATED), _UNCACHED), 2),
}
"""Method → changes, and the step after which it is stopped and resumed."""


FEW = ("sd15 lora cached", "sd3 full uncached")
"""Every setting of the methods but block swap."""


def found(folder: Path, few: bool) -> dict[str, dict[str, str]]:
    """Run → what it came to."""
    every = {f"{name} {method}": (name, method) for name in FAMILIES for method in METHODS}
    return {run: _run(folder / run, *every[run]) for run in (FEW if few else every)}


def probe() -> str:
    """A digest of a few operations as models make them."""
    import torch
    from torch.nn import functional as F

    draw = torch.Generator().manual_seed(7)
    x, w = torch.randn(2, 8, 33, 17, generator=draw), torch.randn(16, 8, 3, 3, generator=draw)
    y = F.silu(F.group_norm(F.conv2d(x, w, padding=1), 4)).flatten(2).transpose(1, 2)
    z = F.scaled_dot_product_attention(y, y.sin(), y.exp()) @ torch.randn(16, 40, generator=draw)
    return _digest([F.gelu(F.layer_norm(z, (40,))).softmax(-1).float(), (z.bfloat16() @ z.bfloat16().mT).float()])


def _run(folder: Path, name: str, method: str) -> dict[str, str]:
    from runner.errors import Stopped
    from runner.families.registry import family
    from tests.inprocess import applied, prepared

    kind = name.removesuffix("_i2v")
    model = folder.parent / "models" / kind
    if not model.exists():
        family(kind).tiny(model)
    place = new_place(folder, model, 5)
    draw_clips(folder / "clips", [9, 13])
    draw_pictures(folder / "controls", 5, seed=8)
    changes, stop_at = METHODS[method]
    place.base = merged(merged(family_changes(kind), _BASE), FAMILIES[name])
    place.write(changes)
    if stop_at is not None:
        try:
            applied(place.file, stop_at=stop_at)
        except Stopped:
            pass
        else:
            raise AssertionError(f"{name} {method} was not stopped")
    outcome = applied(place.file)
    run = prepared(place.file)
    folder = run.store.artifact("train", outcome.graph.fingerprint("train")) / "checkpoints"
    weights = {f"{file.parent.name}/{file.stem}": _weights(file) for file in sorted(folder.rglob("*.safetensors"))}
    samples = {f"samples/{file.name}": _pictures(file) for file in sorted((place.output / "samples").iterdir())}
    return {**weights, **samples, "selection": _selection(place, outcome.selection)}


def _weights(file: Path) -> str:
    from safetensors.torch import load_file

    tensors = load_file(file)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(_digest([tensors[name]]).encode())
    return digest.hexdigest()


def _digest(tensors: list[Any]) -> str:
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pictures(file: Path) -> str:
    """Of a picture's or a video's pixels."""
    digest = hashlib.sha256()
    for frame in _frames(file):
        digest.update(f"{frame.size} {frame.mode}".encode() + frame.tobytes())
    return digest.hexdigest()


def _frames(file: Path) -> Iterator[Any]:
    from PIL import Image

    if file.suffix == ".png":
        with Image.open(file) as picture:
            yield picture.copy()
    elif file.suffix == ".mp4":
        import av

        with av.open(str(file)) as container:
            yield from (frame.to_image() for frame in container.decode(video=0))


def _selection(place: Place, record: dict[str, Any]) -> str:
    """Of the chosen step and of each candidate's figures."""
    rows = [{key: value for key, value in row.items() if isinstance(value, (int, float)) or key == "weights"} for row in record["candidates"]]  # fmt: skip
    chosen = [record["chosen"]["step"], record["chosen"]["weights"]]
    return hashlib.sha256(json.dumps([chosen, rows], sort_keys=True).encode()).hexdigest()


def main(arguments: list[str]) -> int:
    """Prints what is found as JSON (--print), writes it (--record), or says what differs."""
    prepare_environment()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        content = {"probe": probe(), "runs": found(Path(folder), "--few" in arguments)}
    if "--print" in arguments:
        print(json.dumps(content))
        return 0
    if "--record" in arguments:
        RECORD.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    differing = differences(recorded, content)
    print("\n".join(differing) or "all equal")
    return int(bool(differing))


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the runs that were made is not as recorded, by run and name."""
    pairs = {(run, name) for side in (recorded, now) for run in now["runs"] for name in side["runs"].get(run, {})}
    differing = [pair for pair in sorted(pairs) if recorded["runs"].get(pair[0], {}).get(pair[1]) != now["runs"].get(pair[0], {}).get(pair[1])]  # fmt: skip
    return [
        *(f"{run}: {name}" for run, name in differing),
        *(["the probe"] if recorded["probe"] != now["probe"] else []),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
