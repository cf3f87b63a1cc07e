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
    """A digest of what diffusers' and transformers' own classes come to in two steps of training, without code of ours."""
    import torch

    digests = []
    with torch.random.fork_rng(devices=[]):
        for module, inputs in _probed():
            optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
            for _ in range(2):
                loss = module(**inputs)[0].square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                digests.append(loss.detach().view(1))
            digests += [parameter.detach() for parameter in module.parameters()]
    return _digest(digests)


def _probed() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Small modules whose operations are those of the runs, with inputs."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(7)
    text, t = torch.randn(2, 7, 16), torch.tensor([3, 500])
    yield (
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            layers_per_block=1,
            attention_head_dim=8,
        ),
        {"sample": torch.randn(2, 4, 8, 8), "timestep": t, "encoder_hidden_states": text, "return_dict": False},
    )
    yield (
        SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": t,
            "encoder_hidden_states": text,
            "pooled_projections": text[:, 0],
            "return_dict": False,
        },
    )
    yield (
        AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        {"sample": torch.rand(2, 3, 16, 16), "return_dict": False},
    )
    yield (
        AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 32, 32), layers_per_block=1),
        {"sample": torch.rand(1, 3, 5, 16, 16), "return_dict": False},
    )
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=9,
    )
    yield CLIPTextModel(config), {"input_ids": torch.arange(18).view(2, 9)}


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
    rows = [
        {key: value for key, value in row.items() if isinstance(value, (int, float)) or key == "weights"}
        for row in record["candidates"]
    ]
    chosen = [record["chosen"]["step"], record["chosen"]["weights"]]
    return hashlib.sha256(json.dumps([chosen, rows], sort_keys=True).encode()).hexdigest()


def main(arguments: list[str]) -> int:
    """Prints what is found as JSON (--print), writes it (--record), or says what differs."""
    prepare_environment()
    import torch

    torch.set_num_threads(1)
    recorded = read_recorded()
    with tempfile.TemporaryDirectory() as folder:
        content = {"probe": probe(), "runs": found(Path(folder), "--few" in arguments)}
    if "--print" in arguments:
        print(json.dumps(content))
        return 0
    if "--record" in arguments:
        recorded[content["probe"]] = content["runs"]
        RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    if content["probe"] not in recorded:
        print("this kind of processor computes other bits than those that were recorded")
        return 1
    differing = differences(recorded[content["probe"]], content["runs"])
    print("\n".join(differing) or "all equal")
    return int(bool(differing))


def read_recorded() -> dict[str, Any]:
    """Probe → run → what it came to; a probe for each kind of processor that they were recorded on."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the runs that were made is not as recorded, by run and name."""
    pairs = {(run, name) for side in (recorded, now) for run in now for name in side.get(run, {})}
    differing = [
        pair for pair in sorted(pairs) if recorded.get(pair[0], {}).get(pair[1]) != now.get(pair[0], {}).get(pair[1])
    ]
    return [f"{run}: {name}" for run, name in differing]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
