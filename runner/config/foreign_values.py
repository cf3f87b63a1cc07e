"""Other tools' words for our values, for the hints of a wrong value: Kohya's scripts, musubi-tuner, SimpleTuner, diffusers.

A hint is what to write, in the words of run.toml.
"""

from __future__ import annotations

import json
import re
from typing import Any

from runner.registry import installed, named

_NO_FLASH = 'attention = "sdpa": PyTorch\'s own kernel is as fast, and picks flash attention itself'
_DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16_mixed", "torch.bfloat16"), '"bf16"'),
    **dict.fromkeys(("float16", "half", "torch.float16", "fp16_mixed"), '"fp16"'),
    **dict.fromkeys(("float32", "float", "full", "fp32_full", "torch.float32"), '"fp32"'),
}
_QUANTIZATION = {
    **dict.fromkeys(("int8_quanto", "int8_torchao", "int8_bnb", "8bit", "q8_0"), '"int8"'),
    **dict.fromkeys(("nf4_bnb", "4bit", "int4", "int4_quanto", "uint4", "fp4"), '"nf4"'),
    **dict.fromkeys(
        ("fp8_e4m3fn", "fp8_e4m3", "fp8_quanto", "fp8_torchao", "fp8_base", "float8", "float8_e4m3fn"), '"fp8"'
    ),
    **dict.fromkeys(("no_change", "false", "no"), '"none"'),
}
_NO_OPTIMIZER = "is none of ours; prodigy finds the learning rate by itself too"
_OPTIMIZER = {
    **dict.fromkeys(("pagedadamw8bit", "paged_adamw_8bit", "paged_adamw8bit"), 'type = "paged_adamw8bit"'),
    **dict.fromkeys(("adamw_8bit", "adam8bit", "bnb_adamw8bit", "adamw8bit_kahan"), 'type = "adamw8bit"'),
    **dict.fromkeys(
        ("adamw_bf16", "adamw_kahan", "optimi_adamw"), 'type = "adamw" with stochastic_rounding = true for bf16 weights'
    ),
    **dict.fromkeys(
        ("adamwschedulefree", "radamschedulefree", "adamw_schedule_free", "schedulefree"),
        'type = "schedule_free_adamw"',
    ),
    **dict.fromkeys(("adafactor", "ada_factor"), 'type = "adafactor"'),
    **dict.fromkeys(("prodigy", "prodigyopt"), 'type = "prodigy"'),
    **dict.fromkeys(("lion_8bit", "pagedlion8bit"), 'type = "lion8bit"'),
    **dict.fromkeys(("adam", "adam_w", "torch_adamw"), 'type = "adamw"'),
    **dict.fromkeys(("dadaptation", "dadaptadam", "dadaptadampreprint", "dadaptlion"), _NO_OPTIMIZER),
}
_SAMPLER = {
    **dict.fromkeys(("k_euler", "euler_discrete", "flowmatch_euler"), '"euler"'),
    **dict.fromkeys(("k_euler_a", "euler_ancestral"), '"euler_a"'),
    **dict.fromkeys(("k_lms", "plms"), '"lms" or "pndm"'),
    **dict.fromkeys(("dpmsolver++", "dpm++_2m_sde", "dpm_solver++", "dpmsolver"), '"dpm++_2m"'),
    "dpmpp_2m_karras": '"dpm++_2m_karras"',
    "dpmpp_2m": '"dpm++_2m"',
    **dict.fromkeys(("dpmpp_sde", "dpmsingle"), '"dpm++_sde"'),
    **dict.fromkeys(("k_dpm_2", "dpm_2"), '"dpm2"'),
    **dict.fromkeys(("k_dpm_2_a", "dpm_2_a"), '"dpm2_a"'),
    **dict.fromkeys(("unipcmultistep", "uni_pc"), '"unipc"'),
}
_NOT_HERE = ("sd2", "sd2.1", "flux2", "flux.2", "wan", "wan2.1", "qwen", "qwen_image", "ltxvideo")
"""Families of other tools that none here may be."""
FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "model.dtype": _DTYPES,
    "caching.dtype": _DTYPES,
    "training.checkpoints.dtype": {**_DTYPES, "float": '"fp32"'},
    "training.mixed_precision": {
        **_DTYPES,
        **dict.fromkeys(("float32", "fp32", "float", "none", "full", "off", "fp32_full", "torch.float32"), '"no"'),
    },
    "model.prediction_type": {
        **dict.fromkeys(("v", "v_pred", "vpred", "velocity", "v_parameterization"), '"v_prediction"'),
        **dict.fromkeys(("eps", "noise", "eps_prediction", "epsilon_prediction"), '"epsilon"'),
        **dict.fromkeys(("flow", "flow_matching", "flow_prediction"), "leave it out: families of flows need none"),
    },
    "model.quantization": _QUANTIZATION,
    "model.text_encoder_quantization": _QUANTIZATION,
    "model.attention": {
        **dict.fromkeys(
            ("xformers", "flash", "flash_attn", "flash2", "flash3", "flash_attention_2", "sageattn", "sageattention"),
            _NO_FLASH,
        ),
        **dict.fromkeys(("torch", "pytorch", "sdpa_flash", "diffusers", "mem_eff"), '"sdpa"'),
        **dict.fromkeys(("math", "vanilla", "none", "manual"), '"eager"'),
    },
    "network.type": {
        **dict.fromkeys(
            ("locon", "standard", "lycoris", "lora_c3lier", "lierla", "c3lier", "networks.lora"),
            '"lora"; with conv_rank its convolutions are trained too, as LoCon does',
        ),
        **dict.fromkeys(("networks.loha", "lycoris_loha"), '"loha"'),
        **dict.fromkeys(("networks.lokr", "lycoris_lokr"), '"lokr"'),
        **dict.fromkeys(("networks.oft", "diag_oft", "boft"), '"oft"'),
        **dict.fromkeys(("networks.lora_framepack", "networks.lora_sd3", "networks.dylora"), '"lora"'),
        **dict.fromkeys(("full", "none"), "leave [network] out to train the whole model"),
    },
    "training.optimizer.type": _OPTIMIZER,
    "training.scheduler.type": {
        **dict.fromkeys(
            ("constant_with_warmup", "warmup_constant"), '"constant" and warmup_steps = the steps of the warm-up'
        ),
        **dict.fromkeys(
            ("cosine_with_warmup", "cosine_annealing", "cosineannealinglr", "cosine_with_min_lr", "sine"),
            '"cosine", with warmup_steps for a warm-up',
        ),
        **dict.fromkeys(
            (
                "cosine_annealing_with_restarts",
                "cosineannealingwarmrestarts",
                "cosine_annealing_warm_restarts",
                "cosine_with_hard_restarts",
                "cosine_hard_restarts",
                "cosine_restarts",
            ),
            '"cosine_with_restarts" with args = { num_cycles = … }',
        ),
        **dict.fromkeys(
            ("linear_with_warmup", "linear_warmup"), '"linear" and warmup_steps = the steps of the warm-up'
        ),
        **dict.fromkeys(
            ("piecewise_constant", "multistep", "step", "steplr"),
            '"piecewise" with args = { boundaries = [1000], factors = [1.0, 0.1] }',
        ),
        **dict.fromkeys(
            ("adafactor", "none", "schedulefree", "schedule_free"),
            '"constant": an optimizer that makes its own schedule needs none',
        ),
        **dict.fromkeys(("polynomial_with_warmup", "polynomial_decay"), '"polynomial" with args = { power = … }'),
        **dict.fromkeys(("warmup_stable_decay_lr", "wsd"), '"warmup_stable_decay"'),
    },
    "training.loss.type": {
        **dict.fromkeys(("l2", "mean_squared_error", "mse_loss"), '"mse"'),
        **dict.fromkeys(("mae", "l1_loss"), '"l1"'),
        **dict.fromkeys(("smooth_l1_loss", "smoothl1"), '"smooth_l1"'),
        "pseudo_huber": '"huber"',
    },
    "training.timesteps.sampling": {
        **dict.fromkeys(("sigma", "none", "random"), '"uniform"'),
        **dict.fromkeys(("flux_shift", "qwen_shift", "hunyuan_shift", "flow"), '"shift" with shift = "resolution"'),
        **dict.fromkeys(("lognorm", "logit", "logsnr"), '"logit_normal" with mean and std'),
    },
    "training.timesteps.weighting": {
        "logit_normal": 'it is a density: sampling = "logit_normal"',
        "mode": 'it is a density: sampling = "mode"',
        "uniform": '"none"',
        "sigma": '"sigma_sqrt"',
    },
    "sampling.sampler": _SAMPLER,
    "sampling.prompts.sampler": _SAMPLER,
    "dataset.sources.kind": {
        **dict.fromkeys(("images", "picture", "pictures", "img"), '"image"'),
        **dict.fromkeys(("videos", "clip", "clips"), '"video"'),
    },
    "selection.publish.format": {
        **dict.fromkeys(
            ("safetensors", "sd_scripts", "kohya_ss", "lora", "ckpt", "pt", "musubi"),
            '"kohya" for an adapter, "single_file" for a whole model',
        ),
        **dict.fromkeys(("peft", "hf", "huggingface"), '"diffusers"'),
        **dict.fromkeys(("comfy", "comfy_ui"), '"comfyui"'),
    },
    "selection.publish.mode": dict.fromkeys(("link", "hardlink", "ln"), '"symlink", or "copy"'),
    "caching.latents": {
        "true": '"disk" or "memory"',
        "false": '"off"',
        "ram": '"memory"',
        "none": '"off"',
        "to_disk": '"disk"',
    },
    "caching.text": {
        "true": '"disk" or "memory"',
        "false": '"off"',
        "ram": '"memory"',
        "none": '"off"',
        "to_disk": '"disk"',
    },
}
_TABLES: dict[str, str] = {
    "training.ema": "decay",
    "training.checkpoints": "every_n_steps",
    "network": "rank",
    "dataset.buckets": "enabled",
    "training.logging": "tensorboard",
    "training.components": "text_encoder_1",
    "training.memory": "gradient_checkpointing",
    "run": "name",
    "model": "checkpoint",
}
"""The key that a plain value in the place of a table most likely means."""
_PATTERNS: dict[str, str] = {
    "run.name": "letters, digits, and `.`, `_`, `-` between them, 100 at most",
    "run.device": '"auto", "cpu", "cuda" or "cuda:N"',
    "selection.publish.name": "a file's name, without / and \\",
}


