"""Numbers against references: diffusers' pipeline and schedulers, a bare PyTorch loop, and the papers' formulas."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from runner.config.optimizer_kinds import OPTIMIZERS
from runner.config.prompt_options import SAMPLERS
from runner.diffusion.losses import distance, flow_weight, huber_c, snr_weight
from runner.diffusion.process import FlowProcess, make_process, rescale_zero_terminal_snr
from runner.diffusion.samplers import make_scheduler
from runner.diffusion.timesteps import draw_level, draw_timestep, shift_for, shifted
from runner.families.contract import LoadOptions
from runner.families.registry import family, family_spec
from runner.inputs.sample import SampleInputs
from runner.inputs.train import TrainInputs
from runner.optim.build import build_optimizer, optimizer_class
from runner.optim.schedules import schedule
from runner.optim.single import SingleOptions, round_stochastically
from runner.plan.compile import compile_graph
from runner.rng import generator
from runner.stages.loader import Sources, StepLoader, multires_noise
from schemas.training import Loss, MultiresNoise, Optimizer, Scheduler, Timesteps
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


def test_the_flow_is_that_of_the_paper() -> None:
    """z = (1 - sigma) x + sigma eps, v = eps - x; SNR = ((1 - sigma) / sigma)²."""
    torch.manual_seed(0)
    x_0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([250.0, 500.0, 1000.0])
    noisy = FlowProcess().noisy(x_0, noise, t)
    reference = diffusers.FlowMatchEulerDiscreteScheduler()
    for row, level in enumerate(t):
        torch.testing.assert_close(
            noisy.x_t[row], reference.scale_noise(x_0[row : row + 1], level[None], noise[row : row + 1])[0]
        )
    torch.testing.assert_close(noisy.target, noise - x_0)
    torch.testing.assert_close(noisy.snr, torch.tensor([9.0, 1.0, 0.0]))


def test_flow_weights_are_those_of_diffusers() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9, 1.0])
    for name in ("none", "sigma_sqrt", "cosmap"):
        reference = diffusers.training_utils.compute_loss_weighting_for_sd3(name, sigma)
        torch.testing.assert_close(flow_weight(name, sigma), reference)


def test_densities_of_timesteps() -> None:
    """Quantiles of each density against its formula; arXiv 2403.03206, section 3.1."""

    def quantiles(**settings: Any) -> list[float]:
        rng = random.Random(5)
        drawn = sorted(draw_level(Timesteps(**settings), rng) for _ in range(20_000))
        return [drawn[int(len(drawn) * q)] for q in (0.1, 0.5, 0.9)]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    z = 1.2815515655446004  # the 90 % quantile of a standard normal number
    assert quantiles(sampling="uniform") == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    expected = [sigmoid(0.5 - 0.8 * z), sigmoid(0.5), sigmoid(0.5 + 0.8 * z)]
    assert quantiles(sampling="logit_normal", mean=0.5, std=0.8) == pytest.approx(expected, abs=0.02)
    expected = [sigmoid(-1.5 * z), 0.5, sigmoid(1.5 * z)]
    assert quantiles(sampling="sigmoid", sigmoid_scale=1.5) == pytest.approx(expected, abs=0.02)
    mode = sorted(1 - u - 1.29 * (math.cos(math.pi / 2 * u) ** 2 - 1 + u) for u in (0.1, 0.5, 0.9))
    assert quantiles(sampling="mode") == pytest.approx(mode, abs=0.02)
    cosmap = [1 - 1 / (math.tan(math.pi / 2 * u) + 1) for u in (0.1, 0.5, 0.9)]
    assert quantiles(sampling="cosmap") == pytest.approx(cosmap, abs=0.02)
    from scipy.stats import beta

    assert quantiles(sampling="beta", beta_alpha=2.0, beta_beta=5.0) == pytest.approx(
        list(beta(2, 5).ppf([0.1, 0.5, 0.9])), abs=0.02
    )


def test_shifts() -> None:
    assert [shifted(level, 3.0) for level in (0.0, 0.5, 1.0)] == pytest.approx([0, 0.75, 1])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert [shifted(n / 1000, 3.0) for n in (1000, 500, 1)] == pytest.approx(
        [float(scheduler.sigmas[i]) for i in (0, 500, 999)]
    )
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    for tokens in (256, 1024, 4096):
        assert shift_for("resolution", tokens) == pytest.approx(math.exp(calculate_shift(tokens, 256, 4096, 0.5, 1.16)))
    rng = random.Random(1)
    drawn = [draw_timestep(Timesteps(sampling="uniform", min=200, max=600), rng, 1) for _ in range(500)]
    assert 200 <= min(drawn) < 230
    assert 570 < max(drawn) <= 600


def test_scalings_of_v_prediction() -> None:
    """sd-scripts' scale_v_prediction_loss_like_noise_prediction and add_v_prediction_like_loss."""
    snr = torch.tensor([0.01, 1.0, 50.0, 5000.0])
    scale = snr.clamp(max=1000) / (snr.clamp(max=1000) + 1)
    torch.testing.assert_close(snr_weight(Loss(scale_v_pred_loss_like_noise_pred=True), snr, "v_prediction"), scale)
    torch.testing.assert_close(snr_weight(Loss(v_pred_like_loss=0.5), snr, "epsilon"), 1 + 0.5 / scale)


