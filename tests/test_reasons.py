"""Whatever makes a stage another one is named in the plan's reasons: each key, and each file outside of run.toml."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from runner.config.schema import all_keys
from runner.families.registry import FAMILIES
from runner.plan.current import current_graph
from runner.plan.history import last_applied, remember, schema_path
from runner.plan.reasons import OTHER_VERSION, Differences, Reason
from schemas.walk import Key
from tests import test_effects, test_video_effects
from tests.inprocess import planned, prepared
from tests.support import Place, draw_pictures, merged, new_place
from tests.test_effects import BASE, BESIDE, KEYS, at, flipped
from tests.test_video_effects import BASES, CASES, PROMPTS, with_prompt

pictures = test_effects.ground
videos = test_video_effects.ground


def as_applied(place: Place, changes: dict[str, Any] | None = None) -> None:
    """Leaves the record of an apply behind, as it begins with."""
    if changes is not None:
        place.write(changes)
    run = prepared(place.file)
    remember(current_graph(run))


def differences(place: Place, changes: dict[str, Any] | None = None) -> dict[str, list[Reason]]:
    """Stage → why it is another one than was applied."""
    if changes is not None:
        place.write(changes)
    run = prepared(place.file)
    applied = last_applied(run.store, run.output_dir)
    assert applied is not None
    found = Differences(applied, current_graph(run))
    return {name: found.of(name) for name in found.graph.nodes}


def texts(place: Place, stage: str, changes: dict[str, Any] | None = None) -> list[str]:
    return [reason.text for reason in differences(place, changes)[stage]]


# --- keys -------------------------------------------------------------------------------------------------------------

PATHS = ("network.init_from", "network.base_weights", "dataset.sources.mask_path")


@pytest.mark.parametrize(
    "key", [key for key in KEYS if key.effect == "trajectory" and key.dotted not in PATHS], ids=lambda key: key.dotted
)
def test_each_key_is_named(key: Key, pictures: Place) -> None:
    beside = merged(BASE, BESIDE.get(key.dotted, {}))
    named(pictures, key.dotted, beside, merged(beside, at(key, flipped(key))))


@pytest.mark.parametrize(
    ("dotted", "base", "before", "after"),
    [case for case in CASES if all_keys()[case[0]].effect == "trajectory"],
    ids=[case[0] for case in CASES if all_keys()[case[0]].effect == "trajectory"],
)
def test_each_key_of_videos_is_named(videos: Place, dotted: str, base: str, before: Any, after: Any) -> None:
    named(videos, dotted, merged(BASES[base], before), merged(BASES[base], after))


@pytest.mark.parametrize(("name", "base", "beside", "value"), PROMPTS, ids=[case[0] for case in PROMPTS])
def test_each_key_of_prompts_is_named(videos: Place, name: str, base: str, beside: Any, value: Any) -> None:
    before, after = with_prompt(base, **beside), with_prompt(base, **beside, **{name: value})
    named(videos, f"sampling.prompts.{name}", before, after)


def named(place: Place, dotted: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """A stage that the key is declared for has it among its reasons, and nothing else that was not changed."""
    as_applied(place, before)
    found = differences(place, after)
    keys = {stage: {schema_path(reason.key) for reason in own if reason.key} for stage, own in found.items()}
    declared = all_keys()[dotted].stages
    assert any(dotted in keys[stage] or any(key.startswith(dotted) for key in keys[stage]) for stage in declared), keys


def test_only_what_changed_the_stage_is_named(place: Place) -> None:
    """A key that changes no item, a caption, and a key that only training sees."""
    as_applied(place)
    (place.folder / "pics" / "1.txt").write_text("another")
    found = differences(place, {"dataset": {"buckets": {"max_size": 96}, "workers": 0, "batch_size": 3}})
    assert texts_of(found["cache.text"]) == ["1 caption edited (pics/1.png)"]
    assert found["cache.latents"] == []
    assert texts_of(found["train"]) == ["dataset.batch_size 2 → 3", "1 caption edited (pics/1.png)"]


def texts_of(reasons: list[Reason]) -> list[str]:
    return [reason.text for reason in reasons]


def test_a_path_to_the_same_content_is_no_reason(place: Place) -> None:
    as_applied(place)
    shutil.copytree(place.folder / "model", place.folder / "copy")
    found = differences(place, {"model": {"checkpoint": "copy"}})
    assert not any(found.values())


# --- files ------------------------------------------------------------------------------------------------------------


def touched(file: Path) -> None:
    """Another content: a space more in a text, another last byte in weights."""
    content = file.read_bytes()
    if file.suffix in (".json", ".txt", ".jinja"):
        file.write_bytes(content + b" ")
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture(scope="module")
def named_apart(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[[str], Path]) -> Callable[[str], Place]:
    """Family → a place where each part of the model that has a key is named by it."""
    made: dict[str, Place] = {}

    def make(name: str) -> Place:
        if name not in made:
            from tests.support import family_changes

            place = new_place(tmp_path_factory.mktemp("apart") / name, tiny_models(name))
            place.base = family_changes(name)
            parts = prepared(place.write())
            own: dict[str, Any] = {}
            for part in [name for name in parts.weights if f"model.{name}" in all_keys()]:
                if (
                    part.startswith("tokenizer")
                    and not parts.model.tokenizers[part.replace("tokenizer", "text_encoder")]
                ):
                    continue
                shutil.copytree(place.folder / "model", place.folder / f"own_{part}")
                own[part] = f"own_{part}"
                if part.startswith("tokenizer"):
                    inner = parts.model.tokenizers[part.replace("tokenizer", "text_encoder")]
                    own[part] = f"own_{part}/{inner.relative_to(place.folder / 'model')}"
            place.base = merged(place.base, {"model": own})
            place.write()
            write_lora(place)
            place.base = merged(place.base, {"network": {"base_weights": ["lora.safetensors:0.5"]}})
            place.write()
            made[name] = place
        return made[name]

    return make


def write_lora(place: Place) -> None:
    """lora.safetensors: an adapter of the model in Kohya's format."""
    import torch

    from runner.formats.adapter_write import kohya_state
    from runner.networks.shapes import adapter_shapes
    from runner.weights.tensors import write_tensors

    targets = prepared(place.file).targets
    tensors = {
        f"{target.full_name}.{name}": torch.full(shape, 0.1)
        for target in targets
        for name, shape in adapter_shapes(target).items()
    }
    write_tensors(place.folder / "lora.safetensors", kohya_state(targets, tensors, torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_file_of_the_model_is_named(family: str, named_apart: Callable[[str], Place]) -> None:
    place = named_apart(family)
    run = prepared(place.file)
    for part, fact in run.weights.items():
        if part == "init_from" or fact.value == "clip":
            continue
        as_applied(place)
        touched(file_of(run, part))
        key = next(key for key in fact.origin if key in ("model.checkpoint",) or place.base["model"].get(part))
        text = f"{key}: its content changed"
        found = {stage: texts_of(own) for stage, own in differences(place).items()}
        assert found["train"] == [text], (part, found)
        stage = (
            "cache.latents" if part in ("vae", "image_encoder") else "cache.text" if part != "denoiser" else "sample"
        )
        assert found[stage] == [text], (part, found)
        other = {"cache.latents": "cache.text", "cache.text": "cache.latents"}.get(stage)
        assert other is None or not found[other]
        assert found["sample"] == [text]


def file_of(run: Any, part: str) -> Path:
    """A file of a part of the model."""
    if part.startswith("tokenizer"):
        folder = run.model.tokenizers[part.replace("tokenizer", "text_encoder")]
        return next(file for file in run.model.tokenizer_files if file.parent == folder)
    return run.model.components[part].weights[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapters_are_named(family: str, named_apart: Callable[[str], Place]) -> None:
    """base_weights is merged into all that is encoded and trained; init_from is what training starts from."""
    place = named_apart(family)
    as_applied(place)
    touched(place.folder / "lora.safetensors")
    said = ["network.base_weights: the content of lora.safetensors changed"]
    found = {stage: texts_of(own) for stage, own in differences(place).items()}
    assert (found["cache.text"], found["train"], found["sample"]) == (said, said, said)
    before = {"network": {"base_weights": [], "init_from": "lora.safetensors"}}
    as_applied(place, before)
    touched(place.folder / "lora.safetensors")
    assert texts(place, "train", before) == ["network.init_from: its content changed"]
    assert texts(place, "cache.text", before) == []
    place.write()


def test_the_image_encoder_is_a_reason_to_encode_again(named_apart: Callable[[str], Place]) -> None:
    place = named_apart("framepack")
    run = prepared(place.write())
    remember(current_graph(run), ["cache.latents", "cache.text"])
    touched(place.folder / "own_image_encoder" / "image_encoder" / "model.safetensors")
    plan = planned(place.file)
    assert plan.actions["cache.latents"].reasons == ["model.image_encoder: its content changed"]
    assert plan.actions["train"].reasons == ["model.image_encoder: its content changed"]


def test_an_adapter_of_base_weights_is_a_reason_to_encode_and_train_again(named_apart: Callable[[str], Place]) -> None:
    place = named_apart("sd15")
    run = prepared(place.write())
    remember(current_graph(run), ["cache.latents", "cache.text"])
    touched(place.folder / "lora.safetensors")
    plan = planned(place.file)
    said = ["network.base_weights: the content of lora.safetensors changed"]
    assert plan.actions["cache.text"].reasons == said
    assert plan.actions["train"].reasons == said
    assert plan.actions["cache.latents"].reasons == ["they are no longer in the store"]


def repainted(file: Path) -> None:
    with Image.open(file) as picture:
        ImageOps.mirror(ImageOps.invert(picture.convert("RGB"))).save(file)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_file_of_an_item_is_named(family: str, family_place: Callable[..., Place]) -> None:
    place = family_place(family)
    for folder in ("masks", "controls"):
        draw_pictures(place.folder / folder, 10, seed=4)
    one_frame = family == "framepack"
    source = {"path": "pics", "mask_path": "masks", **({"control_path": "controls"} if one_frame else {})}
    as_applied(place, {"dataset": {"sources": [source]}})
    a, b, c, d = (Path(item.name).stem for item in prepared(place.file).collection.items[:4])
    changes: list[tuple[str, str, Callable[[Path], None]]] = [
        (f"masks/{a}.png", f"1 mask replaced (pics/{a}.png)", repainted),
        (f"pics/{b}.txt", f"1 caption edited (pics/{b}.png)", touched),
        *([(f"controls/{c}.png", f"1 control image replaced (pics/{c}.png)", repainted)] if one_frame else []),
        (f"pics/{d}.png", f"1 picture replaced (pics/{d}.png)", repainted),
    ]
    for name, text, change in changes:
        as_applied(place)
        change(place.folder / name)
        found = {stage: texts_of(own) for stage, own in differences(place).items()}
        assert found["train"] == [text]
        assert found["cache.text" if "caption" in text else "cache.latents"] == [text]
        assert found["cache.latents" if "caption" in text else "cache.text"] == []


def test_a_clip_and_files_of_settings_are_named(videos: Place) -> None:
    from tests.support import draw_clip

    base = merged(BASES["hv"], {"sampling": {"prompt_file": "prompts.txt"}})
    (videos.folder / "prompts.txt").write_text("a thing --d 3\n")
    as_applied(videos, base)
    draw_clip(videos.folder / "clips" / "0.mp4", 25, seed=7)
    (videos.folder / "prompts.txt").write_text("another thing --d 3\n")
    found = differences(videos)
    names = sorted({item.name for item in prepared(videos.file).collection.items if "0.mp4" in item.name})
    assert texts_of(found["cache.latents"]) == [
        f"{len(names)} picture{'s' * (len(names) > 1)} replaced ({', '.join(names)})"
    ]
    assert "sampling.prompt_file: its content changed" in texts_of(found["sample"])


def test_a_dataset_file_is_named(place: Place) -> None:
    text = '[general]\nresolution = {}\n[[datasets]]\nbatch_size = {}\n[[datasets.subsets]]\nimage_dir = "pics"\ncaption_extension = ".txt"\n'
    (place.folder / "data.toml").write_text(text.format(32, 2))
    as_applied(place, {"dataset": {"config_file": "data.toml", "sources": None, "batch_size": None}})
    (place.folder / "data.toml").write_text(text.format(32, 3))
    found = differences(place)
    assert texts_of(found["train"]) == ["dataset.config_file: its content changed"]
    assert found["cache.latents"] == []


# --- the store and older records --------------------------------------------------------------------------------------


def test_what_was_never_made_is_not_called_gone(place: Place) -> None:
    as_applied(place)
    stopped = ["the last apply was stopped before all were made"]
    assert planned(place.file).actions["cache.latents"].reasons == stopped
    run = prepared(place.file)
    remember(current_graph(run), ["cache.latents", "cache.text"])
    assert planned(place.file).actions["cache.latents"].reasons == ["they are no longer in the store"]


def test_a_record_of_version_1_is_read(place: Place) -> None:
    as_applied(place)
    record = next((place.folder / ".runner" / "runs").glob("*.json"))
    content = json.loads(record.read_text())
    for name in ("sha256", "facts", "files", "done"):
        content.pop(name)
    record.write_text(json.dumps({**content, "version": 1, "complete": True, "weights": {"vae": "0"}}))
    (place.folder / "pics" / "0.txt").write_text("else")
    assert texts(place, "train", {"training": {"learning_rate": 0.5}}) == [
        "training.learning_rate 0.001 → 0.5",
        "1 caption edited (pics/0.png)",
    ]


def test_another_version_of_runner_is_told(place: Place) -> None:
    as_applied(place)
    record = next((place.folder / ".runner" / "runs").glob("*.json"))
    content = json.loads(record.read_text())
    for name in ("sha256", "facts", "files", "done"):
        content.pop(name)
    content["fingerprints"]["train"] = "0"
    record.write_text(json.dumps({**content, "version": 1}))
    assert texts(place, "train") == [OTHER_VERSION]
