"""The datasets that people already have: Kohya's and musubi's files unchanged, masks, crops, colours, lists of captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runner.data.images import PictureRequest
from runner.dataset.encodings import TrainItem, cached_views, still_view, view_of_use
from runner.diffusion.losses import distance
from runner.errors import InvalidConfig
from runner.plan.compile import compile_graph
from schemas.training import Loss
from tests.inprocess import applied, planned, prepared, trained_bytes
from tests.support import Place, draw_pictures

TEMPLATE = """
[general]
shuffle_caption = true
keep_tokens = 3

[[datasets]]
resolution = 32
batch_size = 3

  [[datasets.subsets]]
  image_dir = "{folder}/images"
  class_tokens = "character boy"
"""
"""The template of the source documents, at a size for the tiny model."""


def kohya(place: Place, text: str, name: str = "dataset.toml", **changes: Any) -> Path:
    """run.toml with nothing of its own about pictures but the file."""
    (place.folder / name).write_text(text)
    return place.write(
        {"dataset": {"batch_size": None, "held_out": None, "sources": None, "config_file": name}, **changes}
    )


def problems(place: Place, text: str, name: str = "dataset.toml") -> list[str]:
    with pytest.raises(InvalidConfig) as caught:
        prepared(kohya(place, text, name))
    return [finding.message for finding in caught.value.diagnostics if finding.severity == "error"]


def test_the_template_runs_as_it_is(place: Place) -> None:
    draw_pictures(place.folder / "images", 5)
    file = kohya(place, TEMPLATE.format(folder=place.folder))
    run = prepared(file)
    assert [item.text for item in run.collection.items] == ["character boy"] * 5, ".caption is Kohya's ending"
    assert any("end in .txt and are not used; captions end in .caption" in note for note in run.dataset_notes.render())
    assert {item.settings.batch_size for item in run.collection.items} == {3}
    assert {item.settings.captions.keep_tokens for item in run.collection.items} == {3}
    assert run.config.caching.text == "off", "shuffle_caption"
    outcome = applied(file)
    assert outcome.selection["chosen"] is not None


def test_keys_are_looked_for_from_the_subset_outwards(place: Place) -> None:
    draw_pictures(place.folder / "a", 3)
    draw_pictures(place.folder / "b", 3, seed=9)
    draw_pictures(place.folder / "reg", 2, seed=12)
    text = """
[general]
caption_extension = ".txt"
keep_tokens = 1
flip_aug = true
enable_bucket = true
[[datasets]]
resolution = [32, 32]
batch_size = 2
keep_tokens = 2
  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 4
  keep_tokens = 3
  [[datasets.subsets]]
  image_dir = "b"
  flip_aug = false
  caption_prefix = "by me,"
  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
[[datasets]]
resolution = 16
bucket_reso_steps = 8
min_bucket_reso = 8
  [[datasets.subsets]]
  image_dir = "a"
