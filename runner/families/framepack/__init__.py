"""FramePack: I2V, F1 and one frame."""
