"""[training]: length, optimizer, schedule, loss, memory, checkpoints, logging."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.base import MOST_STEPS, Name, Section, Steps, key

LearningRate = Annotated[float, Field(gt=0, le=1000)]


class Components(Section):
    """Which parts train: true, false, or a learning rate of their own. With [network] they get adapters, without it they train whole."""

    denoiser: bool | LearningRate = key(True, effect="trajectory", stage="train")
    """The U-Net, or the transformer; all of them where the model has several."""

    text_encoder_1: bool | LearningRate = key(False, effect="trajectory", stage=("cache.text", "train"))
    """The first text encoder, CLIP-L. While a text encoder trains, captions cannot be cached."""

    text_encoder_2: bool | LearningRate = key(False, effect="trajectory", stage=("cache.text", "train"))
    """The second text encoder (sdxl, sd3: OpenCLIP-G)."""

    text_encoder_3: bool | LearningRate = key(False, effect="trajectory", stage=("cache.text", "train"))
    """The third text encoder (sd3: T5-XXL)."""

    def of(self, component: str) -> bool | float:
        """What it says of a component of a model: all denoisers have one switch, an autoencoder has none."""
        found: bool | float = getattr(self, "denoiser" if component.startswith("denoiser") else component, False)
        return found

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders that train."""
        names = ("text_encoder_1", "text_encoder_2", "text_encoder_3")
        return tuple(name for name in names if getattr(self, name))

    @property
    def rates(self) -> dict[str, bool | float]:
        """Component → true or its learning rate, of those that train."""
        trained = {name: getattr(self, name) for name in ("denoiser", *self.text_encoders)}
        return {name: value for name, value in trained.items() if value}


class Optimizer(Section):
    """The optimizer and its settings."""

    type: Name = key("adamw", effect="trajectory", stage="train", min_length=1)
    """adamw (PyTorch's, fused), adamw8bit, paged_adamw8bit, lion, lion8bit (bitsandbytes), adafactor, prodigy, schedule_free_adamw, muon (hidden matrices; AdamW for the rest), or the full name of an installed class: package.module.Class."""

    weight_decay: Annotated[float, Field(ge=0, le=1_000_000)] | None = key(None, effect="trajectory", stage="train")
    """Decoupled weight decay. Unset: by optimizer (adamw, lion: 0.01; muon: 0.1; adafactor, prodigy: 0)."""

    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = key(
        None, effect="trajectory", stage="train"
    )
    """Decay of the first and second moments. Unset: by optimizer (0.9 and 0.999; lion: 0.9 and 0.99)."""

    eps: Annotated[float, Field(gt=0, le=1_000_000)] | None = key(None, effect="trajectory", stage="train")
    """Keeps the division finite. Unset: by optimizer (1e-8)."""

    stochastic_rounding: bool = key(False, effect="trajectory", stage="train")
    """Without [network]: holds the weights that train in bf16 and rounds each update up or down by chance, so that small ones are not lost. Half the memory of fp32 weights, with any optimizer."""

    args: dict[str, Any] = key(default_factory=dict, effect="trajectory", stage="train", max_length=100)
    """More arguments of the optimizer's class, checked against its signature."""


class Scheduler(Section):
    """The learning rate over the steps."""

    type: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex", "warmup_stable_decay", "piecewise"
    ] = key("constant", effect="trajectory", stage="train")
    """Shape of the learning rate after the warm-up. "constant" and "piecewise" have no horizon: such a run can be extended."""

    warmup_steps: int | None = key(None, effect="trajectory", stage="train", ge=0, le=MOST_STEPS)
    """The learning rate rises from 0 over so many steps."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = key(None, effect="trajectory", stage="train")
    """The same as a share of all steps."""

    args: dict[str, int | float | list[int | float]] = key(
        default_factory=dict, effect="trajectory", stage="train", max_length=100
    )
    """Arguments of the schedule: num_cycles (cosine_with_restarts, cosine), power and lr_end (polynomial), decay_ratio and min_lr_ratio (warmup_stable_decay), boundaries and factors (piecewise: steps, and the factor before, between and after them)."""


class MultiresNoise(Section):
    """Noise of several resolutions (pyramid noise), as in Kohya's tools."""

    iterations: int = key(6, effect="trajectory", stage="train", ge=1, le=16)
    """Coarser layers of noise; they end where one is a single number wide."""

    discount: Annotated[float, Field(gt=0, lt=1)] = key(0.3, effect="trajectory", stage="train")
    """Each coarser layer weighs so much of the one before; 0.1 to 0.4 is common."""