"""
    run = prepared(kohya(place, text, training={"max_train_steps": 1}))
    by: dict[tuple[str, int], TrainItem] = {
        (item.name.split("/")[0], item.fit.bucket[0]): item for item in run.collection.items
    }
    assert by["a", 32].repeats == 4
    assert by["a", 16].repeats == 1
    assert by["a", 32].settings.captions.keep_tokens == 3
    assert by["b", 32].settings.captions.keep_tokens == 2
    assert by["a", 16].settings.captions.keep_tokens == 1
    assert (by["a", 32].settings.flip, by["b", 32].settings.flip) == (True, False)
    assert by["b", 32].settings.captions.prefix == "by me,"
    assert by["reg", 32].settings.regularization
    assert (by["a", 32].settings.batch_size, by["a", 16].settings.batch_size) == (2, 1)
    assert sum(item.repeats for item in run.collection.items if item.settings.regularization) == 4 * 3 + 3 + 3


def test_the_same_as_json(place: Place) -> None:
    content = {
        "general": {"caption_extension": ".txt"},
        "datasets": [{"resolution": 32, "subsets": [{"image_dir": "pics", "num_repeats": 2}]}],
    }
    from_json = prepared(kohya(place, json.dumps(content), "dataset.json"))
    toml = '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = "pics"\nnum_repeats = 2\n'
    from_toml = prepared(kohya(place, toml))
    assert compile_graph(from_json).fingerprint("train") == compile_graph(from_toml).fingerprint("train")


def test_run_tomls_own_keys_stand_behind(place: Place) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "pics"\n'
    (place.folder / "dataset.toml").write_text(text)
    run = prepared(
        place.write(
            {
                "dataset": {
                    "batch_size": 4,
                    "sources": None,
                    "held_out": None,
                    "caption_extension": ".txt",
                    "resolution": 16,
                    "config_file": "dataset.toml",
                }
            }
        )
    )
    assert {item.settings.batch_size for item in run.collection.items} == {4}
    assert {item.fit.bucket for item in run.collection.items} == {(16, 16)}
    assert all(item.text for item in run.collection.items)


def test_a_key_in_both_shows_both_places(place: Place) -> None:
    (place.folder / "dataset.toml").write_text(
        '[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "pics"\n'
    )
    place.write({"dataset": {"sources": None, "held_out": None, "config_file": "dataset.toml"}})
    result = place.run("validate")
    assert result.code == 3
    assert "`batch_size` is given in [dataset] and in dataset.toml" in result.err
    assert "run.toml:" in result.err
    assert "dataset.toml:2:1" in result.err


def test_musubis_file(place: Place) -> None:
    text = '[general]\nresolution = [32, 32]\ncaption_extension = ".txt"\nbatch_size = 2\nenable_bucket = true\nbucket_no_upscale = false\n\n[[datasets]]\nimage_directory = "pics"\ncache_directory = "cache"\nnum_repeats = 3\n'
    run = prepared(kohya(place, text))
    assert {item.repeats for item in run.collection.items} == {3}
    assert len(run.collection.items) == 10


def test_validation_split_holds_out(place: Place) -> None:
    text = '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 32\nvalidation_split = 0.2\n[[datasets.subsets]]\nimage_dir = "pics"\n'
    assert len(prepared(kohya(place, text)).collection.held_out) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dirr = "pics"\n', "unknown key `image_dirr`"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "nothing"\n', "there is no folder"),
        (
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "pics"\nnum_repeats = -1\n',
            "`num_repeats`: must be at least 1",
        ),
        (
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "pics"\ncaption_dropout_rate = 5\n',
            "`caption_dropout_rate`: must be at most 1",
        ),
        (
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "pics"\nshuffle_caption = "False"\n',
            "`shuffle_caption`: must be a boolean",
        ),
        ('[[datasets]]\n[[datasets.subsets]]\nclass_tokens = "x"\n', "it names no pictures"),
        (
            '[[datasets]]\nresize_interpolation = "area"\n[[datasets.subsets]]\nimage_dir = "pics"\n',
            "`resize_interpolation` can only be 'lanczos'",
        ),
        (
            '[[datasets]]\nnetwork_multiplier = 0.5\n[[datasets.subsets]]\nimage_dir = "pics"\n',
            "`network_multiplier` can only be 1",
        ),
        (
            '[[datasets]]\nvalidation_seed = 3\n[[datasets.subsets]]\nimage_dir = "pics"\n',
            "`validation_seed` is not used here",
        ),
        ('[[datasets]]\nvideo_directory = "x"\n', "there is no folder"),
        ("[datasets]\nx = 1\n", "`datasets` must be an array of tables"),
        ("[other]\nx = 1\n", "unknown section `other`"),
        ("[general\n", "dataset.toml is no TOML"),
        ("", "dataset.toml has no subsets"),
    ],
)
def test_what_is_wrong_in_it_is_named(place: Place, text: str, message: str) -> None:
    found = problems(place, text)
    assert any(message in text for text in found), found
    result = place.run("plan")
    assert (result.code, "Traceback" in result.err) == (3, False)
    if "no subsets" not in message:
        assert "dataset.toml:" in result.err


# --- lists ------------------------------------------------------------------------------------------------------------


def test_metadata_files(place: Place) -> None:
    """Kohya's JSON and JSONL: caption and tags together; names without an ending; class tokens where there is neither."""
    draw_pictures(place.folder / "meta" / "sub", 3)
    content = {"sub/0": {"caption": "a cat", "tags": "x, y"}, "sub/1.png": {"tags": "only, tags"}, "sub/2": {}}
    (place.folder / "meta" / "m.json").write_text(json.dumps(content))
    lines = [
        json.dumps({"image_path": f"{name}.png" if not name.endswith(".png") else name, **entry})
        for name, entry in content.items()
    ]
    (place.folder / "meta" / "m.jsonl").write_text("\n".join(lines))
    for name in ("m.json", "m.jsonl"):
        source = {"path": f"meta/{name}", "class_tokens": "thing"}
        run = prepared(place.write({"dataset": {"held_out": None, "sources": [source]}}))
        assert sorted(item.text for item in run.collection.items) == ["a cat, x, y", "only, tags", "thing"]
    text = '[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nmetadata_file = "meta/m.json"\nimage_dir = "meta"\nclass_tokens = "other"\n'
    run = prepared(kohya(place, text))
    assert sorted(item.text for item in run.collection.items) == ["a cat, x, y", "only, tags", "other"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image_path": "../../etc/passwd.png"}', "m/passwd.png cannot be read: No such file or directory"),
        ('{"image_path": "nothing"}', "there is no picture nothing"),
        ('{"caption": "x"}', "it has no `image_path`"),
        ("{nope", "line 1: no JSON"),
        ('{"image_path": "0.png", "caption": 3}', "caption and tags must be text"),
        ("", "lists no pictures"),
    ],
)
def test_lists_that_cannot_be_used(place: Place, content: str, message: str) -> None:
    (place.folder / "pics" / "m.jsonl").write_text(content)
    place.write({"dataset": {"held_out": None, "sources": [{"path": "pics/m.jsonl"}]}})
    result = place.run("validate")
    assert result.code == 3
    assert message in result.err
    assert "Traceback" not in result.err