def foreign_value(dotted: str, value: Any) -> str | None:
    """What to write for another tool's value of a key."""
    word = _plain(value)
    if word is None:
        return None
    if dotted == "training.scheduler.type" and word.startswith("adafactor:"):
        word = "adafactor"
    found = _family(word) if dotted == "model.family" else FOREIGN_VALUES.get(dotted, {}).get(word)
    return None if found is None else f"here: {found}"


def _family(word: str) -> str | None:
    """Our name of another tool's family."""
    for name in installed():
        family = named(name)
        if word in family.other_names:
            return ", ".join([f'"{name}"', *([family.names_hint] if family.names_hint else [])])
    *others, last = installed()
    return f"it is not trained here: {', '.join(others)} and {last} are" if word in _NOT_HERE else None


def _plain(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"[\s-]+", "_", value.strip().lower()) if isinstance(value, str) else None


def numbers_hint(name: str, value: str, is_list: bool) -> str | None:
    """`"1024,1024"`, `"1024x768"` → numbers without quotes."""
    parts = re.fullmatch(r"\s*[\[(]?\s*(\d+)\s*(?:px)?\s*(?:[,x×*;/ ]\s*(\d+)\s*(?:px)?)?\s*[\])]?\s*", value)
    if parts is None:
        return None
    first, second = parts.groups()
    if second is None:
        return f"write it without quotes: {name} = {first}"
    return f"write it as two numbers: {name} = [{first}, {second}]" if is_list else None


