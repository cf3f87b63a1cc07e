"""The same encoding as a plain loop: imports nothing of this project. Reads, encodes in batches, writes one file an item.

python benchmarks/bare_encode.py VAE_FOLDER IMAGES SIZE BATCH OUT
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()


def main() -> None:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image
    from safetensors.torch import save_file

    folder, images, size, batch, out = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]),
        Path(sys.argv[5]),
    )
    out.mkdir(parents=True, exist_ok=True)
    imported = time.perf_counter()
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True).eval()
    files = sorted(images.glob("*.png"))
    with torch.no_grad():
        for start in range(0, len(files), batch):
            chunk = files[start : start + batch]
            pictures = [
                Image.open(file, formats=["PNG"]).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
                for file in chunk
            ]
            pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
            latents = vae.encode(pixels.float() / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
            for file, latent in zip(chunk, latents, strict=True):
                save_file({"latents": latent.contiguous()}, str(out / f"{file.stem}.safetensors"))
    print(json.dumps({"stage": time.perf_counter() - imported, "all": time.perf_counter() - BEGAN}))


if __name__ == "__main__":
    main()
