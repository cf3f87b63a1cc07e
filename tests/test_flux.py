"""FLUX.1's numbers against diffusers' pipelines and the original model's output."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from runner.errors import InvalidConfig
from runner.families.contract import LoadOptions
from runner.families.flux1.architecture import flux_layers
from runner.families.flux1.model import denoise, packed
from runner.families.flux1.spec import SHIFT
from runner.families.flux1.spec import TRANSFORMER as TRANSFORMER_CLASS
from runner.families.flux1.tiny import TRANSFORMER, write_tiny
from runner.families.parts.load import from_origin
from runner.families.parts.modules import make_module
from runner.families.registry import family, family_spec
from runner.inputs.sample import SampleInputs
from runner.inputs.train import TrainInputs
from runner.model.layers import origins
from runner.plan.compile import compile_graph
from tests.inprocess import applied, prepared
from tests.ready import ready
from tests.support import DATA, Place, draw_pictures, family_changes, new_place

Make = Callable[..., Place]
SIZE = {"num_inference_steps": 4, "width": 48, "height": 32}


def transformer(config: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    """diffusers' class with the weights of a file in the original names."""
    module = make_module(TRANSFORMER_CLASS, config)
    found = {name: from_origin(state[origin.key], origin) for name, origin in origins(flux_layers(config), "").items()}
    module.load_state_dict(found, strict=True)
    return module.eval()


def test_the_denoiser_answers_as_the_original_model() -> None:
    """black-forest-labs/flux's class with the same weights, for the same tokens, time in 0..1 and guidance."""
    file = load_file(DATA / "flux1_tiny.safetensors")
    state = {key.removeprefix("model."): x for key, x in file.items() if key.startswith("model.")}
    config = {
        **TRANSFORMER,
        "patch_size": 1,
        "joint_attention_dim": state["txt_in.weight"].shape[1],
        "pooled_projection_dim": state["vector_in.in_layer.weight"].shape[1],
    }
    rows = int(file["img_ids"][:, 1].max()) + 1
    columns = int(file["img_ids"][:, 2].max()) + 1
    grid = file["packed_input"].transpose(1, 2).unflatten(2, (rows, columns))
    x = torch.nn.functional.pixel_shuffle(grid, 2)
    torch.testing.assert_close(packed(x), file["packed_input"])
    module = transformer(config, state)

    def answer(time: float) -> Tensor:
        told = {"hidden": file["text"], "pooled": file["pooled"], "guidance": time * file["guidance"]}
        with torch.no_grad():
            return packed(denoise(module, x, time * file["sigma"], told))

    torch.testing.assert_close(answer(1000), file["output"], rtol=1e-4, atol=1e-5 + last_place(answer))


def last_place(answer: Callable[[float], Tensor]) -> float:
    """How far an answer moves with the last place of the model's time in 0..1000: its waves have a thousand radians, and
    the last place of `exp` and `cos` is another one on another processor."""
    return (answer(1000 * (1 + 2**-23)) - answer(1000)).abs().max().item()


def sampled(place: Place) -> tuple[Any, Image.Image]:
    """The first prompt of a run and the base model's picture."""
    outcome = applied(place.file, until="sample")
    prompt = outcome.graph.of(SampleInputs).prompts[0]
    key = outcome.graph.of(SampleInputs).key(prompt, 0, "raw")
    return prompt, Image.open(prepared(place.file).store.item("samples", key))


def assert_alike(ours: Image.Image, theirs: Image.Image) -> None:
    assert ours.size == theirs.size == (48, 32)
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize(("guidance", "cfg"), [(3.5, 1.0), (2.0, 3.0)])
def test_a_sample_is_that_of_diffusers_pipeline(family_place: Make, guidance: float, cfg: float) -> None:
    """Embedded guidance, the shift by size, and true guidance where it is above 1."""
    sampling = {**SIZE, "cfg_scale": cfg, "embedded_guidance": guidance, "negative_prompt": "dark"}
    place = family_place("flux1", training={"max_train_steps": 1}, sampling=sampling)
    prompt, ours = sampled(place)
    pipeline = diffusers.FluxPipeline.from_pretrained(place.folder / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt.prompt,
        negative_prompt="dark",
        true_cfg_scale=cfg,
        width=48,
        height=32,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(prompt.seed or 0),
    ).images[0]
    assert_alike(ours, theirs)


