"""The torch-free half of a family: what planning needs to know of it and of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runner.dataset.clips import ClipRule
from runner.dataset.parts import Found, Piece
from runner.diffusion.timesteps import SHIFT_POINTS, ShiftPoints
from runner.files import parsing
from runner.model.model import Model, ModelProblem
from runner.model.targets import Target
from schemas import RunConfig
from schemas.base import Section

if TYPE_CHECKING:
    from runner.families.identify import FileNames, Kind
    from runner.families.prompts import PromptPart, Readying


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a family says where run.toml says nothing."""

    dtype: str
    num_inference_steps: int
    cfg_scale: float
    sampler: str
    dialect: str
    prediction_type: str | None = None
    """What the denoiser predicts, where its family decides it."""
    clip_skip: int = 1
    max_token_length: int = 75
    timestep_sampling: str = "uniform"
    timestep_shift: float | str = 1.0
    resolution: tuple[int, int] | None = None
    """Of the dataset, where it is not the model's own size."""
    sample_size: int | None = None
    """Side of samples, where it is not the model's own size."""
    embedded_guidance: float | None = None
    """The guidance that a distilled denoiser is told while sampling; None: it is told none."""
    fps: float = 0.0
    """Frames a second of the videos that it is trained on and makes; 0: stills."""


@dataclass(frozen=True, kw_only=True)
class MemoryQuestion:
    """What predicted memory depends on."""

    model: Model
    trains: Mapping[str, bool]
    """Component → whether it trains whole (True) or carries an adapter (False); frozen ones are absent."""
    trainable: int
    frozen_bytes: int
    """Bytes of one frozen weight."""
    vae_bytes: int
    """Bytes of one weight of the autoencoder."""
    compute_bytes: int
    """Bytes of one activation."""
    optimizer_bytes: float
    """Bytes of optimizer state for one trained number."""
    ema: bool
    batch: int
    size: tuple[int, int]
    checkpointing: bool
    eager_attention: bool
    latent_batch: int
    text_batch: int
    text_tokens: int
    encodes_latents: bool
    encodes_text: bool
    sample_size: tuple[int, int] | None
    samples_in_training: bool
    latents_cached: bool = True
    text_cached: bool = True
    targets: Mapping[str, int] = field(default_factory=dict)
    """`component.layer` → rank, of each layer with an adapter."""
    device: Literal["cpu", "cuda"] = "cpu"
    quantization: str = "none"
    text_encoder_quantization: str = "none"
    whole_bytes: int = 4
    """Bytes of one weight that trains whole."""
    blocks_to_swap: int = 0
    fused_backward: bool = False
    activation_offload: bool = False
    optimizer_offload: bool = False
    vae_tile: int | None = None
    vae_chunk: int | None = None
    sample_tile: int | None = None
    """Tiles and strips in which samples are decoded."""
    sample_chunk: int | None = None
    frames: int = 1
    """Latent frames that are trained of an item."""
    clip_frames: int = 1
    """Frames that are encoded at once."""
    sample_frames: int = 1
    """Latent frames of a sample that are made at once."""
    decoded_frames: int = 1
    """Frames that are decoded at once."""

    @property
    def whole(self) -> bool:
        """Whether components train whole, not through adapters."""
        return any(self.trains.values())


@dataclass(frozen=True)
class MemoryAnswer:
    """Predicted peak bytes of each phase, above what the libraries themselves take."""

    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=0)

    @property
    def highest(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name], default="train")


@dataclass(frozen=True)
class SwapRule:
    """What blocks_to_swap means for one denoiser; of several, the others wait on the host while one computes."""

    most: int
    blocks: Callable[[int], int]
    """blocks_to_swap → blocks that wait on the host."""


class SourceSays(NamedTuple):
    """What a family is asked of a source before its files are looked at."""

    kind: str
    controls: bool
    """It has control images."""
    own: Mapping[str, Any]
    """What it says by keys that only some families have."""


class SourceFinding(NamedTuple):
    """What does not go together in a source: the key, what is wrong with it, and a hint."""

    key: str
    message: str
    hint: str | None = None


