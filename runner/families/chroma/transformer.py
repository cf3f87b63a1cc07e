"""The forward pass of Chroma's transformer on diffusers' modules.

diffusers' own forward looks at masked text again in the single-stream blocks where it recomputes activations, and its
pipeline's mask is added to the scores as a number. Here text that no sample of a batch sees is cut off, and what is masked
of the rest is looked at by nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ChromaTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from runner.families.chroma.architecture import modulations
from runner.families.parts.attention import Attention, TextFirst


class ChromaTransformer(ChromaTransformer2DModel):
    """Chroma's transformer for batches of any text lengths; a new one needs `use` and `fill`."""

    def forward(self, tokens: Tensor, where: Tensor, text: Tensor, mask: Tensor, timestep: Tensor) -> Tensor:
        """tokens [B, N, C] at positions [N, 3], text [B, L, D] with what is seen of it [B, L] (bool, on the host), timestep
        [B] (0..1000) → the velocity [B, N, C]."""
        length = max(1, int(mask.sum(1).max()))
        text, mask = text[:, :length], mask[:, :length]
        told: dict[str, Any] = {}
        if not bool(mask.all()):
            seen = torch.cat([mask, mask.new_ones(mask.shape[0], tokens.shape[1])], dim=1)
            told = {"seen": seen.to(tokens.device, non_blocking=True)}
        rope = self.pos_embed(torch.cat([where.new_zeros(length, 3), where]))
        picture, text = self.x_embedder(tokens), self.context_embedder(text)
        made = self.distilled_guidance_layer(self._told(timestep, picture.dtype))
        call: Callable[..., Any] = lambda block, *given: block(*given)  # noqa: E731
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            call = self._gradient_checkpointing_func
        doubles, singles = len(self.transformer_blocks), len(self.single_transformer_blocks)
        for index, block in enumerate(self.transformer_blocks):
            first = 3 * singles + 6 * index
            own = torch.cat([made[:, first : first + 6], made[:, first + 6 * doubles : first + 6 * doubles + 6]], dim=1)
            text, picture = call(block, picture, text, own, rope, None, told)
        joined = torch.cat([text, picture], dim=1)
        for index, block in enumerate(self.single_transformer_blocks):
            joined = call(block, joined, made[:, 3 * index : 3 * index + 3], rope, None, told)
        answer: Tensor = self.proj_out(self.norm_out(joined[:, length:], made[:, -2:]))
        return answer

    def _told(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, modulations, C]: the sinusoids of the time, of a guidance of 0, and of each modulation's number."""
        embed = self.time_text_embed
        shared = torch.cat([embed.time_proj(timestep), embed.guidance_proj(torch.zeros_like(timestep))], dim=1)
        count = embed.mod_proj.shape[0]
        each = embed.mod_proj.expand(len(timestep), *embed.mod_proj.shape)
        return torch.cat([shared[:, None].expand(-1, count, -1), each.to(shared)], dim=-1).to(dtype)


def fill(module: ChromaTransformer, options: Any) -> None:
    """The sinusoids of the modulations' numbers, which are in no file."""
    config = module.config
    numbers = torch.arange(modulations(config), device=options.device) * 1000
    channels = 2 * (config["approximator_num_channels"] // 4)
    module.time_text_embed.register_buffer(
        "mod_proj",
        get_timestep_embedding(numbers, channels, flip_sin_to_cos=True, downscale_freq_shift=0),
        persistent=False,
    )


def use(module: ChromaTransformer, how: Attention) -> None:
    """Puts attention with a mask of its own into all blocks."""
    for block in (*module.transformer_blocks, *module.single_transformer_blocks):
        block.attn.set_processor(TextFirst(how))
