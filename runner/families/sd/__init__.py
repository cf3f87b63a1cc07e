"""Stable Diffusion of the U-Net kind."""