class Loss(Section):
    """What is minimised."""

    type: Literal["mse", "l1", "huber", "smooth_l1"] = key("mse", effect="trajectory", stage="train")
    """Distance of prediction and target. huber is the pseudo-Huber loss, smooth_l1 its other scaling, both as in Kohya's tools."""

    huber_c: Annotated[float, Field(gt=0, le=1_000_000)] = key(0.1, effect="trajectory", stage="train")
    """Where huber and smooth_l1 turn from quadratic to linear."""

    huber_schedule: Literal["constant", "exponential", "snr"] = key("snr", effect="trajectory", stage="train")
    """How huber_c depends on the timestep."""

    min_snr_gamma: Annotated[float, Field(gt=0, le=1_000_000)] | None = key(None, effect="trajectory", stage="train")
    """Min-SNR weighting (arXiv 2303.09556); 5 is common. Unset: off."""

    debiased_estimation: bool = key(False, effect="trajectory", stage="train")
    """Weights the loss by 1 / sqrt(SNR) (arXiv 2310.08442)."""

    scale_v_pred_loss_like_noise_pred: bool = key(False, effect="trajectory", stage="train")
    """With v_prediction: scales the loss by SNR / (SNR + 1), which weights the timesteps as epsilon prediction does."""

    v_pred_like_loss: Annotated[float, Field(ge=0, le=1_000_000)] = key(0.0, effect="trajectory", stage="train")
    """With epsilon prediction: adds so much of the loss weighted as v_prediction weights it."""

    noise_offset: Annotated[float, Field(ge=0, le=1)] = key(0.0, effect="trajectory", stage="train")
    """Adds a constant of this standard deviation to each channel's noise; helps very dark and bright pictures."""

    multires_noise: MultiresNoise | None = key(None, effect="none")
    """Adds coarser noise to the noise; the section's presence turns it on."""

    input_perturbation: Annotated[float, Field(ge=0, le=1)] = key(0.0, effect="trajectory", stage="train")
    """Adds so much more noise to the denoiser's input only (arXiv 2301.11706)."""

    zero_terminal_snr: bool | None = key(None, effect="trajectory", stage=("train", "sample"))
    """Rescales the betas so that the last step is pure noise (arXiv 2305.08891); for v_prediction. Unset: as the checkpoint says (a single file's key `ztsnr`, a folder's rescale_betas_zero_snr), else false."""

    masked: bool | None = key(None, effect="trajectory", stage="train")
    """Weights the loss by the masks of sources with mask_path or alpha_mask. Unset: where there are any."""

    prior_loss_weight: Annotated[float, Field(ge=0, le=1_000_000)] = key(1.0, effect="trajectory", stage="train")
    """Factor on the loss of regularization items."""


class Timesteps(Section):
    """Which noise levels are trained."""

    sampling: Literal["uniform", "logit_normal", "sigmoid", "shift", "mode", "cosmap", "beta"] | None = key(
        None, effect="trajectory", stage="train"
    )
    """Density of the noise levels. logit_normal, mode, cosmap: the SD3 paper's. sigmoid and shift: sigmoid of a normal number, as in Kohya's tools and musubi-tuner. Unset: by family (uniform; sd3, flux1, chroma: logit_normal)."""

    shift: Annotated[float, Field(gt=0, le=100)] | Literal["resolution"] | None = key(
        None, effect="trajectory", stage="train"
    )
    """Moves the drawn level s towards noise: shift * s / (1 + (shift - 1) * s). "resolution": more for larger pictures, as diffusers' pipelines do. Unset: by family (1; sd3: 3; flux1: "resolution", of schnell 1)."""

    mean: float = key(0.0, effect="trajectory", stage="train", ge=-10, le=10)
    """Mean of logit_normal; above 0 trains more noise."""

    std: Annotated[float, Field(gt=0, le=10)] = key(1.0, effect="trajectory", stage="train")
    """Standard deviation of logit_normal."""

    sigmoid_scale: Annotated[float, Field(gt=0, le=10)] = key(1.0, effect="trajectory", stage="train")
    """Factor on the normal number of sigmoid and shift."""

    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = key(1.29, effect="trajectory", stage="train")
    """How strongly mode prefers the middle."""

    beta_alpha: Annotated[float, Field(gt=0, le=100)] = key(2.0, effect="trajectory", stage="train")
    """First parameter of beta; larger trains more noise."""

    beta_beta: Annotated[float, Field(gt=0, le=100)] = key(2.0, effect="trajectory", stage="train")
    """Second parameter of beta; larger trains less noise."""

    weighting: Literal["none", "sigma_sqrt", "cosmap"] = key("none", effect="trajectory", stage="train")
    """Weight of the loss by noise level (sd3, flux1, chroma; the loss target is noise minus data). sigma_sqrt: 1 / sigma². cosmap: 2 / (pi (1 - 2 sigma + 2 sigma²))."""

    min: int = key(0, effect="trajectory", stage="train", ge=0, le=999)
    """Lowest timestep, included."""

    max: int = key(1000, effect="trajectory", stage="train", ge=1, le=1000)
    """Highest timestep, excluded."""


