"""The options of a prompt's line: their letters in each tool's dialect, and what looks like one and would become text."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple, get_args

from runner.media import IMAGE_EXTENSIONS
from schemas.sampling import Sampler

SAMPLERS: tuple[str, ...] = get_args(Sampler)
PURE_NOISE_SAMPLERS = (
    "ddim",
    "ddpm",
    "euler",
    "euler_a",
    "unipc",
    "dpm++_2m",
    "dpm++_2m_karras",
    "dpm++_sde",
    "dpm++_sde_karras",
)
"""Samplers whose diffusers class can rescale its betas; a test compares this with the classes."""
_VIDEO = {
    "i": "image",
    "ei": "end_image",
    "im": "image_mask",
    "ci": "control_images",
    "cim": "control_masks",
    "of": "one_frame",
    "vs": "sections",
}
DIALECTS: dict[str, dict[str, str]] = {
    "kohya": {
        "w": "width",
        "h": "height",
        "d": "seed",
        "s": "num_inference_steps",
        "l": "cfg_scale",
        "n": "negative_prompt",
        "ss": "sampler",
    },
    "musubi": {
        "w": "width",
        "h": "height",
        "f": "frames",
        "d": "seed",
        "s": "num_inference_steps",
        "g": "embedded_guidance",
        "l": "cfg_scale",
        "n": "negative_prompt",
        "fs": "flow_shift",
        **_VIDEO,
    },
    "framepack": {
        "w": "width",
        "h": "height",
        "f": "seconds",
        "d": "seed",
        "s": "num_inference_steps",
        "g": "cfg_scale",
        "l": "cfg_scale",
        "n": "negative_prompt",
        "fs": "flow_shift",
        **_VIDEO,
    },
}
OPTION = re.compile(r"(?:^|\s)--([A-Za-z]+)(?=\s|$)")
REPEATABLE = ("control_images", "control_masks")
PICTURES = ("image", "end_image", "image_mask", *REPEATABLE)
KOHYA_NAMES = {
    "scale": "cfg_scale",
    "sample_steps": "num_inference_steps",
    "sample_sampler": "sampler",
    "guidance_scale": "cfg_scale",
}
SAMPLER_ALIASES = {
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_lms": "lms",
    "k_dpm_2": "dpm2",
    "k_dpm_2_a": "dpm2_a",
    "dpm_2": "dpm2",
    "dpm_2_a": "dpm2_a",
    "dpmsolver++": "dpm++_2m",
    "euler_ancestral": "euler_a",
}
_ELSEWHERE = {"g": "embedded guidance", "f": "frames", "fs": "flow shift", "i": "a start image", "ei": "an end image"}
"""Letters of the video tools, named when one stands in a line for a family that makes stills."""
_LETTERS = {letter: key for letters in DIALECTS.values() for letter, key in letters.items()}
_WORDS = {
    **{key: key for key in _LETTERS.values()},
    **KOHYA_NAMES,
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "cfg": "cfg_scale",
    "guidance": "cfg_scale",
    "negative": "negative_prompt",
    "neg": "negative_prompt",
    "neg_prompt": "negative_prompt",
}
"""What people write instead of a letter."""
_DASH = "\u2010-\u2015\u2212-"  # a word processor makes an en or em dash of two
_LOOKS = re.compile(
    rf"(?<![{_DASH}])(?P<dash>[{_DASH}]{{1,3}})(?P<name>[A-Za-z][A-Za-z_-]*?)(?P<join>\s+|[=:]\s*|(?=[0-9.]))(?=(?P<value>\S+))"
)
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[0-9]+)?(px)?[,;.]*", re.IGNORECASE)


class Stray(NamedTuple):
    """What looks like an option and is a part of the text."""

    start: int
    written: str
    key: str
    value: str
    name: str
    """Its letter, or the word for it."""

    def letter(self, dialect: str) -> str:
        """What to write in a line."""
        known = {key: letter for letter, key in {**_LETTERS, **DIALECTS[dialect]}.items()}
        return self.name if self.name in _LETTERS else known[self.key]


def strays(text: str, in_table: bool = False) -> Iterator[Stray]:
    """What of a line would become text though an option was meant: of one dash or a long one, with a word for its letter,
    stuck to its value or to what is before it. `in_table`: no line of a prompt file, where rightly written options are
    text too."""
    for match in _LOOKS.finditer(text):
        dash, name, join, value = match.group("dash", "name", "join", "value")
        before = text[: match.start()][-1:]
        apart = not before or before.isspace()
        right = dash == "--" and name.isalpha() and join.isspace() and apart
        word = name.lower().replace("-", "_")
        key = _LETTERS.get(word) or _WORDS.get(word)
        if key is None or (right and not in_table):
            continue
        if (name != name.lower() and not join) or (
            not apart and (dash != "--" or key == "negative_prompt") and before not in ",;.)"
        ):
            continue
        if key == "negative_prompt":
            meant = join.isspace() and (dash != "-" or word in ("n", "negative_prompt", "neg_prompt"))
        else:
            meant = _is_value(key, value)
        if meant:
            whole = f"{dash}{name}" if join.isspace() else f"{dash}{name}{join}{value}"
            yield Stray(match.start(), whole, key, value.rstrip(",;.") if _NUMBER.fullmatch(value) else value, word)


def _is_value(key: str, value: str) -> bool:
    """Whether a word after a letter makes it an option of that key, and not a part of the text."""
    if key in PICTURES:
        return os.path.splitext(value.strip("\"'"))[1].lower() in IMAGE_EXTENSIONS
    if key == "sampler":
        return SAMPLER_ALIASES.get(value, value) in SAMPLERS
    if key == "one_frame":
        return value.partition("=")[0].partition(",")[0] in (
            "default",
            "target_index",
            "control_index",
            "no_post",
            "no_2x",
            "no_4x",
        )
    return _NUMBER.fullmatch(value) is not None


def letter_hint(name: str, dialect: str) -> str:
    """What to write for an option that a dialect does not know."""
    letters = DIALECTS[dialect]
    listed = ", ".join(f"--{letter} ({key})" for letter, key in letters.items())
    if name in _ELSEWHERE:
        return f"--{name} is {_ELSEWHERE[name]} in the video tools; this family makes stills. Options are {listed}"
    word = name.lower()
    key = letters.get(word) or _WORDS.get(word)
    own = next((letter for letter, meant in letters.items() if meant == key), None)
    return f"write --{own}" if own is not None else f'options of the dialect "{dialect}" are {listed}'


def sampler_name(name: str) -> str:
    """Our name of a sampler. Raises `ValueError`."""
    found = SAMPLER_ALIASES.get(name, name)
    if found not in SAMPLERS:
        near = difflib.get_close_matches(re.sub(r"[\s-]+", "_", name.strip().lower()), SAMPLERS, 1)
        hint = f'did you mean "{near[0]}"?' if near else f"samplers are {', '.join(SAMPLERS)}"
        raise ValueError(f"there is no sampler {name!r}; {hint}")
    return found


def pure_noise_problem(sampler: str, why: str) -> tuple[str, str]:
    """What is wrong with a sampler that cannot start from pure noise, and a hint."""
    hint = f"use one of {', '.join(PURE_NOISE_SAMPLERS)}"
    return f'the sampler "{sampler}" cannot start from pure noise, {why}', hint
