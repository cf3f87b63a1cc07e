"""Keys of families that make videos."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from schemas.base import Section, key


class VideoPrompt(Section):
    """How long a video is, and how fast."""

    frames: int | None = key(None, effect="trajectory", stage="sample", ge=1, le=100_000)
    """Frames of a video, rounded down to 4n + 1; 1 is a still (hunyuan_video), and framepack makes whole sections. One of frames, seconds and sections; unset: 1."""

    seconds: Annotated[float, Field(gt=0, le=3600)] | None = key(None, effect="trajectory", stage="sample")
    """The same in seconds: of fps for hunyuan_video, of 30 frames for framepack."""

    fps: Annotated[float, Field(ge=1, le=240)] | None = key(None, effect="trajectory", stage="sample")
    """Frames a second that the video is shown at. Unset: by family (hunyuan_video: 24, framepack: 30)."""