# --- masks ------------------------------------------------------------------------------------------------------------


def with_masks(place: Place) -> None:
    (place.folder / "masks").mkdir()
    for file in (place.folder / "pics").glob("*.png"):
        half = np.zeros((32, 32), dtype=np.uint8)
        half[:, :16] = 255
        Image.fromarray(half).save(place.folder / "masks" / file.name)


def test_a_masked_loss_is_the_weighted_mean() -> None:
    a, b, mask = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.rand(2, 1, 3, 3)
    found = distance(a, b, Loss(), torch.tensor([1, 2]), torch.ones(2), 1000, mask)
    torch.testing.assert_close(found, ((a - b) ** 2 * mask).mean((1, 2, 3)))


def test_masks_are_seen_as_the_picture_is(place: Place) -> None:
    with_masks(place)
    run = prepared(place.write({"dataset": {"flip_aug": True, "sources": [{"path": "pics", "mask_path": "masks"}]}}))
    item = run.collection.items[0]
    still = PictureRequest.of(item, still_view(item)).mask_pixels()
    turned = PictureRequest.of(item, still_view(item).mirrored).mask_pixels()
    assert still.shape == (1, 32, 32)
    assert float(still[0, :, :15].min()) == 1
    assert float(still[0, :, 17:].max()) == 0
    assert torch.equal(turned, still.flip(-1))


