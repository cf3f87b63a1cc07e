"""Chroma: FLUX.1 schnell's blocks without distillation, CLIP and modulation layers."""