STILLS_REFUSED = {
    "model.split_attention": "its text has one length",
    "caching.vae_chunk_size": "its autoencoder has no convolutions over time",
    "sampling.vae_chunk_size": "its autoencoder has no convolutions over time",
    "training.embedded_guidance": "its denoiser is told no guidance",
    "training.raw_embedded_guidance": "its denoiser is told no guidance",
}
"""Keys that families of stills cannot use."""
FLOW_REFUSED = dict.fromkeys(
    (
        "training.loss.min_snr_gamma",
        "training.loss.debiased_estimation",
        "training.loss.zero_terminal_snr",
        "training.loss.scale_v_pred_loss_like_noise_pred",
        "training.loss.v_pred_like_loss",
    ),
    "it belongs to the noise schedule of Stable Diffusion 1.5 and XL; this is flow matching",
)
"""Keys that families of flow matching cannot use."""
TRANSFORMER_REFUSED = dict.fromkeys(
    ("network.conv_rank", "network.conv_alpha"), "the transformer has no residual convolutions"
)
"""Keys that families whose denoiser is a transformer cannot use."""


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A family's torch-free bundle."""

    name: str
    title: str
    architecture: str
    """Its name in Stability's modelspec."""
    base_version: str
    """Its name in Kohya's ss_base_model_version."""
    defaults: Defaults
    inspect: Callable[[RunConfig, Path], Model]
    """(configuration, folder of run.toml) → model. Raises `ModelProblem` for files that do not fit."""
    targets: Callable[[RunConfig, Model], list[Target]]
    layers: Callable[[Model], list[Target]]
    """Every layer that an adapter of a file may be for; rank and alpha say nothing."""
    memory: Callable[[MemoryQuestion], MemoryAnswer]
    blocks: Callable[[Model, str], tuple[str, ...]]
    """(model, one of its denoisers) → its repeated blocks in the order of the forward pass."""
    implementation: str
    """Where its half with torch is: "module:FAMILY"."""
    samplers: tuple[str, ...]
    token_lengths: tuple[int, ...]
    """What max_token_length may be."""
    other_names: tuple[str, ...] = ()
    """What other tools call it, in small letters."""
    names_hint: str = ""
    """What else is to be said where one of them was given."""
    pipelines: tuple[str, ...] = ()
    """What model_index.json calls its pipelines."""
    recognise: Callable[[FileNames], Kind | None] | None = None
    """What a file is, where it is the family's own or one that could be taken for it."""
    first_recipe: str = ""
    """The recipe to start from, where a run needs more files than one."""
    checks: Callable[[RunConfig], Iterator[tuple[tuple[str, ...], str, str]]] | None = None
    """(key, what does not do what it seems to, hint), for warnings."""
    controls: str = ""
    """Which runs of it take control images, for hints."""
    prompt_parts: tuple[type[Section], ...] = ()
    """The parts of the schema of prompts that it uses beside the common keys."""
    model_parts: tuple[type[Section], ...] = ()
    """The parts of the schema of [model] that it uses beside the common keys."""
    source_parts: tuple[type[Section], ...] = ()
    """The parts of the schema of sources that it uses beside the common keys."""
    ready: Callable[[Readying, int, Any], tuple[int, PromptPart | None]] | None = None
    """(readying, number, keys of a prompt and of [sampling]) → frames, and what the prompt says to the family alone.
    Raises `PromptProblem`."""
    derived: Callable[[Model], Mapping[str, Any]] | None = None
    """Dotted keys of its own → their values, where run.toml says nothing."""
    clips: Callable[[Model], ClipRule] | None = None
    """How it reads videos; None: it makes stills."""
    items: Callable[[Model, Found], Sequence[Piece]] | None = None
    """What it trains of a picture or a clip, and what that says to the family alone; None: the whole of it, and nothing.
    Raises `ItemProblem`."""
    sources: Callable[[Model, SourceSays], Iterator[SourceFinding]] | None = None
    """What does not go together in a source; None: nothing beside keys of other families."""
    tiles: tuple[int, ...] = (512, 256)
    """Sides in pixels of the autoencoder's tiles that are worth proposing, large ones first."""
    swap: Callable[[Model, bool], SwapRule] | None = None
    """(model, whether it trains) → what blocks_to_swap means; None: so many blocks, of which one stays."""

    variants: tuple[str, ...] = ()
    """What model.variant may be."""
    of_variant: Callable[[Model], Mapping[str, Any]] | None = None
    """What of this is otherwise for a variant: field → value."""
    shift_points: ShiftPoints = SHIFT_POINTS
    """Of the shift by size."""
    remarks: Callable[[RunConfig, Model], list[str]] | None = None
    """What the plan should say of training this model."""

    def of(self, model: Model) -> FamilySpec:
        """The same as it is for this model."""
        return self if self.of_variant is None else replace(self, **self.of_variant(model))

    def read(self, config: RunConfig, folder: Path) -> Model:
        """`inspect`, where what a folder's own configurations say is of any kind. Raises `ModelProblem`."""

        def problem(why: str) -> ModelProblem:
            what = f"its configuration is not one of {self.title} ({why})"
            return ModelProblem(("model", "checkpoint"), f"{config.model.checkpoint}: {what}")

        with parsing(problem):
            return self.inspect(config, folder)

    def swap_rule(self, model: Model, trains: bool) -> SwapRule:
        """How many blocks wait on the host for a value of blocks_to_swap, and the largest one."""
        if self.swap is not None:
            return self.swap(model, trains)
        return SwapRule(self.count_blocks(model)[1] - 1, lambda wanted: wanted)

    def count_blocks(self, model: Model) -> tuple[int, int]:
        """(blocks of all denoisers, blocks of the one that has most)."""
        counts = [len(self.blocks(model, name)) for name in model.denoising]
        return sum(counts), max(counts)

    network_modules: Mapping[str, str] = field(default_factory=lambda: {"lora": "networks.lora"})
    """Kind of adapter → the module of its family's trainer that makes such files (ss_network_module); others are LyCORIS'."""
    version: int = 1
    """Grows where the family's denoiser is told something else than before, so that no earlier work is taken for it."""
    text_limit: Callable[[Model, int], tuple[str, int]] | None = None
    """(model, max_token_length) → (the text encoder whose tokens count, how many of a caption it takes)."""
    whole_captions: bool = False
    """Captions are whole texts, as musubi-tuner reads them; else first lines, as Kohya's tools."""
    refused_keys: Mapping[str, str] = field(default_factory=dict)
    """Dotted key → why this family cannot use it."""