def test_multires_noise_is_the_sum_of_its_layers() -> None:
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1))
    found = multires_noise(noise, MultiresNoise(iterations=4, discount=0.4), 7, 0, 0, 0)
    assert float(found.std()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(found, multires_noise(noise, MultiresNoise(iterations=4, discount=0.4), 7, 0, 0, 0))
    one = multires_noise(noise, MultiresNoise(iterations=1, discount=0.4), 7, 0, 0, 0)
    fresh = torch.randn(1, 4, 16, 16, generator=generator(7, "multires_noise", 0, 0, 0, 0))[0]
    torch.testing.assert_close(one, (noise + fresh) / (noise + fresh).std())
    wide = torch.stack([multires_noise(noise, MultiresNoise(discount=0.9), 7, index, 0, 0) for index in range(40)])
    coarse = lambda x: torch.nn.functional.avg_pool2d(x, 4).std() / x.std()  # noqa: E731
    assert coarse(wide) > 1.2 * coarse(noise), "it has more of the coarse"


# --- sampling ---------------------------------------------------------------------------------------------------------


SAMPLE = {"num_inference_steps": 5, "cfg_scale": 3.0, "negative_prompt": "dark", "width": 48, "height": 32}
PIPELINES = {
    "sd15": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
}
SAMPLED = [
    *(("sd15", sampler) for sampler in SAMPLERS),
    *(("sdxl", sampler) for sampler in ("euler", "ddim", "unipc")),  # the same schedulers
    *(("sd3", sampler) for sampler in family_spec("sd3").samplers),
]


@pytest.mark.parametrize(("name", "sampler"), SAMPLED)
def test_a_sample_is_that_of_diffusers_pipeline(family_place: Callable[..., Place], name: str, sampler: str) -> None:
    """The same model, scheduler, seed and prompts through the family's pipeline give the same picture."""
    from PIL import Image

    place = family_place(name, training={"max_train_steps": 1}, sampling={**SAMPLE, "sampler": sampler})
    outcome = applied(place.file, until="sample")
    prompt = outcome.graph.of(SampleInputs).prompts[0]
    run = prepared(place.file)
    ours = Image.open(run.store.item("samples", outcome.graph.of(SampleInputs).key(prompt, 0, "raw")))
    scheduler = make_scheduler(
        sampler, run.model.scheduler, outcome.graph.of(TrainInputs).numerics.prediction_type, False
    )
    pipeline = PIPELINES[name].from_pretrained(place.folder / "model", scheduler=scheduler, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    extra: dict[str, Any] = {"max_sequence_length": 256} if name == "sd3" else {}
    theirs = pipeline(
        prompt.prompt,
        negative_prompt="dark",
        width=48,
        height=32,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(prompt.seed or 0),
        **extra,
    ).images[0]
    difference = max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True))
    assert ours.size == theirs.size == (48, 32)
    assert difference <= 1