class Memory(Section):
    """More model on less machine."""

    gradient_checkpointing: bool = key(False, effect="bits", stage="train")
    """Recomputes activations in the backward pass: much less memory, about a third slower."""

    fused_backward: bool = key(False, effect="bits", stage="train")
    """Takes each tensor's optimizer step as soon as its gradient is there and frees it: no gradients are held. Without [network]; needs max_grad_norm = 0 or clip_grad = "per_tensor", and gradient_accumulation_steps = 1."""

    blocks_to_swap: int = key(0, effect="bits", stage="train", ge=0, le=10_000)
    """So many of the denoiser's blocks wait in the host's memory and come to the device when they are needed: much less memory, slower. Of a model with several denoisers, those that do not compute wait there too. For adapters; on a CPU it saves nothing."""

    activation_offload: bool = key(False, effect="bits", stage="train")
    """Keeps what the backward pass needs in the host's memory meanwhile. With gradient_checkpointing only the blocks' inputs move."""

    optimizer_offload: bool = key(False, effect="bits", stage="train")
    """Keeps the optimizer's states in the host's memory and brings each tensor's to the device for its step."""


class Ema(Section):
    """A running average of the trained weights. Its checkpoints are candidates for selection beside the plain ones."""

    decay: Annotated[float, Field(gt=0, lt=1)] = key(0.999, effect="trajectory", stage="train")
    """Share of the old average that is kept at each update; smaller in the first steps."""

    update_every: Steps = key(1, effect="trajectory", stage="train")
    """Steps between updates."""


class Checkpoints(Section):
    """When weights and states are saved. Changes hold for steps trained from then on."""

    every_n_steps: Steps | None = key(None, effect="none", stage=("sample", "select"))
    """A checkpoint each n steps, and one at the end. Unset, and every_n_epochs too: ten over the run."""

    every_n_epochs: Steps | None = key(None, effect="none", stage=("sample", "select"))
    """A checkpoint each n epochs, and one at the end."""

    keep: Steps | None = key(None, effect="none", stage=("sample", "select"))
    """Keeps the newest n, and the best so far by stable loss. Unset: all."""

    state_every_n_steps: Steps | None = key(None, effect="none")
    """Saves what a resume needs each n steps: a kill costs at most so many. Unset: with each checkpoint."""

    dtype: Literal["bf16", "fp16", "fp32"] = key("fp16", effect="none", stage="publish")
    """Precision of exported and published files; checkpoints inside a run keep that of training."""


class Logging(Section):
    """What is written while training."""

    every_n_steps: Steps = key(10, effect="none")
    """Steps between lines of the log; only then the device is waited for."""

    tensorboard: bool = key(True, effect="none")
    """Also writes TensorBoard files to logs/tensorboard."""


class Training(Section):
    """Length, precision and everything about the steps. One of max_train_steps and max_train_epochs is needed."""

    max_train_steps: Steps | None = key(None, effect="trajectory", stage="train")
    """Optimizer steps in all. Under a schedule without a horizon, a larger number extends a finished run."""

    max_train_epochs: Steps | None = key(None, effect="trajectory", stage="train")
    """Passes over the dataset, repeats included."""

    learning_rate: LearningRate = key(1e-4, effect="trajectory", stage="train")
    """Highest learning rate. Adapters: 1e-4 is common; full fine-tunes: 1e-6 to 1e-5."""

    gradient_accumulation_steps: int = key(1, effect="trajectory", stage="train", ge=1, le=100_000)
    """Batches in an optimizer step; the rest at the end of an epoch makes a smaller step."""

    max_grad_norm: Annotated[float, Field(ge=0, le=1_000_000)] = key(1.0, effect="trajectory", stage="train")
    """Gradients are scaled down to this norm; 0 is off."""

    clip_grad: Literal["global", "per_tensor"] = key("global", effect="trajectory", stage="train")
    """What max_grad_norm is the norm of: all gradients together, or each tensor's own (the only one that fused_backward can know)."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = key(None, effect="trajectory", stage="train")
    """Precision of the computation. Unset: from model.dtype ("no" for fp32)."""

    embedded_guidance: Annotated[float, Field(ge=0, le=100)] = key(1.0, effect="trajectory", stage="train")
    """Guidance that the distilled denoiser is told while it trains (flux1, hunyuan_video, framepack); 1 is common."""

    raw_embedded_guidance: bool = key(False, effect="trajectory", stage="train")
    """Tells it the number itself, as musubi-tuner does for HunyuanVideo; false: 1000 times the number, which is its unit while sampling."""

    compile: bool = key(False, effect="bits", stage="train")
    """Compiles each of the denoiser's blocks with torch.compile, once for each size of bucket: slower first steps, faster ones after."""

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
