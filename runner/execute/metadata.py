"""The metadata of published files: Kohya's ss_* keys, Stability's modelspec.* and our own runner.*; all strings, torch-free.

Nothing in it depends on the machine: dates come from SOURCE_DATE_EPOCH or are "None", folders are named without paths.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from typing import Any

from runner import __version__
from runner.dataset.captions import tags_of
from runner.dataset.encodings import TrainItem
from runner.plan.prepare import Prepared


def publish_metadata(prepared: Prepared, step: int, weights: str, fingerprint: str, adapter: bool) -> dict[str, str]:
    """The metadata of a file made from one checkpoint."""
    config, training = prepared.config, prepared.config.training
    per_epoch = max(1, prepared.length.steps_per_epoch)
    network = config.network
    sizes = Counter(item.fit.bucket for item in prepared.collection.items)
    width, height = max(sizes, key=lambda size: (sizes[size], size))
    found: dict[str, Any] = {
        "ss_output_name": config.run.name,
        "ss_base_model_version": prepared.spec.base_version,
        "ss_sd_model_name": prepared.model.label,
        "ss_steps": step,
        "ss_epoch": -(-step // per_epoch),
        "ss_seed": config.run.seed,
        "ss_max_train_steps": prepared.length.steps,
        "ss_num_epochs": -(-prepared.length.steps // per_epoch),
        "ss_num_batches_per_epoch": prepared.length.batches_per_epoch,
        "ss_num_train_images": prepared.collection.uses_per_epoch,
        "ss_num_reg_images": sum(item.repeats for item in prepared.collection.items if item.settings.regularization),
        "ss_learning_rate": training.learning_rate,
        "ss_optimizer": training.optimizer.type,
        "ss_lr_scheduler": training.scheduler.type,
        "ss_lr_warmup_steps": training.scheduler.warmup_steps,
        "ss_mixed_precision": training.mixed_precision,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": training.memory.gradient_checkpointing,
        "ss_max_grad_norm": training.max_grad_norm,
        "ss_clip_skip": config.model.clip_skip,
        "ss_max_token_length": config.model.max_token_length,
        "ss_loss_type": training.loss.type,
        "ss_min_snr_gamma": training.loss.min_snr_gamma,
        "ss_noise_offset": training.loss.noise_offset or None,
        "ss_zero_terminal_snr": training.loss.zero_terminal_snr,
        "ss_v2": False,
        "ss_resolution": f"({width}, {height})",
        "ss_datasets": json.dumps(_datasets(prepared), sort_keys=True),
        "ss_dataset_dirs": json.dumps(_dataset_dirs(prepared.collection.items), sort_keys=True),
        "ss_tag_frequency": json.dumps(_tag_frequency(prepared.collection.items), sort_keys=True, ensure_ascii=False),
        "ss_training_started_at": None,
        "ss_training_finished_at": None,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": prepared.spec.architecture + ("/lora" if adapter else ""),
        "modelspec.implementation": "diffusers",
        "modelspec.title": config.run.name,
        "modelspec.date": _date(),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": {"v_prediction": "v", "epsilon": "epsilon"}.get(
            config.model.prediction_type or ""
        ),
        "modelspec.encoder_layer": config.model.clip_skip,
        "runner.version": __version__,
        "runner.run": fingerprint,
        "runner.step": step,
        "runner.weights": weights,
    }
    if network is not None:
        found |= {
            "ss_network_module": _network_module(prepared),
            "ss_network_dim": network.rank,
            "ss_network_alpha": network.alpha if network.alpha is not None else network.rank,
            "ss_network_dropout": network.dropout or None,
            "ss_network_args": json.dumps(args) if (args := _network_args(prepared)) else None,
            "ss_scale_weight_norms": network.scale_weight_norms,
        }
    return {name: "None" if value is None else str(value) for name, value in found.items()}


def _network_module(prepared: Prepared) -> str:
    network = prepared.config.network
    assert network is not None
    own = prepared.spec.network_modules
    return own.get(network.type, "lycoris.kohya")


def _network_args(prepared: Prepared) -> dict[str, str]:
    """The adapter's settings as Kohya's and LyCORIS' modules name them."""
    network = prepared.config.network
    assert network is not None
    args: dict[str, Any] = {}
    if network.conv_rank is not None:
        args |= {"conv_dim": network.conv_rank, "conv_alpha": network.conv_alpha or network.conv_rank}
    if network.type != "lora":
        algo = {"dora": "lora", "loha": "loha", "lokr": "lokr", "oft": "full"}[network.type]
        args |= {"algo": algo, "dora_wd": network.type == "dora"}
    for name in ("rank_dropout", "module_dropout"):
        if getattr(network, name):
            args[name] = getattr(network, name)
    if network.rslora:
        args["rs_lora"] = True
    return {name: str(value) for name, value in args.items()}


def _date() -> str | None:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch.isdigit():
        return None
    return datetime.datetime.fromtimestamp(int(epoch), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _folder_of(item: TrainItem) -> str:
    return item.name.rpartition("/")[0]


def _dataset_dirs(items: list[TrainItem]) -> dict[str, dict[str, int]]:
    dirs: dict[str, dict[str, int]] = {}
    for item in items:
        entry = dirs.setdefault(_folder_of(item), {"n_repeats": item.repeats, "img_count": 0})
        entry["img_count"] += 1
    return dirs


def _datasets(prepared: Prepared) -> list[dict[str, Any]]:
    config = prepared.config.dataset
    buckets = Counter(f"{item.fit.bucket[0]}x{item.fit.bucket[1]}" for item in prepared.collection.items)
    return [
        {
            "is_dreambooth": True,
            "batch_size_per_device": config.batch_size,
            "num_train_images": prepared.collection.uses_per_epoch,
            "resolution": config.resolution,
            "enable_bucket": config.buckets.enabled,
            "bucket_info": dict(sorted(buckets.items())),
            "subsets": _dataset_dirs(prepared.collection.items),
        }
    ]


def _tag_frequency(items: list[TrainItem]) -> dict[str, dict[str, int]]:
    """Folder → tag in small letters → pictures that have it, as Kohya's tools count it; tags are those that training makes
    of a caption, without the separators of kept and of joined ones."""
    found: dict[str, Counter[str]] = {}
    for item in {item.path: item for item in items}.values():
        tags = (tag.lower() for tag in tags_of(item.text, item.settings.captions))
        found.setdefault(_folder_of(item), Counter()).update(tags)
    return {folder: dict(sorted(counts.items())) for folder, counts in found.items()}
