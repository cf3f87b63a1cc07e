"""A family that an installed package brings: Stable Diffusion 1.5's parts, with a denoiser that is told how much to glow."""
