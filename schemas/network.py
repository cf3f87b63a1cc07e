"""[network]: the adapter that is trained. Without this section the named components train whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.base import FilePath, Name, Section, key

Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(gt=0, le=1_000_000)]
Pattern = Name
Share = Annotated[float, Field(ge=0, lt=1)]


class Network(Section):
    """The adapter that is trained. Leave the section out for a full fine-tune."""

    type: Literal["lora", "dora", "loha", "lokr", "oft"] = key("lora", effect="trajectory", stage="train")
    """Kind of adapter. lora: low-rank pairs beside linear layers (arXiv 2106.09685), and beside convolutions with conv_rank. dora: with a trained magnitude (2402.09353). loha: Hadamard products of two pairs (2108.06098). lokr: Kronecker products (2212.10650). oft: block-wise rotations of the input (2306.07280); rank is the blocks' size."""

    rank: Rank = key(16, effect="trajectory", stage="train")
    """Inner width of the adapter (Kohya: network_dim). Larger learns more and makes larger files."""

    alpha: Alpha | None = key(None, effect="trajectory", stage="train")
    """The adapter's output is scaled by alpha / rank (Kohya: network_alpha). Unset: equal to rank, a scale of 1."""

    rslora: bool = key(False, effect="trajectory", stage="train")
    """Scales by alpha / sqrt(rank) instead (arXiv 2312.03732), so that a high rank learns as fast as a low one."""

    dropout: Share = key(0.0, effect="trajectory", stage="train")
    """Share of the adapter's inputs set to zero at each step (lora, dora)."""

    rank_dropout: Share = key(0.0, effect="trajectory", stage="train")
    """Share of the ranks left out at each step (lora; loha and lokr: of the rows of the weight)."""

    module_dropout: Share = key(0.0, effect="trajectory", stage="train")
    """Share of the layers whose adapter is left out at each step (lora, loha, lokr)."""

    conv_rank: Rank | None = key(None, effect="trajectory", stage="train")
    """Adapters also on the residual blocks' 3x3 convolutions, of this rank (Kohya: conv_dim, LoCon). Unset: none."""

    conv_alpha: Alpha | None = key(None, effect="trajectory", stage="train")
    """alpha of the convolutions' adapters. Unset: equal to conv_rank."""

    targets: Name | Annotated[list[Pattern], Field(max_length=1000)] = key(
        "default", effect="trajectory", stage="train"
    )
    """Which layers of the denoiser get adapters: a preset ("default": Kohya's set; "attention": q, k, v and out only) or a list of regular expressions searched in the layers' diffusers names. One that names text_projection adds that layer of the text encoders that train and have it."""

    rank_pattern: Annotated[dict[Pattern, Rank], Field(max_length=1000)] = key(
        default_factory=dict, effect="trajectory", stage="train"
    )
    """Another rank for layers whose name matches a regular expression: { "attn2" = 4 }."""

    alpha_pattern: Annotated[dict[Pattern, Alpha], Field(max_length=1000)] = key(
        default_factory=dict, effect="trajectory", stage="train"
    )
    """Another alpha for layers whose name matches a regular expression."""

    decompose_factor: int = key(-1, effect="trajectory", stage="train", ge=-1, le=1_000_000)
    """lokr: size of the Kronecker product's first factor; -1 finds the one nearest to a square."""

    lora_plus_ratio: Annotated[float, Field(ge=1, le=1_000_000)] = key(1.0, effect="trajectory", stage="train")
    """LoRA+ (arXiv 2402.12354): factor on the learning rate of the half that starts at zero; 16 is common, 1 is off."""

    scale_weight_norms: Annotated[float, Field(gt=0, le=1_000_000)] | None = key(
        None, effect="trajectory", stage="train"
    )
    """Max-norm regularization as in Kohya's tools: after each step an adapter whose product has a larger norm is scaled down to it (lora). 1 is common. Unset: off."""

    base_weights: Annotated[list[FilePath], Field(max_length=100)] = key(default_factory=list, effect="none")
    """Adapter files that are merged into the model before training, each "FILE" or "FILE:MULTIPLIER": LoRA, DoRA, LoHa, LoKr, OFT or differences of weights, of any tool. The plan checks every layer's name and shape. Their content decides whether a run is the same; the trained adapter is made for the merged model."""

    init_from: FilePath | None = key(None, effect="none")
    """An adapter file of any tool and of the network's type to start from; every one of its layers must fit, and its content decides whether a run is the same."""
