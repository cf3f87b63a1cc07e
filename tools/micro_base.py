"""Makes what the micro model starts from: its pictures, its tokenizer and its autoencoder.

    python -m tools.micro_base pictures      8,192 pictures with captions → recipes/micro-base/images
    python -m tools.micro_base start         autoencoder, tokenizer, configurations → recipes/micro-base/start

The denoiser and the text encoder are then trained by `runner apply recipes/micro-base/run.toml` itself.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from tools.draw_shapes import BASE_SHAPES, COLOURS, GROUNDS, SIZE, caption, drawn_at_random

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "micro-base"
PICTURES = 8192
AUTOENCODER_STEPS = 6000
BATCH = 32

UNET = {
    "sample_size": SIZE // 2,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SIZE,
}
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
    "projection_dim": 64,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
WORDS = [
    "a",
    "an",
    "the",
    "of",
    "on",
    "in",
    "at",
    "with",
    "and",
    "or",
    "to",
    "by",
    "for",
    "from",
    "over",
    "under",
    "near",
    "beside",
    "between",
    "big",
    "small",
    "large",
    "tiny",
    "little",
    "tall",
    "short",
    "wide",
    "thin",
    "thick",
    "round",
    "flat",
    "soft",
    "hard",
    "bright",
    "dark",
    "light",
    "pale",
    "deep",
    "plain",
    "bold",
    "old",
    "new",
    "one",
    "two",
    "three",
    "four",
    "five",
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "orange",
    "pink",
    "brown",
    "black",
    "white",
    "grey",
    "gray",
    "cyan",
    "magenta",
    "gold",
    "silver",
    "violet",
    "teal",
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "diamond",
    "hexagon",
    "pentagon",
    "cross",
    "arrow",
    "moon",
    "sun",
    "ring",
    "ellipse",
    "oval",
    "rectangle",
    "crescent",
    "shape",
    "shapes",
    "picture",
    "photo",
    "drawing",
    "painting",
    "image",
    "background",
    "ground",
    "colour",
    "color",
    "style",
    "icon",
    "symbol",
    "sign",
    "logo",
    "cat",
    "dog",
    "bird",
    "fish",
    "horse",
    "house",
    "tree",
    "flower",
    "leaf",
    "car",
    "boat",
    "plane",
    "ball",
    "cup",
    "hat",
    "key",
    "book",
    "face",
    "hand",
    "eye",
    "man",
    "woman",
    "child",
    "person",
    "thing",
    "object",
    "centre",
    "center",
    "left",
    "right",
    "top",
    "bottom",
    "corner",
    "middle",
]


def pictures(folder: Path) -> None:
    """Draws the training pictures; every combination of shape, colour and ground comes equally often."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(2024)
    kinds = [(shape, colour, ground) for shape in BASE_SHAPES for colour in COLOURS for ground in GROUNDS]
    for index in range(PICTURES):
        shape, colour, ground = kinds[index % len(kinds)]
        drawn_at_random(shape, colour, ground, rng).save(folder / f"{index:05d}.png")
        (folder / f"{index:05d}.txt").write_text(caption(shape, colour, ground) + "\n", encoding="utf-8")
    print(f"{PICTURES} pictures in {folder}")


def make_tokenizer(folder: Path) -> int:
    """A byte-pair tokenizer of CLIP's kind over a short list of words; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=800, end_of_word_suffix="</w>", initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    learner.train_from_iterator([[word] for word in sorted(set(WORDS))], trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    merges = [tuple(pair) for pair in learned["merges"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def train_autoencoder(folder: Path) -> None:
    """Trains the autoencoder on freshly drawn pictures: L1 + L2 on pixels, a light pull of the latents to unit variance."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(7)
    rng = random.Random(7)
    model = AutoencoderKL(**AUTOENCODER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, AUTOENCODER_STEPS, pct_start=0.05)

    def batch() -> torch.Tensor:
        drawn = []
        for _ in range(BATCH):
            shape, colour = rng.choice(BASE_SHAPES), rng.choice(list(COLOURS))
            drawn.append(np.asarray(drawn_at_random(shape, colour, rng.choice(list(GROUNDS)), rng)))
        pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float()
        return pixels / 127.5 - 1

    began = time.time()
    for step in range(1, AUTOENCODER_STEPS + 1):
        pixels = batch()
        posterior = model.encode(pixels).latent_dist
        decoded = model.decode(posterior.sample()).sample
        error = torch.nn.functional.mse_loss(decoded, pixels)
        loss = error + 0.5 * torch.nn.functional.l1_loss(decoded, pixels) + 1e-4 * posterior.kl().mean() / 1024
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            peak_signal = 10 * torch.log10(4 / error.detach()).item()
            print(f"autoencoder step {step}: PSNR {peak_signal:.2f} dB, {time.time() - began:.0f} s", flush=True)

    model.eval()
    with torch.no_grad():
        latents = torch.cat([model.encode(batch()).latent_dist.mean for _ in range(16)])
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    model.save_pretrained(folder)
    print(f"latent scale {model.config['scaling_factor']}")


def start(folder: Path) -> None:
    """Writes a diffusers directory whose denoiser and text encoder have an architecture but no weights yet."""
    vocabulary = make_tokenizer(folder / "tokenizer")
    text = {
        **TEXT_ENCODER,
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModel"],
    }
    parts = {
        "unet/config.json": {"_class_name": "UNet2DConditionModel", **UNET},
        "text_encoder/config.json": text,
        "scheduler/scheduler_config.json": SCHEDULER,
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "requires_safety_checker": False,
        },
    }
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    train_autoencoder(folder / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("pictures", "start"))
    part = parser.parse_args().part
    if part == "pictures":
        pictures(RECIPE / "images")
    else:
        start(RECIPE / "start")


if __name__ == "__main__":
    main()
