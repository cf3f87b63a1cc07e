"""Dataset files of other tools are recognised; tags are joined and counted as Kohya's tools do today."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from runner.dataset.captions import CaptionRule, render, tags_of
from runner.errors import InvalidConfig
from runner.execute.metadata import publish_metadata
from schemas.dataset import ItemOptions
from tests.inprocess import prepared
from tests.support import Place, draw_pictures

AI_TOOLKIT = """job: extension
config:
  name: "my_lora"
  process:
    - type: 'sd_trainer'
      datasets:
        - folder_path: "/images"
          caption_ext: "txt"
"""
FILES: list[tuple[str, Any, str]] = [
    (
        "dataset.toml",
        'resolutions = [512]\nframe_buckets = [1, 33]\n[[directory]]\npath = "pics"\n',
        "dataset.toml is a dataset file of diffusion-pipe",
    ),
    (
        "config.toml",
        'output_dir = "x"\ndataset = "dataset.toml"\n[model]\ntype = "hunyuan-video"\n',
        "config.toml is a training file of diffusion-pipe",
    ),
    (
        "multidatabackend.json",
        [{"id": "a", "type": "local", "instance_data_dir": "pics"}],
        "multidatabackend.json is a data backend file of SimpleTuner",
    ),
    (
        "concepts.json",
        [{"name": "", "path": "pics", "image": {}, "text": {}}],
        "concepts.json is a file of concepts of OneTrainer",
    ),
    (
        "config.json",
        {"training_method": "LORA", "concept_file_name": "concepts.json"},
        "config.json is a training file of OneTrainer",
    ),
    ("train.yaml", AI_TOOLKIT, "train.yaml is a training file of ai-toolkit"),
    ("train.json", {"job": "extension", "config": {"process": []}}, "train.json is a training file of ai-toolkit"),
    (
        "easy.toml",
        '[[subsets]]\nimage_dir = "pics"\n[general_args.args]\nseed = 1\n',
        "easy.toml is a training file of LoRA_Easy_Training_Scripts",
    ),
    ("meta.json", {"a": {"caption": "x"}}, "meta.json is a list of pictures and their captions"),
    ("meta.jsonl", '{"image_path": "a.png", "caption": "x"}\n', "meta.jsonl is a list of pictures and their captions"),
    ("other.toml", 'schema_version = 1\n[run]\nname = "x"\n', "other.toml is a run.toml, not a dataset file"),
    ("x.toml", "general = 1\na = " + "9" * 5000 + "\n", "x.toml is no TOML: a number of it has more than 4,300 digits"),
    ("x.json", '{"a": ' + "9" * 5000 + "}", "x.json is no JSON: a number of it has more than 4,300 digits"),
    ("x.json", '{"a": ' * 5000 + "}" * 5000, "x.json is no JSON: it is nested too deeply"),
    (
        "x.json",
        '{"datasets": [{"subsets": [{"image_dir": "\\ud800"}]}]}',
        "x.json is no JSON: it holds half a character (a lone surrogate)",
    ),
    (
        "x.json",
        '{"datasets": [{"subsets": [{"image_dir": "pics", "face_crop_aug_range": ["\\ud800"]}]}]}',
        "x.json is no JSON: it holds half a character (a lone surrogate)",
    ),
    (
        "x.toml",
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "' + "a" * 300 + '"\n',
        f"a path has at most 4,000 bytes, and 255 in each of its parts, not '{'a' * 300}'",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), FILES, ids=[f"{name} {n}" for n, (name, _, _) in enumerate(FILES)]
)
def test_what_a_file_is(place: Place, name: str, content: Any, message: str) -> None:
    (place.folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    place.write({"dataset": {"batch_size": None, "held_out": None, "sources": None, "config_file": name}})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    findings = [finding for finding in caught.value.diagnostics if finding.severity == "error"]
    assert len(findings) == 1
    assert findings[0].message.endswith(message)
    if " is a " in message:
        assert findings[0].hint
        assert findings[0].places[0].file == name


# --- tags -------------------------------------------------------------------------------------------------------------


def one(text: str, seed: int = 0, **options: Any) -> str:
    return render(text, CaptionRule.of(ItemOptions(**options)), random.Random(seed))


def test_tags_are_joined_by_their_separator() -> None:
    """sd-scripts since PR 2390 (June 2026)."""
    assert one("a| b |c", caption_separator="|", shuffle_caption=True, keep_tokens=3) == "a| b| c"
    assert one("a; b|||c; d", caption_separator=";", keep_tokens_separator="|||") == "a; b; c; d"
    assert one("a. b, c", caption_separator=",.", shuffle_caption=True, keep_tokens=3) == "a, b, c", (
        "the first of a set"
    )
    assert (
        one("long hair, blue eyes", caption_separator=", ", shuffle_caption=True, keep_tokens=2)
        == "long hair, blue eyes"
    )
    assert one("a++b; c", caption_separator=";", secondary_separator="++") == "a;b; c"
    assert one("a| b", caption_separator="|") == "a| b", "nothing is split, nothing joined"


def test_tags_are_those_that_training_makes() -> None:
    def tags(text: str, **options: Any) -> list[str]:
        return tags_of(text, CaptionRule.of(ItemOptions(**options)))

    assert tags("1boy##standing, Red", keep_tokens_separator="##") == ["1boy", "standing", "Red"]
    assert tags("a;;b, c", secondary_separator=";;") == ["a", "b", "c"]
    assert tags("a. b, c", caption_separator=".,") == ["a", "b", "c"]
    assert tags("a, b\nc") == ["a", "b"]
    assert tags("a, b\nc", enable_wildcard=True) == ["a", "b", "c"]


def test_tag_frequency_counts_pictures(place: Place) -> None:
    folder = place.folder / "10_cat"
    draw_pictures(folder, 3)
    for number, text in enumerate(["1Boy##standing, red", "1boy##red", "1boy"]):
        (folder / f"{number}.txt").write_text(text)
    run = prepared(
        place.write({"dataset": {"held_out": None, "sources": [{"path": "10_cat", "keep_tokens_separator": "##"}]}})
    )
    found = json.loads(publish_metadata(run, 1, "raw", "x", True)["ss_tag_frequency"])
    assert found == {"10_cat": {"1boy": 3, "red": 2, "standing": 1}}
