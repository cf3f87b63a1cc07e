"""Makes the micro-batches of each step ahead of it, in threads; what is in them depends on keys alone, not on threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from runner.core.task import Batch
from runner.data.images import PictureRequest
from runner.data.items import Encodings, stacked
from runner.dataset.buckets import View
from runner.dataset.encodings import TrainItem, caption_of_use, is_dropped, view_of_use
from runner.dataset.order import Use, epoch_batches, steps_per_epoch
from runner.diffusion.timesteps import SHIFT_POINTS, ShiftPoints, draw_discrete, draw_timestep
from runner.inputs.train import TrainInputs
from runner.rng import generator, normal
from runner.seeding import rng
from schemas.training import MultiresNoise

TOKEN_AREA = 4
"""Latent positions of one token (patches of 2 x 2), for a shift by resolution."""


def multires_noise(noise: Tensor, settings: MultiresNoise, seed: int, *index: int) -> Tensor:
    """Noise [C, h, w] with ever coarser noise added, scaled to a standard deviation of one: sd-scripts'
    `pyramid_noise_like`, each item with draws of its own."""
    if noise.dim() == 4:  # one layer of a video's frames after the other
        frames = [multires_noise(frame, settings, seed, *index, place) for place, frame in enumerate(noise.unbind(1))]
        return torch.stack(frames, dim=1)
    height, width = noise.shape[1:]
    total = noise.clone()
    for level in range(settings.iterations):
        ratio = (rng(seed, "multires_noise.ratio", *index, level).random() * 2 + 2) ** level
        rows, columns = max(1, int(height / ratio)), max(1, int(width / ratio))
        source = generator(seed, "multires_noise", *index, level)
        coarse = torch.randn(1, noise.shape[0], rows, columns, generator=source)
        wide = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
        total += wide * settings.discount**level
        if rows == 1 or columns == 1:
            break
    return total / total.std()


def batch_latents(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{"latents": [B, C, …]}, and {"mask": [B, 1, …]} where any of them has one; the others count whole. fp32. What else
    the rows hold is stacked as it is: conditioning, as "cond.<name>"."""
    found = {"latents": stacked([{"latents": row["latents"]} for row in rows])["latents"].float()}
    if any("mask" in row for row in rows):
        wide = next(row["mask"].shape for row in rows if "mask" in row)
        masks = [row["mask"].float() if "mask" in row else torch.ones(wide) for row in rows]
        found["mask"] = stacked([{"mask": mask} for mask in masks])["mask"]
    others = [name for name in rows[0] if name.startswith("cond.")]
    return found | (stacked([{name: row[name] for name in others} for row in rows]) if others else {})


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """One micro-batch to make: step, place in the step, epoch, the uses, and its share of the step's items."""

    step: int
    place: int
    epoch: int
    uses: tuple[Use, ...]
    share: float


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where encodings come from; None: pixels or texts are handed on and encoded by the task.

    `latent_shape` gives the shape of what is trained of an item: [C, h, w], of a video [C, T, h, w].
    """

    latents: Encodings | None
    latent_key: Callable[[str, View], str]
    latent_shape: Callable[[TrainItem], tuple[int, ...]]
    texts: Encodings | None
    text_key: Callable[[str], str]
    learned: Callable[[TrainItem, View, Mapping[str, Tensor]], dict[str, Tensor]]
    """What is trained of an item from its encoding, and what its denoiser is told: {"latents", "mask", "cond.<name>"}."""
    discrete: bool = True
    """Whether timesteps are whole numbers."""
    shift_points: ShiftPoints = SHIFT_POINTS
    """Of the shift by size."""


class StepLoader:
    """The micro-batches of a run, from any step on. `rank` of `world` takes every world-th item of each batch.

    For a GPU its threads put them into pinned memory, and begin the copy of a step's batches while the step before it
    computes.
    """

    def __init__(
        self,
        inputs: TrainInputs,
        sources: Sources,
        workers: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.inputs, self.sources, self.workers = inputs, sources, workers
        self.rank, self.world = rank, world
        self.stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    def steps_from(self, step: int) -> Iterator[list[Batch]]:
        """Endless: one list of micro-batches a step."""
        specs = self._specs(step)
        if self.workers == 0:
            for group in specs:
                yield [self._make(spec) for spec in group]
            return
        with ThreadPoolExecutor(max_workers=self.workers, thread_name_prefix="batches") as pool:
            ahead: deque[list[Future[Batch]]] = deque()
            copying: Future[None] | None = None
            for group in specs:
                ahead.append([pool.submit(self._make, spec) for spec in group])
                if len(ahead) > self.workers + 1:
                    batches = [future.result() for future in ahead.popleft()]
                    if self.stream is not None:
                        if copying is not None:
                            copying.result()
                        copying = pool.submit(self._copy_ahead, ahead[0])
                    yield batches

    def _copy_ahead(self, batches: list[Future[Batch]]) -> None:
        """Waits for nothing that comes after it in the pool: these batches were asked for before."""
        assert self.stream is not None
        for batch in batches:
            batch.result().copy_ahead(self.stream)

    def names_at(self, step: int) -> list[str]:
        """The items of one step (0-based), for messages."""
        group = next(self._specs(step))
        return sorted({self.inputs.items[use.item].name for spec in group for use in spec.uses})

    def _specs(self, step: int) -> Iterator[list[_Spec]]:
        accumulation = self.inputs.accumulation
        per_epoch = steps_per_epoch(
            len(epoch_batches(self.inputs.groups, self.inputs.seed, 0, self.inputs.cycle)), accumulation
        )
        epoch = step // per_epoch
        while True:
            batches = epoch_batches(self.inputs.groups, self.inputs.seed, epoch, self.inputs.cycle)
            for index in range(step - epoch * per_epoch, per_epoch):
                chosen = batches[index * accumulation : (index + 1) * accumulation]
                total = sum(len(batch) for batch in chosen)
                yield [
                    _Spec(
                        step=epoch * per_epoch + index, place=place, epoch=epoch, uses=batch, share=len(batch) / total
                    )
                    for place, batch in enumerate(chosen)
                ]
            epoch += 1
            step = epoch * per_epoch

    def _make(self, spec: _Spec) -> Batch:
        inputs, seed = self.inputs, self.inputs.seed
        positions = range(self.rank, len(spec.uses), self.world)
        views: list[tuple[TrainItem, View]] = []
        texts: list[str] = []
        for position in positions:
            use = spec.uses[position]
            item = inputs.items[use.item]
            number = use.occurrence if item.settings.regularization else spec.epoch * item.repeats + use.occurrence
            views.append((item, view_of_use(item, seed, number, inputs.latents_cached)))
            dropped = is_dropped(item, seed, number, spec.epoch)
            texts.append(
                "" if dropped else caption_of_use(item, seed, number, inputs.texts_cached, spec.step, inputs.steps)
            )
        tensors, clips = self._pictures(views)
        shape = self.sources.latent_shape(views[0][0])
        tensors["timesteps"] = self._timesteps(shape, spec, positions)
        tensors["weights"] = torch.tensor([self._weight(item) for item, _ in views])
        if self.sources.texts is not None:
            rows = [self.sources.texts.get(self.sources.text_key(text)) for text in texts]
            tensors |= {f"cond.{name}": tensor for name, tensor in stacked(rows).items()}
        tensors |= self._noise(shape, spec, positions)
        requests = tuple(PictureRequest.of(item, view) for item, view in views)
        names = tuple(item.name for item, _ in views)
        batch = Batch(
            step=spec.step,
            names=names,
            share=spec.share,
            tensors=tensors,
            texts=tuple(texts),
            requests=requests,
            items=tuple(item for item, _ in views),
            clips=clips,
            timesteps=tuple(tensors["timesteps"].tolist()),
        )
        return batch.pinned() if self.stream is not None else batch

    def _pictures(self, views: list[tuple[TrainItem, View]]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Encodings, or pixels: as one tensor, or clips of several lengths."""
        if self.sources.latents is not None:
            rows = [self.sources.latents.get(self.sources.latent_key(item.picture, view)) for item, view in views]
            return batch_latents([self.sources.learned(*use, row) for use, row in zip(views, rows, strict=True)]), ()
        pixels = [PictureRequest.of(item, view).pixels() for item, view in views]
        if len({tuple(tensor.shape) for tensor in pixels}) > 1:
            return {}, tuple(pixels)
        return {"pixels": torch.stack(pixels)}, ()

    def _timesteps(self, shape: tuple[int, ...], spec: _Spec, positions: range) -> Tensor:
        """[B]: whole numbers for a discrete process, else fp32."""
        draw: Callable[..., float] = draw_discrete if self.sources.discrete else draw_timestep
        tokens = prod(shape[1:]) // TOKEN_AREA
        return torch.tensor(
            [
                draw(
                    self.inputs.timesteps,
                    rng(self.inputs.seed, "timestep", spec.step, spec.place, position),
                    tokens,
                    self.sources.shift_points,
                )
                for position in positions
            ]
        )

    def _noise(self, shape: tuple[int, ...], spec: _Spec, positions: range) -> dict[str, Tensor]:
        """{"noise": [B, C, h, w]}, and "input_noise" where the denoiser's input gets other noise than its target.

        Keyed by place in the step, so that neither ranks nor batches of other steps change it.
        """
        seed, loss = self.inputs.seed, self.inputs.loss

        def drawn(purpose: str, size: tuple[int, ...]) -> Tensor:
            return torch.stack([normal(size, seed, purpose, spec.step, spec.place, position) for position in positions])

        noise = drawn("noise", shape)
        if loss.noise_offset > 0:
            noise = noise + loss.noise_offset * drawn("noise_offset", (shape[0], *[1] * (len(shape) - 1)))
        if loss.multires_noise is not None:
            noise = torch.stack(
                [
                    multires_noise(row, loss.multires_noise, seed, spec.step, spec.place, position)
                    for row, position in zip(noise, positions, strict=True)
                ]
            )
        if loss.input_perturbation > 0:
            return {"noise": noise, "input_noise": noise + loss.input_perturbation * drawn("input_noise", shape)}
        return {"noise": noise}

    def _weight(self, item: TrainItem) -> float:
        prior = self.inputs.loss.prior_loss_weight if item.settings.regularization else 1.0
        return item.settings.weight * prior
