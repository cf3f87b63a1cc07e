"""From a caption file's text to the caption of one use, in the order of Kohya's tools (specs of sd-scripts' process_caption).

Prefix and suffix → wildcards → kept tags → warm-up truncates the rest → shuffle → tag dropout → secondary separator.
Leaving the whole caption out (caption_dropout_rate) is decided where batches are made, since it changes no encoding.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from functools import cached_property

from schemas.dataset import ItemOptions


@dataclass(frozen=True, kw_only=True)
class CaptionRule:
    """The caption options of one source."""

    separator: str
    shuffle: bool
    keep_tokens: int
    keep_tokens_separator: str
    secondary_separator: str
    wildcard: bool
    prefix: str
    suffix: str
    tag_dropout: float
    warmup_min: int
    warmup_step: float
    whole: bool = False
    """The caption is the whole text, as musubi-tuner reads it; else its first line."""

    @classmethod
    def of(cls, options: ItemOptions, whole: bool = False) -> CaptionRule:
        return cls(
            separator=options.caption_separator,
            shuffle=options.shuffle_caption,
            keep_tokens=options.keep_tokens,
            keep_tokens_separator=options.keep_tokens_separator,
            secondary_separator=options.secondary_separator,
            wildcard=options.enable_wildcard,
            prefix=options.caption_prefix,
            suffix=options.caption_suffix,
            tag_dropout=options.caption_tag_dropout_rate,
            warmup_min=options.token_warmup_min,
            warmup_step=options.token_warmup_step,
            whole=whole,
        )

    @cached_property
    def marks(self) -> str:
        """The characters that separate tags; spaces beside others do not."""
        return self.separator.strip() or self.separator

    @property
    def warms_up(self) -> bool:
        return self.warmup_step > 0

    @cached_property
    def varies(self) -> bool:
        """Whether two uses of one item may have different captions."""
        return self.shuffle or self.wildcard or self.tag_dropout > 0 or self.warms_up


def lines_of(text: str) -> list[str]:
    """The lines of a caption that hold something; one empty line where there is none."""
    if "\n" not in text and "\r" not in text:
        return [text.strip()]
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()] or [""]


def render(text: str, rule: CaptionRule, rng: random.Random, step: int = 0, total_steps: int = 0) -> str:
    """The caption of one use. `step` counts from 0 and matters only while the token warm-up lasts."""
    lines = lines_of(text)
    caption = lines[rng.randrange(len(lines))] if rule.wildcard and len(lines) > 1 else lines[0]
    if rule.whole and not rule.wildcard:
        caption = re.sub(r"\r\n?", "\n", text).strip()
    caption = " ".join(part for part in (rule.prefix, caption, rule.suffix) if part)
    if rule.wildcard:
        caption = _wildcards(caption, rng)
    has_fixed_part = bool(rule.keep_tokens_separator) and rule.keep_tokens_separator in caption
    if rule.shuffle or rule.tag_dropout > 0 or rule.warms_up or has_fixed_part:
        caption = _tags(caption, rule, rng, step, total_steps)
    if rule.secondary_separator:
        caption = caption.replace(rule.secondary_separator, rule.marks[0])
    return caption


def tags_of(text: str, rule: CaptionRule) -> list[str]:
    """All tags of a caption without any chance: those of the line or lines that training uses."""
    lines = lines_of(text)
    tags: list[str] = []
    for line in lines if rule.whole or rule.wildcard else lines[:1]:
        for separator in (rule.keep_tokens_separator, rule.secondary_separator):
            line = line.replace(separator, rule.marks[0]) if separator else line
        tags += _split(line, rule.marks)
    return tags


def fullest(text: str, rule: CaptionRule) -> str:
    """The longest caption that training may make of a text: nothing dropped, and of several lines the longest."""
    lines = lines_of(text)
    caption = max(lines, key=len) if rule.wildcard else text.strip() if rule.whole else lines[0]
    if rule.keep_tokens_separator and rule.keep_tokens_separator in caption:
        caption = f"{rule.marks[0]} ".join(tags_of(caption, rule))
    return " ".join(part for part in (rule.prefix, caption, rule.suffix) if part)


def _tags(caption: str, rule: CaptionRule, rng: random.Random, step: int, total_steps: int) -> str:
    head: list[str] = []
    tail: list[str] = []
    if rule.keep_tokens_separator and rule.keep_tokens_separator in caption:
        first, _, rest = caption.partition(rule.keep_tokens_separator)
        head = _split(first, rule.marks)
        if rule.keep_tokens_separator in rest:
            rest, _, last = rest.partition(rule.keep_tokens_separator)
            tail = _split(last, rule.marks)
        flexible = _split(rest, rule.marks)
    else:
        tags = _split(caption, rule.marks)
        head, flexible = tags[: rule.keep_tokens], tags[rule.keep_tokens :]
    if rule.warms_up:
        flexible = flexible[: _warm_count(len(flexible), rule, step, total_steps)]
    if rule.shuffle:
        rng.shuffle(flexible)
    if rule.tag_dropout > 0:
        flexible = [tag for tag in flexible if rng.random() >= rule.tag_dropout]
    return f"{rule.marks[0]} ".join(head + flexible + tail)


def _split(text: str, separators: str) -> list[str]:
    parts = re.split(f"[{re.escape(separators)}]", text) if len(separators) > 1 else text.split(separators)
    return [part.strip() for part in parts if part.strip()]


def _warm_count(count: int, rule: CaptionRule, step: int, total_steps: int) -> int:
    end = math.floor(rule.warmup_step * total_steps) if rule.warmup_step < 1 else int(rule.warmup_step)
    if end < 1 or step >= end:
        return count
    return math.floor(step * ((count - rule.warmup_min) / end)) + rule.warmup_min


def _wildcards(caption: str, rng: random.Random) -> str:
    kept = caption.replace("{{", "\x00").replace("}}", "\x01")
    chosen = re.sub(r"\{([^{}]+)\}", lambda match: rng.choice(match.group(1).split("|")), kept)
    return chosen.replace("\x00", "{").replace("\x01", "}")
