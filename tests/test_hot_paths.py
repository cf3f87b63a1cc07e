"""What is done once: decoding a file, checking a digest, loading the autoencoder; and what is done beside something else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from runner.core.events import Events
from runner.core.task import Batch
from runner.data import items, videos
from runner.data.images import PictureRequest
from runner.data.items import DamagedItem, StoredEncodings, read_item, write_item
from runner.dataset.buckets import Fit
from runner.dataset.clips import Clip
from runner.dataset.probe import probe_video
from runner.errors import RunFailed
from runner.execute.apply import Apply
from runner.families.registry import family
from runner.inputs.cache import LatentsInputs
from runner.inputs.sample import SampleInputs
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.plan import current
from runner.plan.diff import make_plan
from runner.plan.keys import training_views
from runner.stages.cache import store_encodings
from runner.stages.context import Context
from runner.stages.encode import LatentEncoding
from runner.stages.encodings import Latents
from runner.stages.stop import StopFlag
from runner.store.run_folder import write_pin
from runner.store.store import Store
from tests.inprocess import applied, prepared
from tests.support import Place, draw_clip, draw_clips

CENTRE = Fit((32, 32), (43, 32), (64, 48), True).centre
CPU = torch.device("cpu")
Make = Callable[..., Place]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A path for each frame that is decoded."""
    seen: list[str] = []
    frames = videos._frames

    def counted(path: str, digest: str) -> Iterator[Any]:
        for frame in frames(path, digest):
            seen.append(path)
            yield frame

    monkeypatch.setattr(videos, "_frames", counted)
    return seen


def test_a_file_is_decoded_once_for_all_its_clips(tmp_path: Path, decoded: list[str]) -> None:
    """Whatever their places, lengths, rates and views: each is what reading it alone gives."""
    path = draw_clip(tmp_path / "c.mp4", 60, fps=50)
    digest = probe_video(path).digest
    wanted = [(Clip(start, 5, None, 24.0), CENTRE) for start in range(0, 60, 5)]
    wanted += [(Clip(start, 13, None, 24.0), CENTRE.mirrored) for start in (40, 3, 7)]
    wanted += [(Clip(2, 5, 50.0, 24.0), CENTRE), (Clip(0, 1, None, 24.0), CENTRE), (Clip(0, 5, None, 24.0), CENTRE)]
    found = dict(videos.read_clips(str(path), digest, wanted))
    assert len(decoded) == 60
    assert found.keys() == set(range(len(wanted)))
    for place, (clip, view) in enumerate(wanted):
        assert torch.equal(found[place], videos.read_clip(str(path), digest, clip, view)), clip


def test_clips_come_when_they_end(tmp_path: Path, decoded: list[str]) -> None:
    path = draw_clip(tmp_path / "c.mp4", 30)
    digest = probe_video(path).digest
    wanted = [(Clip(20, 5, None, 24.0), CENTRE), (Clip(0, 9, None, 24.0), CENTRE), (Clip(0, 5, None, 24.0), CENTRE)]
    order = []
    for place, _ in videos.read_clips(str(path), digest, wanted):
        order.append((place, len(decoded)))
    assert order == [(2, 5), (1, 9), (0, 25)]


def test_a_file_that_became_too_short(tmp_path: Path) -> None:
    path = draw_clip(tmp_path / "c.mp4", 12)
    digest = probe_video(path).digest
    wanted = [(Clip(0, 5, None, 24.0), CENTRE), (Clip(8, 5, None, 24.0), CENTRE)]
    with pytest.raises(RunFailed) as caught:
        list(videos.read_clips(str(path), digest, wanted))
    assert str(caught.value) == f"{path} has only 4 of the 5 frames of its clip"


