"""select: measures every candidate, judges, and writes selection.json."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from runner.atomic import new_folder, remove
from runner.data.images import PictureRequest, to_picture
from runner.dataset.encodings import TrainItem, still_view
from runner.errors import RunFailed, Stopped
from runner.inputs.cache import LatentEncoder, TextEncoder
from runner.inputs.sample import SampleInputs, candidates
from runner.inputs.select import SelectInputs
from runner.inputs.train import TrainInputs
from runner.pictures import read_picture
from runner.records import write_record
from runner.stages.checkpoints import Checkpoints
from runner.stages.context import Context
from runner.stages.job import Job
from runner.stages.judge import Candidate, judge
from runner.stages.modules import build_swapped
from runner.stages.score import Score, Scorer, read_score
from runner.store.artifacts import RECORD, read_selection

THUMBNAIL = 32


def run_select(
    context: Context,
    inputs: SelectInputs,
    train: TrainInputs,
    sample: SampleInputs,
    encoders: tuple[LatentEncoder, TextEncoder],
    checkpoints: Checkpoints,
    text_trains: bool,
    fingerprint: str,
) -> Path:
    """Returns the artifact's folder. Raises `RunFailed` where every candidate is vetoed or the chosen one is gone."""
    wanted = candidates(inputs.steps, inputs.ema, with_base=False)
    scores = _scores(context, inputs, train, encoders, checkpoints, text_trains, wanted) if inputs.metrics else {}
    similarity: dict[Candidate, float] = {}
    if inputs.veto.max_similarity is not None:
        similarity = _similarities(context, inputs, sample, train.items, wanted)
    record = judge(inputs, wanted, scores, similarity)
    if record["chosen"] is None:
        steps = ", ".join(str(step) for step in inputs.steps)
        named = inputs.pinned["step"] if inputs.pinned else inputs.step
        why = (
            record["reason"] if record["reason"] == "every checkpoint is vetoed" else f"there is no checkpoint {named}"
        )
        raise RunFailed(f"nothing can be selected: {why}", hint=f"checkpoints are at steps {steps}; see [selection]")
    place = context.store.artifact("select", fingerprint)
    if read_selection(context.store, fingerprint) is None:
        remove(place)
        with new_folder(place) as staged:
            write_record(staged / RECORD, record)
    return place


def run(job: Job, inputs: SelectInputs) -> None:
    """Chooses, where it is not done already."""
    context, node, train = job.context, job.graph.node(SelectInputs), job.graph.of(TrainInputs)
    if read_selection(context.store, node.fingerprint) is None:
        context.events.emit("started", total=len(candidates(inputs.steps, inputs.ema, True)))
        run_select(
            context,
            inputs,
            train,
            job.graph.of(SampleInputs),
            inputs.encoders,
            job.checkpoints(),
            bool(train.components.text_encoders),
            node.fingerprint,
        )


def _scores(
    context: Context,
    inputs: SelectInputs,
    train: TrainInputs,
    encoders: tuple[LatentEncoder, TextEncoder],
    checkpoints: Checkpoints,
    text_trains: bool,
    wanted: list[Candidate],
) -> dict[Candidate, Score]:
    """Of the base model and of each candidate; what was measured before is read from the store."""
    everything: list[Candidate] = [(0, "raw"), *wanted]
    found: dict[Candidate, Score] = {}
    context.store.index_existing("scores", [inputs.score_key(*which) for which in everything])
    for which in everything:
        score = read_score(context.store.item("scores", inputs.score_key(*which)))
        if score is not None:
            found[which] = score
    missing = [which for which in everything if which not in found]
    if not missing:
        return found
    scorer = Scorer.prepare(context, inputs, encoders, text_trains)
    trained = build_swapped(context, train)
    for done, (step, weights) in enumerate(missing, 1):
        if step > 0:
            trained.assign(checkpoints.load(step, weights))
        found[step, weights] = scorer.score(step, weights, trained.modules)
        context.events.emit("progress", done=done, total=len(missing))
        if context.stop.is_set():
            raise Stopped(f"stopped while measuring: {done} of {len(missing)} are kept", context.stop.code)
    return found


def _similarities(
    context: Context, inputs: SelectInputs, sample: SampleInputs, items: tuple[TrainItem, ...], wanted: list[Candidate]
) -> dict[Candidate, float]:
    """The highest similarity of each candidate's samples to any training picture: the cosine of centred thumbnails."""
    training = np.stack([_thumbnail_of_item(item) for item in items if not item.settings.regularization])
    found: dict[Candidate, float] = {}
    for step, weights in wanted:
        rows = []
        for prompt in sample.prompts:
            file = context.store.item("samples", sample.key(prompt, step, weights))
            if file.is_file():
                with read_picture(file) as picture:
                    rows.append(_thumbnail(picture))
        if rows:
            found[step, weights] = float((np.stack(rows) @ training.T).max())
    return found


def _thumbnail_of_item(item: TrainItem) -> np.ndarray:
    pixels = PictureRequest.of(item, still_view(item)).pixels()
    return _thumbnail(to_picture(pixels if item.clip is None else pixels[:, 0]))


def _thumbnail(picture: Image.Image) -> np.ndarray:
    """A centred unit vector of a 32 x 32 RGB thumbnail."""
    small = picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32).reshape(-1)
    centred = values - values.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-6)
