"""What a checkpoint says of its noise: read from the file, shown with its true reason, outvoted by run.toml, written back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from runner.diffusion.process import rescale_zero_terminal_snr
from runner.errors import InvalidConfig
from runner.execute.metadata import publish_metadata
from runner.families.contract import LoadOptions
from runner.families.registry import family
from runner.formats.markers import V_PRED, ZTSNR
from runner.inputs.train import TrainInputs
from runner.plan.compile import compile_graph
from runner.plan.prepare import Prepared
from runner.plan.render import plan_record
from runner.weights.tensors import write_tensors
from tests.inprocess import applied, planned, prepared
from tests.support import Place

Make = Callable[..., Place]
LOSS = "training.loss.zero_terminal_snr"


def single_file(
    place: Place, name: str, extra: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Place:
    """The place with its model in one file, and a shipped configuration of its size."""
    run = prepared(place.file)
    bundle = family(name)
    options = LoadOptions(dtype=torch.float32, device=torch.device("cpu"))
    states = {part: dict(bundle.load(run.model, part, options).state_dict()) for part in run.model.components}
    whole = {key: x.contiguous() for key, x in bundle.single_file(run.model, states).items()}
    write_tensors(place.folder / "one.safetensors", {**whole, **extra}, dict(metadata or {}))
    place.base = {
        **place.base,
        "model": {
            **place.base.get("model", {}),
            "family": name,
            "checkpoint": "one.safetensors",
            "tokenizer_1": "model/tokenizer",
            **({"tokenizer_2": "model/tokenizer_2"} if name == "sdxl" else {}),
        },
    }
    place.write()
    return place


@pytest.fixture
def one_file(family_place: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    def make(name: str, *keys: str, metadata: Mapping[str, str] | None = None) -> Place:
        from dataclasses import replace

        import runner.families.sd.spec as spec

        place = family_place(name)
        made = single_file(place, name, {key: torch.empty(0) for key in keys}, metadata)
        for finder in ("SD15_FINDER", "SDXL_FINDER"):
            monkeypatch.setattr(spec, finder, replace(getattr(spec, finder), shipped=place.folder / "model"))
        return made

    return make


def derived(run: Prepared) -> dict[str, tuple[Any, str]]:
    return {item.key: (item.value, item.why) for item in run.derived if item.key in ("model.prediction_type", LOSS)}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("keys", "metadata", "prediction", "zero"),
    [
        ((), {}, ("epsilon", "the checkpoint says nothing else"), (False, "the checkpoint does not say it")),
        ((V_PRED,), {}, ("v_prediction", "the checkpoint's key v_pred"), (False, "the checkpoint does not say it")),
        ((V_PRED, ZTSNR), {}, ("v_prediction", "the checkpoint's key v_pred"), (True, "the checkpoint's key ztsnr")),
        (
            (),
            {"modelspec.prediction_type": "v"},
            ("v_prediction", "the checkpoint's modelspec.prediction_type"),
            (False, "the checkpoint does not say it"),
        ),
        (
            (),
            {"modelspec.prediction_type": "epsilon"},
            ("epsilon", "the checkpoint's modelspec.prediction_type"),
            (False, "the checkpoint does not say it"),
        ),
    ],
)
def test_a_single_file_says_what_it_predicts(
    one_file: Any, name: str, keys: tuple[str, ...], metadata: dict[str, str], prediction: Any, zero: Any
) -> None:
    run = prepared(one_file(name, *keys, metadata=metadata).file)
    assert derived(run) == {"model.prediction_type": prediction, LOSS: zero}
    numerics = compile_graph(run).of(TrainInputs).numerics
    assert (numerics.prediction_type, numerics.zero_terminal_snr) == (prediction[0], zero[0])
    process: Any = family(name).process(numerics)
    assert (float(process.alphas_cumprod[-1]) == 0) == zero[0]
    assert not run.warnings


def test_the_plan_shows_it(one_file: Any) -> None:
    from runner.plan.estimate import figures
    from runner.plan.render import render_plan

    plan = planned(one_file("sdxl", V_PRED, ZTSNR).file)
    text = render_plan(plan, figures(plan, None))
    assert "model.prediction_type = v_prediction  (the checkpoint's key v_pred)" in text
    assert "training.loss.zero_terminal_snr = True  (the checkpoint's key ztsnr)" in text
    record = {item["key"]: item for item in plan_record(plan, figures(plan, None))["derived"]}
    assert record[LOSS] == {"key": LOSS, "value": True, "why": "the checkpoint's key ztsnr"}


def test_run_toml_wins_and_is_warned(one_file: Any) -> None:
    place = one_file("sdxl", V_PRED, ZTSNR)
    run = prepared(
        place.write({"model": {"prediction_type": "epsilon"}, "training": {"loss": {"zero_terminal_snr": False}}})
    )
    numerics = compile_graph(run).of(TrainInputs).numerics
    assert (numerics.prediction_type, numerics.zero_terminal_snr) == ("epsilon", False)
    assert [warning.message for warning in run.warnings] == [
        'model.prediction_type = "epsilon", but the checkpoint\'s key v_pred says "v_prediction"',
        "training.loss.zero_terminal_snr = false, but the checkpoint's key ztsnr says true",
    ]
    assert all(warning.places[0].file.endswith("run.toml") and warning.places[0].line for warning in run.warnings)
    run = prepared(place.write({"model": {"prediction_type": "epsilon"}}))
    assert derived(run) == {
        LOSS: (False, "the checkpoint's key ztsnr says true, but from pure noise epsilon cannot be learned")
    }
    place.write({"model": {"prediction_type": "v_prediction"}})
    assert not prepared(place.file).warnings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": {"sampler": "pndm"}},
            'error: the sampler "pndm" cannot start from pure noise, as the checkpoint\'s key ztsnr asks',
        ),
        (
            {"sampling": {"prompts": [{"prompt": "a", "sampler": "lms"}]}},
            'error: prompt 1: the sampler "lms" cannot start from pure noise, as the checkpoint\'s key ztsnr asks',
        ),
    ],
)
def test_samplers_that_cannot_start_from_pure_noise(one_file: Any, changes: dict[str, Any], message: str) -> None:
    place = one_file("sd15", V_PRED, ZTSNR)
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.write(changes))
    text = caught.value.diagnostics[0].render()
    assert text.startswith(message)
    assert "hint: use one of ddim" in text


def test_pure_noise_for_a_file_that_predicts_epsilon(one_file: Any) -> None:
    place = one_file("sd15")
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.write({"training": {"loss": {"zero_terminal_snr": True}}}))
    assert caught.value.diagnostics[0].message == (
        "zero_terminal_snr makes the last step pure noise, from which epsilon cannot be learned, and nothing says that the "
        "checkpoint predicts v"
    )


@pytest.mark.parametrize("key", ["edm_vpred.sigma_max", "edm_mean"])
def test_edm_checkpoints_are_refused(one_file: Any, key: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        prepared(one_file("sdxl", key).file)
    assert (
        f"was trained on the noise levels of EDM (its key {key}), which this program does not know"
        in caught.value.diagnostics[0].message
    )


def test_a_ckpt_says_it_too(one_file: Any) -> None:
    from safetensors.torch import load_file

    place = one_file("sd15", V_PRED, ZTSNR)
    torch.save({"state_dict": load_file(place.folder / "one.safetensors")}, place.folder / "one.ckpt")
    run = prepared(place.write({"model": {"checkpoint": "one.ckpt"}}))
    assert derived(run) == {
        "model.prediction_type": ("v_prediction", "the checkpoint's key v_pred"),
        LOSS: (True, "the checkpoint's key ztsnr"),
    }


def test_a_folder_without_a_scheduler_says_nothing(family_place: Make) -> None:
    place = family_place("sd15")
    (place.folder / "model" / "scheduler" / "scheduler_config.json").unlink()
    assert derived(prepared(place.file))["model.prediction_type"] == ("epsilon", "the checkpoint says nothing else")


def scheduler(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return found


def test_a_folder_says_it_in_its_scheduler(family_place: Make) -> None:
    place = family_place("sdxl")
    file = place.folder / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps(
            {**scheduler(place.folder / "model"), "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        )
    )
    run = prepared(place.file)
    why = "the checkpoint's scheduler"
    assert derived(run) == {"model.prediction_type": ("v_prediction", why), LOSS: (True, why)}
    file.write_text(json.dumps({**scheduler(place.folder / "model"), "prediction_type": "sample"}))
    with pytest.raises(InvalidConfig) as caught:
        prepared(place.file)
    message = caught.value.diagnostics[0].message
    assert message.endswith("scheduler_config.json: `prediction_type` must be epsilon or v_prediction, not sample")


def test_what_is_written_says_it_too(one_file: Any) -> None:
    """A full fine-tune in every format, read again as a checkpoint; and an adapter's metadata."""
    place = one_file("sdxl", V_PRED, ZTSNR)
    publish = [
        {"format": form, "directory": f"out/{form}", "mode": "copy"} for form in ("single_file", "comfyui", "diffusers")
    ]
    place.write(
        {
            "network": None,
            "training": {"max_train_steps": 1, "checkpoints": {"dtype": "fp32"}},
            "sampling": {"prompts": None},
            "selection": {"strategy": "last", "publish": publish},
        }
    )
    applied(place.file)
    for form in ("single_file", "comfyui"):
        with safe_open(next((place.folder / "out" / form).iterdir()), "pt") as archive:
            assert {V_PRED, ZTSNR} <= set(archive.keys())
            assert archive.metadata()["modelspec.prediction_type"] == "v"
    folder = next((place.folder / "out" / "diffusers").iterdir())
    assert {k: scheduler(folder)[k] for k in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")} == {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    again = {"single_file": str(next((place.folder / "out" / "single_file").iterdir())), "diffusers": str(folder)}
    for checkpoint in again.values():
        run = prepared(place.write({"model": {"checkpoint": checkpoint}}))
        assert compile_graph(run).of(TrainInputs).numerics.zero_terminal_snr
        metadata = publish_metadata(run, 1, "raw", "x", True)
        assert (metadata["modelspec.prediction_type"], metadata["ss_zero_terminal_snr"]) == ("v", "True")
    plain = prepared(place.write({"model": {"prediction_type": "epsilon"}}))
    assert publish_metadata(plain, 1, "raw", "x", True)["modelspec.prediction_type"] == "epsilon"


def test_new_takes_it_from_the_file(one_file: Any) -> None:
    from runner.config.load import load
    from runner.plan.propose import Wishes, propose

    place = one_file("sd15", V_PRED, ZTSNR)
    proposal = propose(
        Wishes(
            model=str(place.folder / "one.safetensors"),
            images=place.folder / "pics",
            method="lora",
            class_tokens=None,
            name="new",
            memory=None,
            settings=("model.tokenizer_1=model/tokenizer",),
        ),
        place.folder / "new.toml",
    )
    (place.folder / "new.toml").write_text(proposal.text)
    assert load(place.folder / "new.toml", ()).config is not None
    assert derived(prepared(place.folder / "new.toml")) == {
        "model.prediction_type": ("v_prediction", "the checkpoint's key v_pred"),
        LOSS: (True, "the checkpoint's key ztsnr"),
    }
    assert "it predicts v (the checkpoint's key v_pred), to pure noise (the checkpoint's key ztsnr)" in proposal.notes


def test_the_last_step_is_pure_noise() -> None:
    assert float(rescale_zero_terminal_snr(torch.tensor([0.9, 0.5, 0.1]))[-1]) == 0