def test_the_cache_stage_decodes_each_file_once(family_place: Make, decoded: list[str]) -> None:
    """Also where batches mix files, and files have clips of several lengths. Each encoding is that of its clip alone."""
    place = family_place("hunyuan_video")
    draw_clips(place.folder / "windows", [37, 22])
    sources = [{"path": "windows", "kind": "video", "target_frames": [5, 9], "frame_extraction": "chunk"}]
    changes = {"dataset": {"sources": sources, "held_out": None}, "caching": {"latent_batch_size": 2}}
    graph = applied(place.write(changes), until="cache.latents").graph
    train, encoder = graph.of(TrainInputs), graph.of(LatentsInputs).encoder
    assert sorted(Path(path).stem for path in decoded) == ["0"] * 36 + ["1"] * 20, "the last 1 and 2 are in no clip"
    assert len(train.items) == 7 + 4 + 4 + 2
    store = Store(place.folder / ".runner")
    context = Context(
        family=family("hunyuan_video"),
        store=store,
        runtime=graph.runtime,
        numerics=train.numerics,
        device=CPU,
        events=Events(None),
    )
    encoding, latents = LatentEncoding(context, encoder), Latents(context, encoder)
    for item, view in training_views(train.items, train.seed):
        request = PictureRequest.of(item, view)
        alone = encoding.encode([request], [request.pixels()], 2)[0]
        assert torch.equal(read_item(store, "latents", latents.key(item.picture, view))["latents"], alone["latents"])


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each digest that is computed of an item."""
    seen: list[int] = []
    digest = items.tensors_digest

    def counted(tensors: Any) -> str:
        seen.append(len(tensors))
        return digest(tensors)

    monkeypatch.setattr(items, "tensors_digest", counted)
    return seen


KEY = "ab" * 32


def stored(folder: Path) -> Store:
    store = Store(folder)
    write_item(store, "latents", KEY, {"latents": torch.arange(6.0).reshape(1, 2, 3)})
    return store


def test_an_item_is_checked_once_in_a_process(
    tmp_path: Path, digests: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "MEMORY_BUDGET", 0)
    store = stored(tmp_path)
    digests.clear()
    for _ in range(3):
        read = StoredEncodings(store, "latents").get(KEY)
        assert torch.equal(read["latents"], torch.arange(6.0).reshape(1, 2, 3))
    assert len(digests) == 1
    read_item(store, "latents", KEY, anew=True)
    assert len(digests) == 2
    StoredEncodings(Store(tmp_path), "latents").get(KEY)
    assert len(digests) == 3, "another process has another store"


def test_an_item_is_checked_again_where_its_file_is_another(tmp_path: Path) -> None:
    store = stored(tmp_path)
    read_item(store, "latents", KEY)
    file = store.item("latents", KEY)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedItem):
        read_item(store, "latents", KEY)
    with pytest.raises(DamagedItem):
        read_item(Store(tmp_path), "latents", KEY)


def test_items_are_written_beside_the_encoder(tmp_path: Path) -> None:
    """The second encoding is not ready before the first is on the disk: written in turns, neither would ever end."""
    store = Store(tmp_path)

    def encodings() -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield KEY, {"latents": torch.zeros(3)}
        for _ in range(200):
            if store.item("latents", KEY).exists():
                break
            time.sleep(0.05)
        else:
            pytest.fail("the first item was not written while the second was encoded")
        yield "cd" * 32, {"latents": torch.zeros(3)}

    nothing: Any = None
    context = Context(family=nothing, store=store, runtime=nothing, numerics=nothing, device=CPU, events=Events(None))
    assert store_encodings(context, "latents", 2, encodings()) == 2
    assert store.index.item_keys("latents") == {KEY, "cd" * 32}


def test_the_autoencoder_is_loaded_once_where_there_is_room(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are the same either way."""
    loads: list[str] = []
    load = Context.load

    def counted(self: Context, component: str, **options: Any) -> Any:
        loads.append(component)
        return load(self, component, **options)

    monkeypatch.setattr(Context, "load", counted)
    changes = {
        "training": {"max_train_steps": 4, "checkpoints": {"every_n_steps": 2}},
        "sampling": {"every_n_steps": 1, "at_first": True, "prompts": [{"prompt": "a red star", "seed": 1}]},
    }
    place.write(changes)
    applied(place.file, until="train")
    roomy, before = loads.count("vae"), sorted((place.folder / ".runner" / "items" / "samples").rglob("*.png"))
    contents = {file.name: file.read_bytes() for file in before}
    assert len(contents) == 5
    shutil.rmtree(place.folder / ".runner")
    loads.clear()
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=0))
    applied(place.file, until="train")
    assert (roomy, loads.count("vae")) == (2, 6), "the cache stage loads it too"
    again = (place.folder / ".runner" / "items" / "samples").rglob("*.png")
    assert {file.name: file.read_bytes() for file in again} == contents


def test_on_a_cpu_a_batch_stays_as_it_is() -> None:
    tensors = {"latents": torch.zeros(2), "cond.mask": torch.ones(2)}
    batch = Batch(step=0, names=("x",), share=1.0, tensors=dict(tensors))
    moved = batch.to(CPU)
    assert all(moved.tensors[name] is tensor for name, tensor in tensors.items())
    assert moved.copied is None


def test_the_graph_is_made_once_in_an_apply(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the plan, for the apply, and after the training; with other prompts, or another choice, it is another."""
    made: list[Any] = []
    compiled = current.compile_graph

    def counted(*given: Any) -> Any:
        made.append(given[1:])
        return compiled(*given)

    monkeypatch.setattr(current, "compile_graph", counted)
    place.write({"sampling": {"prompts": [{"prompt": "a red star", "seed": 1}]}})
    run = prepared(place.file)
    make_plan(run)
    Apply(run, Events(None), StopFlag(), None, "").run()
    assert len(made) == 1
    run.prompts = [replace(prompt, seed=2) for prompt in run.prompts]
    assert current.current_graph(run).of(SampleInputs).prompts[0].seed == 2
    write_pin(run.output_dir, 2, "raw", current.current_graph(run).node(TrainInputs).fingerprint)
    pinned = current.current_graph(run).of(SelectInputs).pinned
    assert pinned is not None and pinned["step"] == 2
    assert len(made) == 3