@pytest.fixture
def schnell(tmp_path: Path) -> Place:
    write_tiny(tmp_path / "model", guidance_embeds=False)
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "shift": 1.0, "use_dynamic_shifting": False}))
    place = new_place(tmp_path / "place", tmp_path / "model")
    place.base = family_changes("flux1")
    place.write(
        {"training": {"max_train_steps": 1}, "sampling": {"width": 48, "height": 32, "num_inference_steps": None}}
    )
    return place


def test_schnell_is_told_no_guidance_and_samples_in_four_unshifted_steps(schnell: Place) -> None:
    run = prepared(schnell.file)
    assert (run.model.variant, run.model.text_tokens) == ("schnell", 256)
    assert compile_graph(run).of(TrainInputs).numerics.guidance is None
    assert run.config.training.timesteps.shift == 1.0
    prompt, ours = sampled(schnell)
    assert (prompt.num_inference_steps, prompt.cfg_scale) == (4, 1.0)
    pipeline = diffusers.FluxPipeline.from_pretrained(schnell.folder / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt.prompt,
        width=48,
        height=32,
        num_inference_steps=4,
        max_sequence_length=256,
        generator=torch.Generator().manual_seed(prompt.seed or 0),
    ).images[0]
    assert_alike(ours, theirs)


def kontext(family_place: Make, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Place:
    """A place with references, whose sizes are small."""
    from runner.families.flux1 import spec

    sizes = ((32, 48), (48, 32), (40, 40))
    monkeypatch.setattr(spec, "KONTEXT_SIZES", sizes)
    monkeypatch.setattr(diffusers.pipelines.flux.pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", list(sizes))
    place = family_place("flux1")
    draw_pictures(place.folder / "before", 10, seed=9, size=24)
    Image.open(place.folder / "before" / "0.png").resize((40, 25)).save(place.folder / "before" / "0.png")
    place.base = {
        **place.base,
        "model": {**place.base["model"], "variant": "kontext"},
        "dataset": {"resolution": 32, "sources": [{"path": "pics", "control_path": "before"}]},
        "sampling": {**SIZE, "prompts": [{"prompt": "make it red", "control_images": ["before/0.png"]}]},
    }
    place.write(changes)
    return place


def test_kontext_makes_what_diffusers_pipeline_makes(family_place: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    place = kontext(family_place, monkeypatch, training={"max_train_steps": 1})
    prompt, ours = sampled(place)
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(place.folder / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    def made(picture: Image.Image | None) -> Image.Image:
        return pipeline(
            picture,
            prompt.prompt,
            width=48,
            height=32,
            num_inference_steps=4,
            guidance_scale=2.5,
            max_area=48 * 32,
            generator=torch.Generator().manual_seed(prompt.seed or 0),
        ).images[0]

    assert_alike(ours, made(Image.open(place.folder / "before" / "0.png").convert("RGB")))
    without = made(None)
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), without.tobytes(), strict=True)) > 1, "the reference counts"


@pytest.mark.parametrize("variant", ["dev", "kontext"])
def test_the_first_loss_is_that_of_a_bare_computation(
    family_place: Make, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """diffusers' pipeline encodes and its transformer answers, with the noise and the time of our first batch."""
    changes = {"network": None, "training": {"max_train_steps": 1, "max_grad_norm": 0.0}}
    place = family_place("flux1", **changes) if variant == "dev" else kontext(family_place, monkeypatch, **changes)
    there = ready(place, torch.device("cpu"))
    task, loader = there.task()
    batch = next(loader.steps_from(0))[0]
    ours = float(task.loss(batch).detach())
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(place.folder / "model", local_files_only=True)
    sigma = (batch.tensors["timesteps"] / 1000).view(-1, 1, 1, 1)
    latents, noise = batch.tensors["latents"], batch.tensors["noise"]
    assert len(batch.names) == 2
    with torch.no_grad():
        hidden, pooled, text_ids = pipeline.encode_prompt(list(batch.texts))
        noisy = (1 - sigma) * latents + sigma * noise
        shape = latents.shape
        tokens = pipeline._pack_latents(noisy, *shape)
        where = pipeline._prepare_latent_image_ids(2, shape[2] // 2, shape[3] // 2, "cpu", torch.float32)
        if variant == "kontext":
            pictures = [Image.open(place.folder / "before" / Path(name).name) for name in batch.names]
            pixels = [
                pipeline.image_processor.preprocess(picture.resize((40, 40), Image.Resampling.LANCZOS))
                for picture in pictures
            ]
            reference = pipeline._encode_vae_image(torch.cat(pixels), None)
            tokens = torch.cat([tokens, pipeline._pack_latents(reference, 2, 4, 20, 20)], dim=1)
            other = pipeline._prepare_latent_image_ids(2, 10, 10, "cpu", torch.float32)
            other[..., 0] = 1
            where = torch.cat([where, other])
        answer = pipeline.transformer(
            hidden_states=tokens,
            timestep=sigma.flatten(),
            guidance=torch.ones(2),
            pooled_projections=pooled,
            encoder_hidden_states=hidden,
            txt_ids=text_ids,
            img_ids=where,
            return_dict=False,
        )[0]
        target = pipeline._pack_latents(noise - latents, *shape)
    loss = ((answer[:, : target.shape[1]] - target) ** 2).mean()
    assert ours == pytest.approx(float(loss), rel=1e-5)


def test_the_shift_follows_the_size() -> None:
    """e^mu between 256 and 4,096 tokens, in training as in diffusers' pipelines."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    from runner.diffusion.timesteps import dynamic_shift, shift_for

    scheduler = json.loads(
        (
            Path(family_spec("flux1").inspect.__code__.co_filename).parent.parent
            / "configs/flux1/scheduler/scheduler_config.json"
        ).read_text()
    )
    for tokens in (256, 1024, 4096, 6000):
        wanted = math.exp(calculate_shift(tokens, 256, 4096, 0.5, 1.15))
        assert shift_for("resolution", tokens, SHIFT) == pytest.approx(wanted)
        assert dynamic_shift(scheduler, tokens) == pytest.approx(wanted)
    assert shift_for("resolution", 1024, SHIFT) == pytest.approx(1.878, abs=1e-3)
    assert dynamic_shift({"use_dynamic_shifting": False, "shift": 3.0}, 1024) is None


def test_levels_of_training_are_shifted_by_size(family_place: Make) -> None:
    """The loader's timesteps are those of FLUX.1's line, not of the usual one."""
    import random

    from runner.diffusion.timesteps import draw_timestep
    from runner.seeding import rng

    there = ready(family_place("flux1"), torch.device("cpu"))
    _, loader = there.task()
    batch = next(loader.steps_from(0))[0]
    settings = there.graph.of(TrainInputs).timesteps
    assert settings.shift == "resolution"
    tokens = batch.tensors["latents"][0, 0].numel() // 4
    draws: Callable[[int], random.Random] = lambda n: rng(there.graph.of(TrainInputs).seed, "timestep", 0, 0, n)  # noqa: E731
    wanted = [draw_timestep(settings, draws(n), tokens, SHIFT) for n in range(2)]
    assert batch.tensors["timesteps"].tolist() == pytest.approx(wanted)
    assert wanted != pytest.approx([draw_timestep(settings, draws(n), tokens) for n in range(2)])


def test_text_is_encoded_as_in_the_pipeline(family_place: Make) -> None:
    place = family_place("flux1")
    run, bundle = prepared(place.file), family("flux1")
    options = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
    encoders = {name: bundle.load(run.model, name, options) for name in run.model.text_encoders}
    texts = ["a red star", "", "a" * 300]
    with torch.no_grad():
        ours = bundle.encode_texts(
            encoders, bundle.load_tokenizers(run.model), texts, compile_graph(run).of(TrainInputs).numerics, False
        )
    pipeline = diffusers.FluxPipeline.from_pretrained(place.folder / "model", transformer=None, local_files_only=True)
    hidden, pooled, _ = pipeline.encode_prompt(texts)
    torch.testing.assert_close(ours["hidden"], hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["pooled"], pooled)


@pytest.mark.parametrize(
    ("variant", "given", "why"),
    [
        ("kontext", {"control_masks": ["pics/0.png"]}, "`control_masks`: reference pictures are seen whole"),
        ("dev", {"control_images": ["pics/0.png"]}, "`control_images`: this model sees no reference pictures"),
        ("kontext", {"control_images": ["pics/0.png"] * 2}, None),
    ],
)
def test_references_that_a_model_cannot_use(
    family_place: Make, variant: str, given: dict[str, Any], why: str | None
) -> None:
    place = family_place("flux1", model={"variant": variant}, sampling={"prompts": [{"prompt": "a", **given}]})
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    expected = (
        f"prompt 1: family flux1 cannot use {why}" if why else "prompt 1: there are 2 control images; the model takes 1"
    )
    assert [finding.message for finding in caught.value.diagnostics] == [expected]
