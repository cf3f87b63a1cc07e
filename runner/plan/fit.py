"""`runner plan --fit 12GB`: the fastest settings whose predicted memory fits, and why each of them; torch-free.

Each remedy says what it changes in the question that the family's memory model is asked, and how much longer a step takes
with it. All sets of remedies are tried, the fastest one that fits is proposed. The factors are those that users of these
techniques report; docs/performance.md has those that were measured.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from runner.families.spec import MemoryQuestion
from runner.optim.kinds import state_bytes
from runner.plan.diff import Plan
from runner.plan.estimate import memory_question, trained_numbers

LIBRARIES = 900_000_000
"""What CUDA's context and the libraries' kernels take of a GPU beside tensors."""
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "G": 10**9,
    "M": 10**6,
}


@dataclass(frozen=True)
class Remedy:
    """A change of settings that saves memory. Of several with one `group` at most one is taken."""

    group: str
    settings: Mapping[str, Any]
    slower: float
    why: str
    change: Callable[[MemoryQuestion], MemoryQuestion]


@dataclass(frozen=True)
class Fit:
    """A proposal. `steps` has for each remedy what the peak is with it and all before it."""

    limit: int
    before: int
    after: int
    phase: str
    slower: float
    steps: tuple[tuple[Remedy, int], ...]

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for remedy, _ in self.steps for key, value in remedy.settings.items()}

    def as_record(self) -> dict[str, Any]:
        return {
            "limit_bytes": self.limit, "predicted_before_bytes": self.before, "predicted_after_bytes": self.after,
            "fits": self.after <= self.limit, "step_time_factor": round(self.slower, 3), "settings": self.settings,
            "reasons": [{"settings": dict(remedy.settings), "why": remedy.why, "peak_bytes": peak} for remedy, peak in self.steps],
        }  # fmt: skip


def parse_memory(text: str) -> int | None:
    """Bytes of "12GB", "11.5 GiB" or "8000MB"; None where it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    return int(float(match.group(1)) * unit) if match and unit else None


def fit(plan: Plan, limit: int) -> Fit:
    """The fastest settings that fit into `limit` bytes of a GPU; the leanest ones where none do."""
    question = replace(memory_question(plan, trained_numbers(plan)[0]), device="cuda")
    room = limit - LIBRARIES

    def peak(asked: MemoryQuestion) -> tuple[int, str]:
        phases = plan.prepared.spec.memory(asked).phases
        name = max(phases, key=lambda phase: phases[phase])
        return phases[name], name

    before, _ = peak(question)
    best: tuple[float, int, tuple[Remedy, ...]] | None = None
    leanest: tuple[int, tuple[Remedy, ...]] = (before, ())
    for chosen in _sets(_remedies(plan, question)):
        slower = 1.0
        for remedy in chosen:
            slower *= remedy.slower
        if best is not None and (slower, len(chosen)) >= best[:2]:
            continue
        size, _ = peak(_changed(question, chosen))
        if size < leanest[0]:
            leanest = (size, chosen)
        if size <= room:
            best = (slower, len(chosen), chosen)
    found = best[2] if best is not None else leanest[1]
    steps, asked, slower = [], question, 1.0
    for remedy in found:
        asked, slower = remedy.change(asked), slower * remedy.slower
        steps.append((remedy, peak(asked)[0] + LIBRARIES))
    after, phase = peak(asked)
    return Fit(limit, before + LIBRARIES, after + LIBRARIES, phase, slower, tuple(steps))


def _changed(question: MemoryQuestion, chosen: Iterable[Remedy]) -> MemoryQuestion:
    for remedy in chosen:
        question = remedy.change(question)
    return question


def _sets(remedies: list[Remedy]) -> Iterable[tuple[Remedy, ...]]:
    """All choices of none or one of each group."""
    groups: dict[str, list[Remedy]] = {}
    for remedy in remedies:
        groups.setdefault(remedy.group, []).append(remedy)
    for chosen in itertools.product(*([None, *group] for group in groups.values())):
        picked = tuple(remedy for remedy in chosen if remedy is not None)
        names = {remedy.group for remedy in picked}
        if "offload" in names and "checkpointing" not in names:
            continue
        yield picked


def _remedies(plan: Plan, question: MemoryQuestion) -> list[Remedy]:
    """What could be changed, of what is not set already."""
    config = plan.prepared.config
    found = list(_common(plan, question))
    if question.whole:
        found += _for_full(plan, question)
    else:
        found += _for_adapters(plan, question)
    if config.dataset.batch_size > 1:
        accumulation = config.dataset.batch_size * config.training.gradient_accumulation_steps
        found.append(
            Remedy(
                "batch", {"dataset.batch_size": 1, "training.gradient_accumulation_steps": accumulation}, 1.5,
                "one picture at a time; as many as before make a step", lambda asked: replace(asked, batch=1),
            )
        )  # fmt: skip
    return found