def table_hint(dotted: str, value: Any, keys: frozenset[str]) -> str | None:
    """How to write the table that a plain value stands in the place of; `keys` are the keys of that table."""
    shown = json.dumps(value, ensure_ascii=False)
    if dotted == "dataset.held_out":
        name = "path" if isinstance(value, str) else "fraction" if isinstance(value, float) else "count"
        return f"write [{dotted}] with {name} = {shown}"
    if "type" in keys and isinstance(value, str):
        meant = foreign_value(f"{dotted}.type", value)
        if meant is not None and meant.startswith("here: type = "):
            return f"write [{dotted}] with {meant.removeprefix('here: ')}"
        if meant is not None:
            return f"write [{dotted}] with type = {meant.removeprefix('here: ')}"
        return f"write [{dotted}] with type = {json.dumps(_plain(value))}"
    name = _TABLES.get(dotted, "")
    return f"write [{dotted}] with {name} = {shown}" if name and isinstance(value, (str, int, float)) else None


def list_hint(dotted: str, name: str, value: Any) -> str | None:
    """How to write an array of tables that texts stand in the place of."""
    first = value[0] if isinstance(value, list) and value else value
    return (
        f"write [[{dotted}]] with {name} = {json.dumps(first, ensure_ascii=False)}, once for each"
        if isinstance(first, str)
        else None
    )


def pattern_words(dotted: str) -> str | None:
    """What a text must be, in words instead of its pattern."""
    if dotted.endswith("caption_extension"):
        return 'an ending such as ".txt"'
    return _PATTERNS.get(dotted)


def pattern_hint(dotted: str, value: Any) -> str | None:
    """A text near the given one that fits the pattern of its key."""
    name = dotted.rpartition(".")[2]
    if not isinstance(value, str):
        return None
    if dotted == "run.name":
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:100]
        return f'write {name} = "{plain}"' if plain else None
    if name == "caption_extension" and re.fullmatch(r"\*?\.?[A-Za-z0-9]+", value):
        return f'write {name} = ".{value.lstrip("*.")}"'
    if dotted == "run.device":
        number = re.search(r"\d+$", value)
        if value.lower().startswith(("gpu", "cuda", "nvidia")) or value.isdigit():
            return f'write {name} = "cuda:{number.group()}"' if number else f'write {name} = "cuda"'
    return None


def backslash_hint(line: str) -> str | None:
    """For a line whose text in double quotes has backslashes, as Windows writes paths."""
    found = re.search(r'"([^"]*\\[^"]*)"?', line.partition("=")[2])
    if found is None:
        return None
    path = found.group(1)
    return f"in double quotes a backslash begins an escape: write '{path}' in single quotes, or \"{path.replace(chr(92), '/')}\""