def test_sd3_without_t5_is_the_pipeline_without_it(family_place: Callable[..., Place]) -> None:
    """Zeros stand where T5's tokens would."""
    import shutil

    place = family_place("sd3")
    for folder in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(place.folder / "model" / folder)
    index = json.loads((place.folder / "model" / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (place.folder / "model" / "model_index.json").write_text(json.dumps(index))
    run = prepared(place.file)
    assert run.model.text_encoders == ("text_encoder_1", "text_encoder_2")
    bundle = family("sd3")
    options = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
    encoders = {name: bundle.load(run.model, name, options) for name in run.model.text_encoders}
    numerics = compile_graph(run).of(TrainInputs).numerics
    ours = bundle.encode_texts(encoders, bundle.load_tokenizers(run.model), ["a red star"], numerics, False)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        place.folder / "model", text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    hidden, _, pooled, _ = pipeline.encode_prompt("a red star", None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["hidden"], hidden)
    torch.testing.assert_close(ours["pooled"], pooled)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_a_training_step_is_that_of_diffusers(family_place: Callable[..., Place], name: str) -> None:
    """The first loss equals diffusers' model, encoders and scheduler called as its training scripts call them."""
    place = family_place(name, network=None, training={"max_train_steps": 1, "max_grad_norm": 0.0})
    applied(place.file, until="train")
    ours = json.loads((place.output / "logs" / "events.jsonl").read_text().splitlines()[-2])["loss"]
    run = prepared(place.file)
    inputs = compile_graph(run).of(TrainInputs)
    own = family(name)
    discrete = name != "sd3"
    shape = lambda item: run.model.latent_shape(item.fit.bucket)  # noqa: E731
    loader = StepLoader(
        inputs,
        Sources(
            latents=None,
            latent_key=lambda d, v: "",
            latent_shape=shape,
            texts=None,
            text_key=lambda t: "",
            learned=lambda item, view, row: own.learned(item, view, None, row),
            discrete=discrete,
        ),
        0,
    )
    batch = next(loader.steps_from(0))[0]
    pipeline = PIPELINES[name].from_pretrained(place.folder / "model", local_files_only=True)
    vae = pipeline.vae
    with torch.no_grad():
        latents = vae.encode(batch.tensors["pixels"]).latent_dist.mode()
        latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        noise, t = batch.tensors["noise"], batch.tensors["timesteps"]
        if name == "sd3":
            hidden, _, pooled, _ = pipeline.encode_prompt(
                list(batch.texts), None, None, do_classifier_free_guidance=False
            )
            sigma = (t / 1000).view(-1, 1, 1, 1)
            noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
            answer = pipeline.transformer(noisy, hidden, pooled, t, return_dict=False)[0]
        else:
            noisy, target = diffusers.DDPMScheduler(**SD15).add_noise(latents, noise, t), noise
            added = None
            if name == "sdxl":
                hidden, _, pooled, _ = pipeline.encode_prompt(list(batch.texts), do_classifier_free_guidance=False)
                uses = zip(batch.items, batch.requests, latents, strict=True)
                learned = [own.learned(item, request.view, None, {"latents": row}) for item, request, row in uses]
                time_ids = torch.stack([row["cond.time_ids"] for row in learned])
                added = {"text_embeds": pooled, "time_ids": time_ids}
                assert time_ids.tolist() == [[32, 32, 0, 0, 32, 32]] * len(batch.texts)
            else:
                hidden = pipeline.encode_prompt(list(batch.texts), "cpu", 1, False)[0]
            answer = pipeline.unet(noisy, t, hidden, added_cond_kwargs=added, return_dict=False)[0]
    assert ours == pytest.approx(float(((answer - target) ** 2).mean()), rel=1e-5)


def test_every_sampler_has_a_scheduler_and_says_truly_whether_it_can_start_from_pure_noise() -> None:
    from runner.config.prompt_options import PURE_NOISE_SAMPLERS

    schedulers = {name: make_scheduler(name, SD15, "epsilon", False) for name in SAMPLERS}
    assert all(scheduler.config.prediction_type == "epsilon" for scheduler in schedulers.values())
    able = {
        name
        for name, made in schedulers.items()
        if "rescale_betas_zero_snr" in inspect.signature(type(made)).parameters
    }
    assert set(PURE_NOISE_SAMPLERS) == able


# --- optimizers and schedules -----------------------------------------------------------------------------------------


def test_optimizer_arguments_are_those_of_the_classes() -> None:
    for name, kind in OPTIMIZERS.items():
        taken = set(inspect.signature(optimizer_class(name).__init__).parameters)
        assert {*kind.args, *kind.defaults, *kind.fixed} <= taken, name


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


def test_more_schedules() -> None:
    rex = schedule(Scheduler(type="rex", warmup_steps=10), 110, 1e-3)
    assert [rex(5), rex(10), rex(60), rex(110)] == pytest.approx([0.5, 1, 0.5 / 0.75, 0])
    wsd = schedule(
        Scheduler(type="warmup_stable_decay", warmup_steps=10, args={"decay_ratio": 0.2, "min_lr_ratio": 0.1}),
        100,
        1e-3,
    )
    assert [wsd(5), wsd(10), wsd(80), wsd(90), wsd(100)] == pytest.approx([0.5, 1, 1, 0.55, 0.1])
    steps = schedule(Scheduler(type="piecewise", args={"boundaries": [10, 20], "factors": [1.0, 0.1, 0.01]}), 100, 1e-3)
    assert [steps(9), steps(10), steps(19), steps(20)] == [1.0, 0.1, 0.1, 0.01]


def weights_after(
    kind: str, options: SingleOptions | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> list[torch.Tensor]:
    """Three steps on a matrix and a bias with the gradients of a fixed quadratic."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)]
    parameters = [torch.nn.Parameter(tensor.clone().to(dtype)) for tensor in start]
    groups = [{"params": parameters, "lr": 0.01, "name": "denoiser"}]
    optimizer: Any = build_optimizer(Optimizer(type=kind, **settings), groups, options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(3):
        sum((parameter.float() ** 2).sum() for parameter in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (
        all(
            (parameter.float().abs() < tensor.abs()).float().mean() > 0.7
            for parameter, tensor in zip(parameters, start, strict=True)
        )
        or kind == "prodigy"
    )
    return [parameter.detach().float() for parameter in parameters]


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "torch.optim.NAdam"])
def test_every_optimizer_goes_downhill_and_tensor_by_tensor_alike(kind: str) -> None:
    """Optimizers of their own for each tensor do the same as one for all, in the backward pass or after it."""
    together = weights_after(kind)
    if kind in ("schedule_free_adamw", "prodigy"):
        return
    for options in (SingleOptions(offload=True), SingleOptions(fused_backward=True)):
        for ours, theirs in zip(weights_after(kind, options), together, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    matrix, bias = weights_after("muon", weight_decay=0.0)
    only_adamw = weights_after("adamw", weight_decay=0.0)
    torch.testing.assert_close(bias, only_adamw[1])
    assert not torch.allclose(matrix, only_adamw[0])


def test_adafactor_finds_its_steps() -> None:
    """relative_step: the learning rate that is given does not matter."""
    first = weights_after("adafactor", args={"relative_step": True, "scale_parameter": True})
    assert not torch.allclose(first[0], weights_after("adafactor")[0])


def test_stochastic_rounding_keeps_small_updates() -> None:
    """The mean of many roundings is the value; plain rounding would lose it."""
    values = torch.full((100_000,), 1.0 + 1 / 1024)
    rounded = round_stochastically(values, torch.Generator().manual_seed(3)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert float(rounded.mean()) == pytest.approx(1.0 + 1 / 1024, abs=1e-4)
    assert float(values.bfloat16().float().mean()) == 1.0
    options = SingleOptions(stochastic_rounding=True)
    exact = weights_after("adamw")
    for ours, theirs in zip(weights_after("adamw", options, torch.bfloat16), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


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
