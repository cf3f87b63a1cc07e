"""Numbers against references: diffusers' pipeline and schedulers, a bare PyTorch loop, and the papers' formulas."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import diffusers
import pytest
import torch

from runner.config.prompts import SAMPLERS
from runner.diffusion.losses import distance, huber_c, snr_weight
from runner.diffusion.process import make_process, rescale_zero_terminal_snr
from runner.diffusion.samplers import make_scheduler
from runner.optim.args import OPTIMIZER_ARGS
from runner.optim.build import optimizer_class
from runner.optim.schedules import schedule
from schemas.training import Loss, Scheduler
from tests.inprocess import applied, prepared
from tests.support import Place

SD15 = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# --- process and losses -----------------------------------------------------------------------------------------------


def test_noisy_latents_and_velocity_are_those_of_diffusers() -> None:
    reference = diffusers.DDPMScheduler(**SD15)
    process = make_process(SD15, "v_prediction", False)
    torch.manual_seed(0)
    x_0, noise, t = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.tensor([0, 10, 500, 900, 999])
    noisy = process.noisy(x_0, noise, t)
    torch.testing.assert_close(process.alphas_cumprod, reference.alphas_cumprod, rtol=1e-6, atol=0)
    torch.testing.assert_close(noisy.x_t, reference.add_noise(x_0, noise, t))
    torch.testing.assert_close(noisy.target, reference.get_velocity(x_0, noise, t))
    torch.testing.assert_close(noisy.snr, diffusers.training_utils.compute_snr(reference, t))
    assert torch.equal(make_process(SD15, "epsilon", False).noisy(x_0, noise, t).target, noise)
    perturbed = process.noisy(x_0, noise, t, input_noise=2 * noise)
    assert torch.equal(perturbed.target, noisy.target)
    torch.testing.assert_close(perturbed.x_t, reference.add_noise(x_0, 2 * noise, t))


def test_zero_terminal_snr_is_the_papers() -> None:
    """Algorithm 1 of arXiv 2305.08891, in diffusers' words: on betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    ours = rescale_zero_terminal_snr(torch.cumprod(1 - betas, 0))
    theirs = torch.cumprod(1 - diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert ours[-1] == 0
    process = make_process(SD15, "v_prediction", True)
    assert process.noisy(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([999])).snr == 0


def test_snr_weights() -> None:
    snr = torch.tensor([0.0, 0.1, 1.0, 5.0, 100.0, 5000.0])
    gamma = Loss(min_snr_gamma=5.0)
    torch.testing.assert_close(
        snr_weight(gamma, snr[1:], "epsilon"), torch.minimum(snr[1:], torch.tensor(5.0)) / snr[1:]
    )
    torch.testing.assert_close(
        snr_weight(gamma, snr, "v_prediction"), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    )
    debiased = Loss(debiased_estimation=True)
    limited = snr[1:].clamp(max=1000)
    torch.testing.assert_close(snr_weight(debiased, snr[1:], "epsilon"), 1 / limited.sqrt())
    torch.testing.assert_close(snr_weight(debiased, snr, "v_prediction"), 1 / (snr.clamp(max=1000) + 1))
    assert torch.equal(snr_weight(Loss(), snr, "epsilon"), torch.ones(6))
    assert torch.isfinite(snr_weight(gamma, snr, "epsilon")).all()


def test_distances() -> None:
    torch.manual_seed(1)
    a, b, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([1, 500, 999])
    snr = torch.tensor([100.0, 1.0, 0.01])
    torch.testing.assert_close(distance(a, b, Loss(), t, snr, 1000), ((a - b) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(distance(a, b, Loss(type="l1"), t, snr, 1000), (a - b).abs().mean((1, 2, 3)))
    constant = Loss(type="huber", huber_schedule="constant", huber_c=0.1)
    c = 0.1
    torch.testing.assert_close(
        distance(a, b, constant, t, snr, 1000), (2 * c * (((a - b) ** 2 + c**2).sqrt() - c)).mean((1, 2, 3))
    )
    smooth = Loss(type="smooth_l1", huber_schedule="constant", huber_c=0.1)
    torch.testing.assert_close(
        distance(a, b, smooth, t, snr, 1000), (2 * (((a - b) ** 2 + c**2).sqrt() - c)).mean((1, 2, 3))
    )
    falling = huber_c(Loss(type="huber", huber_schedule="exponential", huber_c=0.1), t, snr, 1000)
    torch.testing.assert_close(falling, torch.exp(-(-math.log(0.1) / 1000) * t))
    following = huber_c(Loss(type="huber", huber_schedule="snr", huber_c=0.1), t, snr, 1000)
    torch.testing.assert_close(following, (1 - 0.1) / (1 + (1 / snr).sqrt()) ** 2 + 0.1)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_that_of_diffusers_pipeline(place: Place, sampler: str) -> None:
    """The same model, scheduler, seed and prompts through StableDiffusionPipeline give the same picture."""
    from PIL import Image

    place.write({"training": {"max_train_steps": 1}, "sampling": {"sampler": sampler, "num_inference_steps": 5, "cfg_scale": 3.0, "negative_prompt": "dark", "width": 40, "height": 24}})  # fmt: skip
    outcome = applied(place.file, until="sample")
    prompt = outcome.graph.sample.prompts[0]
    run = prepared(place.file)
    ours = Image.open(run.store.item("samples", outcome.graph.sample.key(prompt, 0, "raw")))
    model = place.folder / "model"
    scheduler = make_scheduler(sampler, run.model.scheduler, "epsilon", False)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        model, scheduler=scheduler, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt.prompt, negative_prompt="dark", width=40, height=24, num_inference_steps=5, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(prompt.seed or 0),
    ).images[0]  # fmt: skip
    difference = max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True))
    assert ours.size == theirs.size == (40, 24)
    assert difference <= 1


