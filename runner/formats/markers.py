"""Empty tensors by which a checkpoint in one file says what it predicts (as ComfyUI and reForge read them); torch-free."""

V_PRED = "v_pred"
"""It predicts v."""
ZTSNR = "ztsnr"
"""Its schedule of noise ends in pure noise."""
EDM = ("edm_vpred.sigma_max", "edm_mean")
"""It was trained on the noise levels of EDM (CosXL, Playground 2.5)."""