def test_masks_change_what_is_learned_and_their_content_counts(place: Place) -> None:
    with_masks(place)
    masked = {"dataset": {"sources": [{"path": "pics", "mask_path": "masks"}]}}
    plain = trained_bytes(place.write({}))
    found = trained_bytes(place.write(masked))
    assert found != plain
    assert trained_bytes(place.write({**masked, "training": {"loss": {"masked": False}}})) == plain
    for places in ("memory", "off"):
        shutil.rmtree(place.folder / ".runner")
        trained_bytes(place.write({**masked, "caching": {"latents": places}}))
    trained_bytes(place.write(masked))
    before = compile_graph(prepared(place.file)).fingerprint("train")
    Image.new("L", (32, 32), 255).save(place.folder / "masks" / "0.png")
    after = compile_graph(prepared(place.file)).fingerprint("train")
    assert before != after
    plan = planned(place.file)
    assert plan.actions["cache.latents"].missing <= 1
    (place.folder / "masks" / "1.png").unlink()
    with pytest.raises(InvalidConfig, match="has no mask"):
        prepared(place.file)


def test_transparency_as_a_mask(place: Place) -> None:
    for file in (place.folder / "pics").glob("*.png"):
        picture = Image.open(file).convert("RGBA")
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(file)
    plain = trained_bytes(place.write({}))
    run = prepared(place.write({"dataset": {"alpha_mask": True}}))
    mask = PictureRequest.of(run.collection.items[0], still_view(run.collection.items[0])).mask_pixels()
    assert float(mask[0, 0].mean()) < 0.1 < 0.9 < float(mask[0, -1].mean())
    assert trained_bytes(place.file) != plain


# --- crops and colours ------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(place: Place) -> Place:
    """One picture of 128 x 64 with a face at (100, 20), among others."""
    shutil.rmtree(place.folder / "pics")
    draw_pictures(place.folder / "pics", 4, size=64)
    picture = Image.fromarray(np.arange(64 * 128 * 3, dtype=np.uint32).reshape(64, 128, 3).astype(np.uint8))
    picture.save(place.folder / "pics" / "w_100_20_16_16.png")
    (place.folder / "pics" / "w_100_20_16_16.txt").write_text("wide")
    return place


def item_of(place: Place, **options: Any) -> TrainItem:
    run = prepared(place.write({"dataset": {"held_out": None, "resolution": 32, **options}}))
    return next(item for item in run.collection.items if item.text == "wide")


def test_squares(wide: Place) -> None:
    item = item_of(wide, crop_aspect="square")
    assert item.fit.bucket == (32, 32)
    assert item.fit.resized == (64, 32)
    assert still_view(item).left == 16
    corner = still_view(item_of(wide, crop_aspect="square", crop_style="corner"))
    assert (corner.left, corner.top) == (0, 0)
    face = still_view(item_of(wide, crop_aspect="square", crop_style="face"))
    assert (face.left, face.top) == (32, 0), "the face is at 50 of 64; the crop ends at the edge"


def test_random_crops_are_as_random_crop(wide: Place) -> None:
    item = item_of(wide, crop_aspect="square", crop_style="random")
    views = {view_of_use(item, 1, use, False).left for use in range(40)}
    assert len(views) > 10
    assert {view.left for view in cached_views(item, 1)} <= set(range(33))


def test_faces_keep_their_size(wide: Place) -> None:
    """sd-scripts' crop_target: the shorter side is between so many and so many times the face's size."""
    item = item_of(wide, crop_aspect="square", face_crop_aug_range=[2.0, 4.0])
    views = [view_of_use(item, 1, use, False) for use in range(60)]
    shares = [32 / (16 * view.resized[0] / 128) for view in views]
    assert 2 <= min(shares) < max(shares) <= 4.2
    for view in views:
        scale = view.resized[0] / 128
        middle = 100 * scale - view.left
        assert 0 <= view.left <= view.resized[0] - 32
        assert 8 <= middle <= 32, "the face is in the picture"
    fixed = item_of(wide, crop_aspect="square", face_crop_aug_range=[3.0, 3.0])
    assert cached_views(fixed, 1) == [still_view(fixed)], "nothing varies"


