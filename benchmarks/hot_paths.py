"""What is done once, or beside something else, against doing it each time or in turns; both take turns.

python -m benchmarks.hot_paths [--only NAME …] [--rounds 3] [--json FILE]

clips       a file is decoded once for all its windows                           against once for each
digests     an encoding's digest is checked once in a process                    against at each read
autoencoder of previews stays loaded                                             against loading it for each
writing     of encodings, with their digests, beside what encodes the next ones  against between them
copying     on a GPU: a batch is pinned and copied while the one before it computes  against before its own step

"Work" is this process's time on the CPU, which other work on the machine changes little.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.measure import report
from runner.core.events import Events
from runner.core.task import Batch
from runner.data.items import read_item, write_item
from runner.data.videos import read_clip, read_clips
from runner.dataset.buckets import Fit
from runner.dataset.clips import Clip
from runner.dataset.probe import probe_video
from runner.families.parts.classes import AUTOENCODER_KL
from runner.families.parts.files import CONFIGS, read_json
from runner.families.parts.modules import make_module
from runner.stages.cache import store_encodings
from runner.stages.context import Context
from runner.store.store import Store
from runner.weights.tensors import read_tensors, write_tensors
from tests.support import draw_clip

Way = Callable[[], object]


def clips(folder: Path) -> tuple[str, Way, Way]:
    """600 frames of 256 x 192 in windows of 25."""
    file = draw_clip(folder / "clip.mp4", 600, (256, 192))
    digest, view = probe_video(file).digest, Fit((128, 96), (128, 96), (256, 192)).centre
    wanted = [(Clip(start, 25, None, 24.0), view) for start in range(0, 600, 25)]

    def each() -> None:
        for clip, _ in wanted:
            read_clip(str(file), digest, clip, view)

    def once() -> None:
        for _ in read_clips(str(file), digest, wanted):
            pass

    frames = sum(clip.start + clip.length for clip, _ in wanted)
    return f"clips of one file: {frames:,} frames decoded, or 600", each, once


def digests(folder: Path) -> tuple[str, Way, Way]:
    """The second epoch over video latents of 16 x 9 x 80 x 80 in fp32."""
    store = Store(folder / "store")
    keys = [f"{index:064x}" for index in range(24)]
    for key in keys:
        write_item(store, "latents", key, {"latents": torch.randn(16, 9, 80, 80)})
        read_item(store, "latents", key)

    def epoch(anew: bool) -> Way:
        return lambda: [read_item(store, "latents", key, anew) for key in keys]

    return "an epoch over 24 encodings of 3.7 MB", epoch(True), epoch(False)


def autoencoder(folder: Path) -> tuple[str, Way, Way]:
    """Stable Diffusion's, full size, read from fp16 into fp32: what each preview waits for besides its pictures."""
    config = read_json(CONFIGS / "sd15" / "vae" / "config.json")
    torch.manual_seed(0)
    module = make_module(AUTOENCODER_KL, config)
    file = folder / "vae.safetensors"
    write_tensors(file, {name: tensor.half() for name, tensor in module.state_dict().items()}, {})
    keys = {key: key for key in module.state_dict()}
    latents = torch.randn(1, 4, 1, 1)

    def loaded() -> Any:
        with torch.device("meta"):
            fresh = make_module(AUTOENCODER_KL, config)
        fresh.load_state_dict(read_tensors(file, keys, torch.float32, mapped=True), assign=True)
        return fresh.eval()

    kept = loaded()

    @torch.no_grad()
    def decode(vae: Any) -> object:
        return vae.decode(latents).sample

    return "the autoencoder and 8 x 8 pixels", lambda: decode(loaded()), lambda: decode(kept)


def writing(folder: Path) -> tuple[str, Way, Way]:
    """24 encodings of 3.7 MB; an encoder that computes on one thread for as long as it takes to write one."""
    store, rounds = Store(folder / "store"), iter(range(1000))
    weights = torch.randn(700, 700)
    nothing: Any = None
    context = Context(
        family=nothing, store=store, runtime=nothing, numerics=nothing, device=torch.device("cpu"), events=Events(None)
    )

    def encodings() -> Iterator[tuple[str, dict[str, Tensor]]]:
        mark = next(rounds)
        for index in range(24):
            for _ in range(4):
                weights @ weights
            yield f"{mark:032x}{index:032x}", {"latents": torch.randn(16, 9, 80, 80)}

    def in_turns() -> None:
        for key, encoding in encodings():
            write_item(store, "latents", key, encoding)

    return "24 encodings made and written", in_turns, lambda: store_encodings(context, "latents", 24, encodings())


def copying(folder: Path) -> tuple[str, Way, Way]:
    """20 steps on a GPU with 64 MB of latents each."""
    device = torch.device("cuda")
    weights = torch.randn(4096, 4096, device=device)
    stream = torch.cuda.Stream(device)

    def batch() -> Batch:
        return Batch(step=0, names=("x",), share=1.0, tensors={"latents": torch.ones(16, 1024, 1024)})

    def step(own: Batch) -> None:
        own.to(device)
        for _ in range(8):
            weights @ weights

    def before() -> None:
        for own in [batch() for _ in range(20)]:
            step(own.pinned())
        torch.cuda.synchronize()

    def ahead() -> None:
        batches = [batch().pinned() for _ in range(20)]
        for own, following in zip(batches, [*batches[1:], None], strict=True):
            if following is not None:
                following.copy_ahead(stream)
            step(own)
        torch.cuda.synchronize()

    return "20 steps with 64 MB each", before, ahead


PATHS = {"clips": clips, "digests": digests, "autoencoder": autoencoder, "writing": writing, "copying": copying}


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(PATHS)))
@click.option("--rounds", default=3)
@click.option("--json", "out", type=click.Path(path_type=Path))
def main(only: tuple[str, ...], rounds: int, out: Path | None) -> None:
    rows: list[dict[str, Any]] = []
    for name, make in PATHS.items():
        if (only and name not in only) or (name == "copying" and not torch.cuda.is_available()):
            continue
        folder = Path(tempfile.mkdtemp(prefix="runner-hot-"))
        try:
            what, before, after = make(folder)
            taken: dict[Way, list[tuple[float, float]]] = {before: [], after: []}
            for _ in range(rounds):
                for way, seconds in taken.items():
                    began, worked = time.perf_counter(), time.process_time()
                    way()
                    seconds.append((time.perf_counter() - began, time.process_time() - worked))
            (old, old_work), (new, new_work) = (tuple(map(median, zip(*taken[way], strict=True))) for way in taken)
            rows.append(
                {
                    "what": what,
                    "each time, s": old,
                    "once or beside, s": new,
                    "ratio": new / old,
                    "work each time, s": old_work,
                    "work once, s": new_work,
                    "ratio of work": new_work / old_work,
                }
            )
        finally:
            shutil.rmtree(folder)
    report(f"What is done once or beside (load of the machine {os.getloadavg()[0]:.1f})", rows, out)


if __name__ == "__main__":
    main()
