"""Stable Diffusion 3 Medium."""