def test_colours_vary_a_little(wide: Place) -> None:
    item = item_of(wide, color_aug=True)
    views = [view_of_use(item, 1, use, False) for use in range(300)]
    turned = [view for view in views if view.hue or view.gamma != 100]
    assert 0.2 < len(turned) / len(views) < 0.4
    plain = PictureRequest.of(item, still_view(item)).pixels()
    for view in turned[:6]:
        difference = (PictureRequest.of(item, view).pixels() - plain).abs().mean()
        assert 0 < float(difference) < 0.5
    assert all(abs(view.hue) <= 16 and 95 <= view.gamma <= 105 for view in turned)
    assert len(set(cached_views(item, 1))) <= 8


@pytest.mark.parametrize(
    "option",
    [
        {"color_aug": True},
        {"crop_style": "random", "crop_aspect": "square"},
        {"face_crop_aug_range": [2.0, 4.0], "crop_aspect": "square"},
    ],
)
def test_what_varies_is_encoded_at_each_use_or_in_variants(wide: Place, option: dict[str, Any]) -> None:
    changes = {"dataset": {"held_out": None, "resolution": 32, **option}}
    run = prepared(wide.write(changes))
    assert run.config.caching.latents == "off"
    assert any(derived.key == "caching.latents" and "every use is encoded" in derived.why for derived in run.derived)
    live = trained_bytes(wide.file)
    cached = trained_bytes(wide.write({**changes, "caching": {"latents": "disk"}}))
    assert live != cached
    shutil.rmtree(wide.folder / ".runner")
    assert trained_bytes(wide.file) == cached, "the variants come from the seed"


# --- what the peers fail at (measured on them): each is an error of the plan, or does not happen -------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("network_dimm = 64", "unknown key `network_dimm` in [network]"),
        ('type = "lorra"', '`network.type` must be one of "lora", "dora", "loha", "lokr", "oft"'),
        ("rank = 0", "`network.rank` must be an integer from 1 to 4096, not 0"),
        ("rank = true", "`network.rank` must be an integer"),
        ("alpha = 0.0", "`network.alpha` must be a number above 0 and of at most 1,000,000, not 0.0"),
    ],
)
def test_a_typo_costs_no_night(place: Place, line: str, message: str) -> None:
    text = place.write({"network": None}).read_text()
    place.text(f"{text}\n[network]\n{line}\n")
    result = place.run("plan")
    assert result.code == 3
    assert message in result.err
    assert "run.toml:" in result.err


def test_a_wrong_length_is_refused(place: Place) -> None:
    place.text(place.write().read_text().replace("max_train_steps = 6", 'max_train_steps = "lots"'))
    assert "`training.max_train_steps` must be an integer" in place.run("plan").err


def test_an_unwritable_output_folder_is_found_before_training(place: Place) -> None:
    (place.folder / "a_file").write_text("x")
    place.write({"run": {"output_dir": "a_file/runs"}})
    result = place.run("plan")
    assert result.code == 3
    assert "cannot be written" in result.err


def test_a_missing_prompt_file_is_found_before_training(place: Place) -> None:
    place.write({"sampling": {"prompt_file": "nothing.txt"}})
    assert "there is no prompt file" in place.run("plan").err


def test_another_resolution_never_trains_on_old_latents(place: Place) -> None:
    applied(place.write({"dataset": {"resolution": 16}}), until="cache")
    plan = planned(place.write({"dataset": {"resolution": 32}}))
    assert plan.actions["cache.latents"].missing == plan.actions["cache.latents"].total
    assert "dataset.resolution 16 → 32" in plan.actions["cache.latents"].reasons


def test_going_on_runs_only_what_is_left(place: Place) -> None:
    trained_bytes(place.write({"training": {"max_train_steps": 3}}))
    plan = planned(place.write({"training": {"max_train_steps": 6}}))
    assert (plan.actions["train"].total, plan.actions["train"].missing) == (6, 3)


def test_a_truncated_picture_is_named_by_the_plan(place: Place) -> None:
    file = place.folder / "pics" / "3.png"
    file.write_bytes(file.read_bytes()[:-40])
    result = place.run("plan")
    assert result.code == 3
    assert "pics/3.png cannot be decoded" in result.err
    place.write({"dataset": {"on_bad_item": "skip"}})
    assert "pics/3.png cannot be decoded" in place.run("plan").ok().out
