"""A family that an installed package brings: Stable Diffusion 1.5's parts with a denoiser for much noise and one for little,
which are told how much to glow."""
