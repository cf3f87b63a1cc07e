"""HunyuanVideo's two text encoders: LLaMA in a chat template that asks it to describe a video, and CLIP's pooled output.

The template and the number of its tokens that are cut off are those of the published model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.families.contract import Conditioning
from runner.families.parts.text import pooled_clip

SYSTEM_PROMPT = (
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:"
)
TOKENS = 256
HIDDEN = -3
"""The layer whose output is taken; the last two and the final norm are not."""
CROP = 95
"""Tokens of the template before the text, with LLaMA-3's tokenizer."""


def _before(system: str) -> str:
    return (
        f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    )


def encode_llama_clip(
    encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], texts: Sequence[str], system: str | None = None
) -> Conditioning:
    """{"text": [B, 256, D], "mask": [B, 256] on the host, "pooled": [B, P]}; text behind the mask is zero.

    `system` replaces the system prompt. How many tokens the template has is counted, since another tokenizer or prompt has
    another number.
    """
    hidden, mask = _llama(
        encoders["text_encoder_1"], tokenizers["text_encoder_1"], texts, _before(system or SYSTEM_PROMPT)
    )
    pooled = pooled_clip(encoders["text_encoder_2"], tokenizers["text_encoder_2"], texts)
    return {"text": hidden, "mask": mask, "pooled": pooled}


def _llama(encoder: Any, tokenizer: Any, texts: Sequence[str], before: str) -> tuple[Tensor, Tensor]:
    crop = len(tokenizer(before).input_ids)
    ids, mask = padded_ids(tokenizer, [f"{before}{text}<|eot_id|>" for text in texts], crop + TOKENS)
    device = next(encoder.parameters()).device
    output = encoder(
        input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True, use_cache=False
    )
    mask = mask[:, crop:]
    hidden = output.hidden_states[HIDDEN][:, crop:]
    return hidden * mask[..., None].to(hidden), mask


def padded_ids(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """(token ids, mask), both [B, length]: padded on the right and cut off there."""
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids.fill_(pad or 0)
    for row, text in enumerate(texts):
        found = tokenizer(text).input_ids[:length]
        ids[row, : len(found)] = torch.tensor(found)
        mask[row, : len(found)] = 1
    return ids, mask
