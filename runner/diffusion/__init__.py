"""The mathematics of diffusion: noise processes, losses, samplers. Knows no family and no file."""
