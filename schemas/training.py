"""[training]: length, optimizer, schedule, loss, memory, checkpoints, logging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.base import Section, key

LearningRate = Annotated[float, Field(gt=0, le=1000)]


class Components(Section):
    """Which parts train: true, false, or a learning rate of their own. With [network] they get adapters, without it they train whole."""

    denoiser: bool | LearningRate = key(True, effect="trajectory", stage="train")
    """The U-Net."""

    text_encoder_1: bool | LearningRate = key(False, effect="trajectory", stage=("cache.text", "train"))
    """The CLIP text encoder. While it trains, captions cannot be cached."""


class Optimizer(Section):
    """The optimizer and its settings."""

    type: Literal["adamw", "adamw8bit"] = key("adamw", effect="trajectory", stage="train")
    """adamw: PyTorch's fused AdamW. adamw8bit: bitsandbytes' AdamW with states of 8 bits."""

    weight_decay: Annotated[float, Field(ge=0)] = key(0.01, effect="trajectory", stage="train")
    """Decoupled weight decay."""

    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = key(
        default_factory=lambda: [0.9, 0.999], effect="trajectory", stage="train"
    )
    """Decay of the first and second moments."""

    eps: Annotated[float, Field(gt=0)] = key(1e-8, effect="trajectory", stage="train")
    """Keeps the division finite."""

    args: dict[str, Any] = key(default_factory=dict, effect="trajectory", stage="train")
    """More arguments of the optimizer's class, checked against its signature."""


class Scheduler(Section):
    """The learning rate over the steps."""

    type: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = key(
        "constant", effect="trajectory", stage="train"
    )
    """Shape of the learning rate after the warm-up. "constant" has no horizon: such a run can be extended."""

    warmup_steps: int | None = key(None, effect="trajectory", stage="train", ge=0)
    """The learning rate rises from 0 over so many steps."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = key(None, effect="trajectory", stage="train")
    """The same as a share of all steps."""

    args: dict[str, int | float] = key(default_factory=dict, effect="trajectory", stage="train")
    """Arguments of the schedule: num_cycles (cosine_with_restarts, cosine), power and lr_end (polynomial)."""


class Loss(Section):
    """What is minimised."""

    type: Literal["mse", "l1", "huber", "smooth_l1"] = key("mse", effect="trajectory", stage="train")
    """Distance of prediction and target. huber is the pseudo-Huber loss, smooth_l1 its other scaling, both as in Kohya's tools."""

    huber_c: Annotated[float, Field(gt=0)] = key(0.1, effect="trajectory", stage="train")
    """Where huber and smooth_l1 turn from quadratic to linear."""

    huber_schedule: Literal["constant", "exponential", "snr"] = key("snr", effect="trajectory", stage="train")
    """How huber_c depends on the timestep."""

    min_snr_gamma: Annotated[float, Field(gt=0)] | None = key(None, effect="trajectory", stage="train")
    """Min-SNR weighting (arXiv 2303.09556); 5 is common. Unset: off."""

    debiased_estimation: bool = key(False, effect="trajectory", stage="train")
    """Weights the loss by 1 / sqrt(SNR) (arXiv 2310.08442)."""

    noise_offset: Annotated[float, Field(ge=0, le=1)] = key(0.0, effect="trajectory", stage="train")
    """Adds a constant of this standard deviation to each channel's noise; helps very dark and bright pictures."""

    input_perturbation: Annotated[float, Field(ge=0, le=1)] = key(0.0, effect="trajectory", stage="train")
    """Adds so much more noise to the denoiser's input only (arXiv 2301.11706)."""

    zero_terminal_snr: bool = key(False, effect="trajectory", stage=("train", "sample"))
    """Rescales the betas so that the last step is pure noise (arXiv 2305.08891); for v_prediction."""

    prior_loss_weight: Annotated[float, Field(ge=0)] = key(1.0, effect="trajectory", stage="train")
    """Factor on the loss of regularization items."""


class Timesteps(Section):
    """Which noise levels are trained."""

    min: int = key(0, effect="trajectory", stage="train", ge=0, le=999)
    """Lowest timestep, included."""

    max: int = key(1000, effect="trajectory", stage="train", ge=1, le=1000)
    """Highest timestep, excluded."""


