"""What HunyuanVideo makes of a prompt; torch-free."""

from __future__ import annotations

from typing import Any

from runner.dataset.clips import whole
from runner.families.prompts import PromptPart, Readying


def ready(readying: Readying, index: int, options: Any) -> tuple[int, PromptPart]:
    """(frames, its part). The shift follows the number of steps, as in musubi-tuner."""
    shift, steps = options.flow_shift, options.num_inference_steps
    if shift is None:
        shift = 7.0 if steps >= 50 else 14.5 if steps >= 20 else 17.0
    fps = options.fps or readying.spec.defaults.fps
    asked = options.frames or (round(options.seconds * fps) if options.seconds else 1)
    frames = whole(max(1, asked), readying.model.frame_factor)
    if frames != asked:
        readying.note(index, f"{asked} frames are made as {frames} (4n + 1)")
    return frames, PromptPart(told_guidance(readying, options), shift, fps, options.custom_system_prompt)


def told_guidance(readying: Readying, options: Any) -> float | None:
    """What the denoiser is told as guidance."""
    given: float | None = options.embedded_guidance
    return readying.spec.defaults.embedded_guidance if given is None else given
