"""Dataset files that are neither Kohya's nor musubi-tuner's: which tool's they are, and how to say the same here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class ForeignFile(NamedTuple):
    """What a file is, and what to do."""

    what: str
    hint: str


_DIFFUSION_PIPE = {
    "directory",
    "resolutions",
    "enable_ar_bucket",
    "ar_buckets",
    "num_ar_buckets",
    "frame_buckets",
    "size_buckets",
}
_PIPE = ForeignFile(
    "a dataset file of diffusion-pipe",
    "write each [[directory]] as [[dataset.sources]]: path and mask_path as they are, num_repeats as repeats, resolutions as "
    "resolution, frame_buckets as target_frames",
)
_PIPE_TRAINING = ForeignFile(
    "a training file of diffusion-pipe", "write a run.toml: `runner new --model FILE --images DIR` makes one"
)
_SIMPLE_TUNER = ForeignFile(
    "a data backend file of SimpleTuner",
    "write each entry as [[dataset.sources]]: instance_data_dir as path, repeats + 1 as repeats, instance_prompt as class_tokens, "
    "is_regularisation_data as regularization",
)
_ONE_TRAINER = ForeignFile(
    "a file of concepts of OneTrainer",
    "write each concept as [[dataset.sources]]: path as it is, balancing as repeats, loss_weight as weight",
)
_ONE_TRAINER_TRAINING = ForeignFile("a training file of OneTrainer", "write its concepts as [[dataset.sources]]")
_AI_TOOLKIT = ForeignFile(
    "a training file of ai-toolkit",
    "write each of its datasets as [[dataset.sources]]: folder_path as path, caption_ext as caption_extension, num_repeats as "
    "repeats, default_caption as class_tokens",
)
_EASY = ForeignFile(
    "a training file of LoRA_Easy_Training_Scripts",
    "put its [[subsets]] under [[datasets]], as [[datasets.subsets]], or write them as [[dataset.sources]]",
)
_LIST = ForeignFile(
    "a list of pictures and their captions", "name it as the path of a [[dataset.sources]], not as config_file"
)
_RUN = ForeignFile("a run.toml, not a dataset file", "name a dataset file, or write [[dataset.sources]]")


def recognised(content: Any) -> ForeignFile | None:
    """What a parsed file is, where it is not Kohya's or musubi-tuner's."""
    if isinstance(content, list):
        entries = [entry for entry in content if isinstance(entry, dict)]
        if any("image_path" in entry or "video_path" in entry for entry in entries):
            return _LIST
        if any(
            "instance_data_dir" in entry or "dataset_type" in entry or {"id", "type"} <= set(entry) for entry in entries
        ):
            return _SIMPLE_TUNER
        return _ONE_TRAINER if any("path" in entry for entry in entries) else None
    if not isinstance(content, Mapping) or "datasets" in content:
        return None
    if "schema_version" in content:
        return _RUN
    if isinstance(content.get("directory"), list) or len(_DIFFUSION_PIPE & set(content)) > 1:
        return _PIPE
    if isinstance(content.get("dataset"), str) and isinstance(content.get("model"), dict):
        return _PIPE_TRAINING
    if "concept_file_name" in content or isinstance(content.get("concepts"), list):
        return _ONE_TRAINER_TRAINING
    config = content.get("config")
    if isinstance(config, dict) and "process" in config:
        return _AI_TOOLKIT
    if isinstance(content.get("subsets"), list):
        return _EASY
    entries = list(content.values())
    listed = [entry for entry in entries if isinstance(entry, dict) and {"caption", "tags", "image_size"} & set(entry)]
    return _LIST if entries and len(listed) == len(entries) else None


def recognised_text(text: str) -> ForeignFile | None:
    """What a file that is neither TOML nor JSON is."""
    if re.search(r"^[ \t-]*folder_path[ \t]*:", text, re.MULTILINE) and re.search(
        r"^[ \t-]*process[ \t]*:", text, re.MULTILINE
    ):
        return _AI_TOOLKIT
    if re.match(r'\s*\{.*"(image|video)_path"', text):
        return _LIST
    return None