class Memory(Section):
    """More model on less machine."""

    gradient_checkpointing: bool = key(False, effect="bits", stage="train")
    """Recomputes activations in the backward pass: much less memory, about a third slower."""


class Ema(Section):
    """A running average of the trained weights. Its checkpoints are candidates for selection beside the plain ones."""

    decay: Annotated[float, Field(gt=0, lt=1)] = key(0.999, effect="trajectory", stage="train")
    """Share of the old average that is kept at each update; smaller in the first steps."""

    update_every: int = key(1, effect="trajectory", stage="train", ge=1)
    """Steps between updates."""


class Checkpoints(Section):
    """When weights and states are saved. Changes hold for steps trained from then on."""

    every_n_steps: int | None = key(None, effect="none", stage=("sample", "select"), ge=1)
    """A checkpoint each n steps, and one at the end. Unset, and every_n_epochs too: ten over the run."""

    every_n_epochs: int | None = key(None, effect="none", stage=("sample", "select"), ge=1)
    """A checkpoint each n epochs, and one at the end."""

    keep: int | None = key(None, effect="none", stage=("sample", "select"), ge=1)
    """Keeps the newest n, and the best so far by stable loss. Unset: all."""

    state_every_n_steps: int | None = key(None, effect="none", ge=1)
    """Saves what a resume needs each n steps: a kill costs at most so many. Unset: with each checkpoint."""

    dtype: Literal["bf16", "fp16", "fp32"] = key("fp16", effect="none", stage="publish")
    """Precision of exported and published files; checkpoints inside a run keep that of training."""


class Logging(Section):
    """What is written while training."""

    every_n_steps: int = key(10, effect="none", ge=1)
    """Steps between lines of the log; only then the device is waited for."""

    tensorboard: bool = key(True, effect="none")
    """Also writes TensorBoard files to logs/tensorboard."""


class Training(Section):
    """Length, precision and everything about the steps. One of max_train_steps and max_train_epochs is needed."""

    max_train_steps: int | None = key(None, effect="trajectory", stage="train", ge=1)
    """Optimizer steps in all. Under a schedule without a horizon, a larger number extends a finished run."""

    max_train_epochs: int | None = key(None, effect="trajectory", stage="train", ge=1)
    """Passes over the dataset, repeats included."""

    learning_rate: LearningRate = key(1e-4, effect="trajectory", stage="train")
    """Highest learning rate. Adapters: 1e-4 is common; full fine-tunes: 1e-6 to 1e-5."""

    gradient_accumulation_steps: int = key(1, effect="trajectory", stage="train", ge=1)
    """Batches in an optimizer step; the rest at the end of an epoch makes a smaller step."""

    max_grad_norm: Annotated[float, Field(ge=0)] = key(1.0, effect="trajectory", stage="train")
    """Gradients are scaled down to this norm; 0 is off."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = key(None, effect="trajectory", stage="train")
    """Precision of the computation. Unset: from model.dtype ("no" for fp32)."""

    compile: bool = key(False, effect="bits", stage="train")
    """Compiles the denoiser with torch.compile: slower first steps, faster ones after."""

    components: Components = key(default_factory=Components, effect="none")
    """Which parts train."""

    optimizer: Optimizer = key(default_factory=Optimizer, effect="none")
    """The optimizer."""

    scheduler: Scheduler = key(default_factory=Scheduler, effect="none")
    """The learning rate over the steps."""

    loss: Loss = key(default_factory=Loss, effect="none")
    """What is minimised."""

    timesteps: Timesteps = key(default_factory=Timesteps, effect="none")
    """Which noise levels are trained."""

    memory: Memory = key(default_factory=Memory, effect="none")
    """More model on less machine."""

    ema: Ema | None = key(None, effect="none")
    """A running average of the weights; the section's presence turns it on."""

    checkpoints: Checkpoints = key(default_factory=Checkpoints, effect="none")
    """When weights and states are saved."""

    logging: Logging = key(default_factory=Logging, effect="none")
    """What is written while training."""
