"""Writes adapter files in Kohya's, LyCORIS' and diffusers/peft's naming, with true alpha."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from runner.families.spec import Target
from runner.formats.adapter_names import ADAPTER_METADATA, lycoris_name
from runner.networks.merge import adapted, by_layer, halves_swapped


def kohya_state(
    targets: Sequence[Target], state: Mapping[str, Tensor], dtype: torch.dtype,
    base: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Kohya's and LyCORIS' keys with the true alpha of each layer. OFT becomes the differences of the weights, which
    need those of `base`: no program reads rotations of the input."""
    layers = by_layer(targets, state)
    found: dict[str, Tensor] = {}
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.kohya if target.adapter in ("lora", "dora") else target.full_name, []).append(target)
    for group in groups.values():
        first = group[0]
        if first.adapter in ("lora", "dora"):
            own = _fused(sorted(group, key=lambda target: target.part), layers)
            module = first.kohya
        else:
            own, module = _lycoris(first, layers[first.full_name], base), first.kohya
            if first.part[1] > 1 or first.swapped:
                module = lycoris_name(first)
        found |= {f"{module}.{name}": tensor.to(dtype) for name, tensor in own.items()}
    return found


def _fused(group: Sequence[Target], layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One module of Kohya's: a layer, or q, k and v as one. With a first factor each, its rank is that of all together."""
    first = group[0]
    ups = [layers[target.full_name]["lora_B"] for target in group]
    downs = [layers[target.full_name]["lora_A"] for target in group]
    alpha = first.alpha
    if len(group) == 1 and first.part[1] > 1:  # the others have no adapter: their rows are zero
        down, up = downs[0], ups[0].new_zeros(first.module_outputs, *ups[0].shape[1:])
        up[first.rows] = ups[0]
    elif first.tied or len(group) == 1:
        down, up = downs[0], torch.cat(ups)
    else:
        down, up, alpha = _block_diagonal(group, downs, ups)
    found = {"lora_down.weight": down, "lora_up.weight": halves_swapped(up) if first.swapped else up}
    found["alpha"] = torch.tensor(alpha)
    if first.adapter == "dora":
        magnitude = torch.cat([layers[target.full_name]["lora_magnitude_vector"].reshape(-1) for target in group])
        magnitude = halves_swapped(magnitude) if first.swapped else magnitude
        found["dora_scale"] = magnitude.reshape(-1, *[1] * (down.dim() - 1))
    return found


def _block_diagonal(group: Sequence[Target], downs: list[Tensor], ups: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Parts with ranks and scales of their own as one adapter whose scale is 1."""
    rank = sum(target.rank for target in group)
    up = torch.zeros(group[0].module_outputs, rank)
    column = 0
    for target, own in zip(group, ups, strict=True):
        up[target.rows, column : column + target.rank] = own.cpu() * target.scale
        column += target.rank
    return torch.cat([down.cpu() for down in downs]), up, float(rank)


def _lycoris(
    target: Target, tensors: Mapping[str, Tensor], base: Mapping[str, Mapping[str, Tensor]] | None
) -> dict[str, Tensor]:
    if target.adapter == "oft":
        assert base is not None, "the differences of OFT need the weights that it is for"
        weight = base[target.component][f"{target.name}.weight"].float()
        return {"diff": adapted(target, tensors, weight) - weight}
    found = dict(tensors)
    if "lokr_w2" in found:  # without a low rank no reader looks at alpha
        found["lokr_w1"] = found["lokr_w1"] * target.scale
        return {**found, "alpha": torch.tensor(1.0)}
    return {**found, "alpha": torch.tensor(target.alpha)}


def diffusers_state(
    targets: Sequence[Target], state: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """diffusers' and peft's keys, and the metadata without which a reader would take alpha = rank."""
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "oft_R": "oft_R.weight"}
    layers = by_layer(targets, state)
    found = {
        f"{target.diffusers}.{names.get(name, name)}": tensor.to(dtype)
        for target in targets
        for name, tensor in layers[target.full_name].items()
    }
    return found, {"format": "pt", ADAPTER_METADATA: json.dumps(_adapter_metadata(targets), sort_keys=True)}


def _adapter_metadata(targets: Sequence[Target]) -> dict[str, object]:
    content: dict[str, object] = {}
    for component in dict.fromkeys(target.component for target in targets):
        own = [target for target in targets if target.component == component]
        root = own[0].diffusers.partition(".")[0]
        # Without the text encoder's outer name, which transformers 5 no longer has; peft matches by the names' ends.
        names = {target.diffusers.removeprefix(f"{root}.").removeprefix("text_model."): target for target in own}
        rank, alpha = own[0].rank, own[0].alpha
        kind = own[0].adapter
        content |= {
            f"{root}.r": rank,
            f"{root}.lora_alpha" if kind in ("lora", "dora") else f"{root}.alpha": alpha,
            f"{root}.target_modules": list(names),
            f"{root}.rank_pattern": {name: target.rank for name, target in names.items() if target.rank != rank},
            f"{root}.alpha_pattern": {name: target.alpha for name, target in names.items() if target.alpha != alpha},
            f"{root}.peft_type": "LORA" if kind in ("lora", "dora") else kind.upper(),
        }
        if kind in ("lora", "dora"):
            content |= {
                f"{root}.bias": "none", f"{root}.lora_dropout": 0.0, f"{root}.use_dora": kind == "dora",
                f"{root}.use_rslora": False,
            }  # fmt: skip
    return content
