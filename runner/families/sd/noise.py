"""What a checkpoint of Stable Diffusion 1.5 or XL says of its noise: what it predicts, and whether its last step is pure noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.families.parts.files import CHECKPOINT, header_of, read_json
from runner.formats.markers import EDM, V_PRED, ZTSNR
from runner.model.model import ModelProblem, Stated

PREDICTION, ZERO_SNR = "model.prediction_type", "training.loss.zero_terminal_snr"


def stated_noise(place: Path) -> dict[str, Stated]:
    """Key of run.toml → what the checkpoint's file or folder says. Raises `ModelProblem`."""
    if place.is_dir():
        scheduler = place / "scheduler" / "scheduler_config.json"
        return _of_folder(read_json(scheduler)) if scheduler.is_file() else {}
    header = header_of(place, CHECKPOINT)
    marker = next((key for key in EDM if key in header.tensors), None)
    if marker is not None:
        raise ModelProblem(
            CHECKPOINT,
            f"{place} was trained on the noise levels of EDM (its key {marker}), which this program does not know",
            "name a checkpoint that predicts epsilon or v",
        )
    found = {}
    metadata = header.metadata.get("modelspec.prediction_type", "")
    if V_PRED in header.tensors:
        found[PREDICTION] = Stated("v_prediction", f"the checkpoint's key {V_PRED}")
    elif metadata.lower() in ("v", "v_prediction"):
        found[PREDICTION] = Stated("v_prediction", "the checkpoint's modelspec.prediction_type")
    elif metadata.lower() in ("epsilon", "eps"):
        found[PREDICTION] = Stated("epsilon", "the checkpoint's modelspec.prediction_type")
    if ZTSNR in header.tensors:
        found[ZERO_SNR] = Stated(True, f"the checkpoint's key {ZTSNR}")
    return found


def _of_folder(scheduler: Mapping[str, Any]) -> dict[str, Stated]:
    found = {}
    prediction = scheduler.get("prediction_type")
    if prediction is not None:  # parts/schedule.py knows which there are
        found[PREDICTION] = Stated(prediction, "the checkpoint's scheduler")
    if scheduler.get("rescale_betas_zero_snr") is not None:
        found[ZERO_SNR] = Stated(bool(scheduler["rescale_betas_zero_snr"]), "the checkpoint's scheduler")
    return found
