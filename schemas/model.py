"""[model]: which model is trained and how its frozen parts are held."""

from __future__ import annotations

from typing import Literal

from schemas.base import FilePath, ModelStages, Name, Section, key
from schemas.families.framepack import SectionsModel
from schemas.families.variants import VariantModel


class CommonModel(Section):
    """Keys that every family has, or refuses itself."""

    family: Name = key(effect="trajectory", stage=ModelStages)
    """The kind of model: a family of this installation. Checked against the checkpoint's own keys before anything is loaded."""

    checkpoint: FilePath = key(effect="none")
    """A .safetensors or .ckpt file, a diffusers directory, a hub id that is in the local hub cache, or "builtin:micro". Its content, not its path, decides what is reused."""

    from_scratch: bool = key(False, effect="trajectory", stage="train")
    """true: keeps the architecture but draws new weights, from the seed, for every part that trains. Only for a full fine-tune."""

    vae: FilePath | None = key(None, effect="none")
    """Another autoencoder than the checkpoint's: a file or a diffusers directory. Its content decides what is encoded again."""

    text_encoder_1: FilePath | None = key(None, effect="none")
    """Another text encoder than the checkpoint's (CLIP-L): a file or a directory."""

    text_encoder_2: FilePath | None = key(None, effect="none")
    """The same for the second text encoder (sdxl, sd3: OpenCLIP-G; flux1: T5-XXL)."""

    text_encoder_3: FilePath | None = key(None, effect="none")
    """The same for the third text encoder (sd3: T5-XXL). Where neither the checkpoint nor this names one, sd3 does without it."""

    tokenizer_1: FilePath | None = key(None, effect="none")
    """A folder with another tokenizer. Unset: the checkpoint's own, else the built-in CLIP tokenizer. LLaMA's (hunyuan_video, framepack) must be named or lie beside its weights."""

    tokenizer_2: FilePath | None = key(None, effect="none")
    """The same for the second text encoder. T5's (flux1) is needed with single files."""

    tokenizer_3: FilePath | None = key(None, effect="none")
    """The folder of the third text encoder's tokenizer (T5's: tokenizer.json or spiece.model). Needed with a single file; a directory has its own."""

    revision: Name | None = key(None, effect="none")
    """Branch, tag or commit of a hub id in the local hub cache."""

    dtype: Literal["bf16", "fp16", "fp32"] | None = key(None, effect="trajectory", stage=ModelStages)
    """Precision of the frozen weights: encoders, and the denoiser under an adapter. Parts that train whole are kept in fp32. SDXL's and SD3's autoencoder is held in fp32 where this is fp16, which it would overflow. Unset: by family (bf16)."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = key(
        None, effect="trajectory", stage=("train", "sample")
    )
    """What the denoiser predicts (sd15, sdxl). Unset: as the checkpoint says (a folder's scheduler, a single file's key `v_pred` or its metadata), else epsilon. Most single files do not say: set it for a v-prediction model."""

    clip_skip: int | None = key(None, effect="trajectory", stage="cache.text", ge=1, le=12)
    """Use the text encoders' hidden states this many layers from the end (sd15, sdxl); 1 is the last layer, 2 is common for anime models. Unset: by family (sd15: 1, sdxl: 2)."""

    max_token_length: int | None = key(None, effect="trajectory", stage="cache.text", ge=1, le=100_000)
    """Tokens of a caption that are used. sd15, sdxl: 75, 150 or 225; the longer ones encode it in pieces of 75 and join them, as Kohya's tools do. sd3, flux1, chroma: T5's length, 77, 128, 154, 256 or 512. Unset: by family (75; sd3: 256; flux1, chroma: 512, schnell 256)."""

    quantization: Literal["none", "fp8", "fp8_scaled", "int8", "nf4"] = key("none", effect="trajectory", stage="train")
    """Holds the denoiser's frozen linear layers in fewer bits, for training an adapter: fp8 (e4m3), fp8_scaled (with a scale for each 64 weights), int8 (a scale for each row), nf4 (4 bits). Computed in the precision of training."""

    text_encoder_quantization: Literal["none", "fp8", "fp8_scaled", "int8", "nf4"] = key(
        "none", effect="trajectory", stage="cache.text"
    )
    """The same for the text encoders' linear layers. A T5-XXL takes 9.5 GB in bf16, 4.8 in fp8."""

    split_attention: bool = key(False, effect="bits", stage="train")
    """Computes attention for one item of a batch after the other (hunyuan_video, framepack): less memory where texts have different lengths."""

    attention: Literal["sdpa", "eager"] = key("sdpa", effect="bits", stage="train")
    """How attention is computed: PyTorch's fused kernel, or the plain formula (slower, more memory)."""


class Model(SectionsModel, VariantModel, CommonModel):
    """Which model is trained, where its parts lie, and how its frozen parts are held."""