def test_every_sampler_has_a_scheduler_and_says_truly_whether_it_can_start_from_pure_noise() -> None:
    from runner.config.crosscheck import ZERO_TERMINAL_SNR_SAMPLERS

    schedulers = {name: make_scheduler(name, SD15, "epsilon", False) for name in SAMPLERS}
    assert all(scheduler.config.prediction_type == "epsilon" for scheduler in schedulers.values())
    able = {
        name
        for name, made in schedulers.items()
        if "rescale_betas_zero_snr" in inspect.signature(type(made)).parameters
    }
    assert set(ZERO_TERMINAL_SNR_SAMPLERS) == able


# --- optimizers and schedules -----------------------------------------------------------------------------------------


def test_optimizer_arguments_are_those_of_the_classes() -> None:
    for kind, known in OPTIMIZER_ARGS.items():
        taken = set(inspect.signature(optimizer_class(kind).__init__).parameters)
        assert set(known) <= taken, kind


def test_schedules_have_the_fields_shapes() -> None:
    cosine = schedule(Scheduler(type="cosine", warmup_steps=10), 110, 1e-3)
    assert [cosine(0), cosine(5), cosine(10), cosine(60)] == pytest.approx([0, 0.5, 1, 0.5])
    assert cosine(110) == pytest.approx(0, abs=1e-9)
    linear = schedule(Scheduler(type="linear", warmup_ratio=0.1), 100, 1e-3)
    assert [linear(5), linear(10), linear(55)] == pytest.approx([0.5, 1, 0.5])
    restarts = schedule(Scheduler(type="cosine_with_restarts", args={"num_cycles": 2}), 100, 1e-3)
    assert [restarts(0), restarts(25), restarts(50), restarts(75)] == pytest.approx([1, 0.5, 1, 0.5])
    polynomial = schedule(Scheduler(type="polynomial", args={"power": 2.0, "lr_end": 1e-4}), 100, 1e-3)
    assert polynomial(50) == pytest.approx((9e-4 * 0.25 + 1e-4) / 1e-3)
    assert schedule(Scheduler(), 100, 1e-3)(99) == 1


# --- the trainer against a bare loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_losses_are_those_of_a_bare_loop(place: Place, whole: bool) -> None:
    """benchmarks/bare_loop.py imports nothing of ours; given the same batches and start it has the same losses."""
    from benchmarks.bare_loop import train
    from benchmarks.hand_over import hand_over

    changes: dict[str, Any] = {"training": {"max_train_steps": 4}, "network": None if whole else {"rank": 4}}
    place.write(changes)
    applied(place.file, until="train")
    events = [json.loads(line) for line in (place.output / "logs" / "events.jsonl").read_text().splitlines()]
    ours = [event["loss"] for event in events if event["type"] == "step"]
    hand_over(place.file, place.folder / "bare", steps=4)
    theirs = train(place.folder / "bare")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(set(ours)) == 4