def _common(plan: Plan, question: MemoryQuestion) -> Iterable[Remedy]:
    config = plan.prepared.config
    if not question.checkpointing:
        yield Remedy(
            "checkpointing", {"training.memory.gradient_checkpointing": True}, 1.33,
            "activations are computed again in the backward pass", lambda asked: replace(asked, checkpointing=True),
        )  # fmt: skip
    if not question.activation_offload:
        yield Remedy(
            "offload", {"training.memory.activation_offload": True}, 1.1,
            "what stays of the activations waits on the host", lambda asked: replace(asked, activation_offload=True),
        )  # fmt: skip
    if question.optimizer_bytes > 2.2 and config.training.optimizer.type == "adamw":
        yield Remedy(
            "optimizer", {"training.optimizer.type": "adamw8bit"}, 1.001, "the optimizer's states take 8 bits",
            lambda asked: replace(asked, optimizer_bytes=state_bytes("adamw8bit")),
        )  # fmt: skip
    if question.encodes_latents and question.latent_batch > 1:
        yield Remedy(
            "latents", {"caching.latent_batch_size": 1}, 1.0005, "one picture is encoded at a time",
            lambda asked: replace(asked, latent_batch=1),
        )  # fmt: skip
    if question.vae_tile is None:
        yield Remedy(
            "tiles", {"caching.vae_tile_size": 512}, 1.002, "the autoencoder works in tiles (its results change slightly)",
            lambda asked: replace(asked, vae_tile=512, latent_batch=asked.latent_batch),
        )  # fmt: skip
    large = sum(question.model.components[name].parameters for name in question.model.text_encoders) > 10**9
    if large and question.encodes_text and question.text_encoder_quantization == "none":
        yield Remedy(
            "text", {"model.text_encoder_quantization": "fp8_scaled"}, 1.001, "the text encoders are held in 8 bits",
            lambda asked: replace(asked, text_encoder_quantization="fp8_scaled"),
        )  # fmt: skip


def _for_adapters(plan: Plan, question: MemoryQuestion) -> Iterable[Remedy]:
    if question.quantization == "none":
        for kind, slower, words in (("fp8_scaled", 1.06, "8"), ("nf4", 1.15, "4")):
            yield Remedy(
                "quantization", {"model.quantization": kind}, slower, f"the denoiser's frozen weights take {words} bits",
                lambda asked, kind=kind: replace(asked, quantization=kind),  # type: ignore[misc]
            )  # fmt: skip
    blocks = len(plan.prepared.spec.blocks(plan.prepared.model))
    if question.blocks_to_swap == 0 and not plan.prepared.config.training.compile:
        for share in (0.25, 0.5, 0.75, 0.95):
            count = min(blocks - 2, int(blocks * share))
            if count > 0:
                yield Remedy(
                    "swap", {"training.memory.blocks_to_swap": count}, 1 + 0.6 * share, f"{count} of {blocks} blocks wait on the host",
                    lambda asked, count=count: replace(asked, blocks_to_swap=count),  # type: ignore[misc]
                )  # fmt: skip


def _for_full(plan: Plan, question: MemoryQuestion) -> Iterable[Remedy]:
    config = plan.prepared.config
    if question.whole_bytes > 2:
        yield Remedy(
            "rounding", {"training.optimizer.stochastic_rounding": True}, 1.02,
            "the trained weights are held in bf16, rounded by chance", lambda asked: replace(asked, whole_bytes=2),
        )  # fmt: skip
    if not question.fused_backward and config.training.gradient_accumulation_steps == 1:
        clip = {} if config.training.max_grad_norm == 0 else {"training.clip_grad": "per_tensor"}
        yield Remedy(
            "fused", {"training.memory.fused_backward": True, **clip}, 1.01,
            "each gradient is used and freed as it comes", lambda asked: replace(asked, fused_backward=True),
        )  # fmt: skip
    if not question.optimizer_offload:
        yield Remedy(
            "states", {"training.memory.optimizer_offload": True}, 1.4, "the optimizer's states wait on the host",
            lambda asked: replace(asked, optimizer_offload=True),
        )  # fmt: skip


def toml_lines(settings: Mapping[str, Any]) -> list[str]:
    """Settings as tables of run.toml."""
    tables: dict[str, list[str]] = {}
    for dotted, value in settings.items():
        table, _, key = dotted.rpartition(".")
        text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
        tables.setdefault(table, []).append(f"{key} = {text}")
    return [line for table, lines in tables.items() for line in (f"[{table}]", *lines)]
