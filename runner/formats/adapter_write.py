"""Writes adapter files in Kohya's, LyCORIS', ComfyUI's and diffusers/peft's naming, with true alpha."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runner.formats.adapter_modules import Form, Module, file_modules
from runner.formats.adapter_names import ADAPTER_METADATA, SCALED
from runner.model.targets import Target
from runner.networks.merge import adapted, by_layer, delta, halves_swapped
from runner.networks.shapes import oft_block

Layers = Mapping[str, Mapping[str, Tensor]]
"""Full name of a layer → its adapter's tensors."""


@dataclass(frozen=True)
class Base:
    """The weights that an adapter is for: component → state dict; and every layer of the model."""

    weights: Mapping[str, Mapping[str, Tensor]]
    layers: Sequence[Target]

    def weight(self, target: Target) -> Tensor:
        """A layer's weight in fp32."""
        return self.weights[target.component][f"{target.name}.weight"].float()


def kohya_state(
    targets: Sequence[Target],
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    base: Base | None = None,
    form: Form = "kohya",
) -> dict[str, Tensor]:
    """Kohya's and LyCORIS' keys with the true alpha of each module, under names that Kohya's tools or ComfyUI know."""
    layers = by_layer(targets, state)
    found: dict[str, Tensor] = {}
    for module in file_modules(targets, form):
        if module.as_differences:
            own = {"diff": _differences(module, layers, base)}
        elif module.kind in ("lora", "dora"):
            own = _lora(module, layers)
            if module.kind == "dora":
                magnitude = _magnitude(module, layers, base, form)
                own["dora_scale"] = magnitude.reshape(-1, *[1] * (own["lora_down.weight"].dim() - 1))
        else:
            own = _loha(module, layers) if module.kind == "loha" else _lokr(module, layers)
        found |= {f"{module.name}.{name}": _cast(name, tensor, dtype) for name, tensor in own.items()}
    return found


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the file's dtype; an alpha that it rounds (bf16 makes 301 300) stays in fp32, which readers take alike."""
    cast = tensor.to(dtype)
    return tensor if name == "alpha" and float(cast) != float(tensor) else cast


def _rows(module: Module, parts: Sequence[Tensor]) -> Tensor:
    """One tensor of the members' rows; rows without an adapter are zero."""
    if module.alone:
        return parts[0]
    whole = parts[0].new_zeros(module.outputs, *parts[0].shape[1:])
    for member, part in zip(module.members, parts, strict=True):
        whole[member.rows] = part
    return halves_swapped(whole) if module.members[0].swapped else whole


def _lora(module: Module, layers: Layers) -> dict[str, Tensor]:
    """Where its layers have a first factor each, the module's rank is that of all together, and its scale 1."""
    members = module.members
    first, tensors = members[0], [layers[member.full_name] for member in members]
    ups, downs = [own["lora_B"] for own in tensors], [own["lora_A"] for own in tensors]
    if len(members) == 1 or first.tied:
        ups = [up * (member.scale / first.scale) for member, up in zip(members, ups, strict=True)]
        down, alpha = downs[0], first.alpha
    else:
        ups, alpha = _side_by_side(members, ups)
        down = torch.cat(downs)
    return {"lora_down.weight": down, "lora_up.weight": _rows(module, ups), "alpha": torch.tensor(alpha)}


def _side_by_side(members: Sequence[Target], ups: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Second factors in columns of their own with their scales in them, and the alpha that makes the whole's scale 1."""
    rank, found, column = sum(member.rank for member in members), [], 0
    for member, up in zip(members, ups, strict=True):
        whole = up.new_zeros(up.shape[0], rank)
        whole[:, column : column + member.rank] = up * member.scale
        found.append(whole)
        column += member.rank
    return found, float(rank)


def _magnitude(module: Module, layers: Layers, base: Base | None, form: Form) -> Tensor:
    """The length of each of the module's rows. ComfyUI divides by the length of the base's row where LyCORIS and peft
    divide by that of the changed one (comfy/weight_adapter/base.py): there it is the factor that gives the same weight."""
    lengths = [layers[member.full_name]["lora_magnitude_vector"].reshape(-1) for member in module.members]
    spare = torch.finfo(torch.float32).eps if form == "comfyui" else 0.0
    if form == "comfyui":
        assert base is not None
        for index, member in enumerate(module.members):
            weight = base.weight(member).flatten(1)
            plain = {name: tensor for name, tensor in layers[member.full_name].items() if "magnitude" not in name}
            changed = weight + delta(member, plain)
            lengths[index] = lengths[index] * (weight.norm(dim=1) + spare) / changed.norm(dim=1)
    found = _rows(module, lengths)
    if module.partial:
        assert base is not None
        own = {member.full_name for member in module.members}
        for layer in base.layers:
            if layer.kohya == module.members[0].kohya and layer.full_name not in own:
                found[layer.rows] = base.weight(layer).flatten(1).norm(dim=1) + spare
    return found


def _loha(module: Module, layers: Layers) -> dict[str, Tensor]:
    if module.alone:
        return {**layers[module.members[0].full_name], "alpha": torch.tensor(module.members[0].alpha)}
    tensors = [layers[member.full_name] for member in module.members]
    plain = [replace(member, alpha=float(member.rank)) for member in module.members]
    first, alpha = _side_by_side(module.members, [own["hada_w1_a"] for own in tensors])
    second, _ = _side_by_side(plain, [own["hada_w2_a"] for own in tensors])
    return {
        "hada_w1_a": _rows(module, first),
        "hada_w1_b": torch.cat([own["hada_w1_b"] for own in tensors]),
        "hada_w2_a": _rows(module, second),
        "hada_w2_b": torch.cat([own["hada_w2_b"] for own in tensors]),
        "alpha": torch.tensor(alpha),
    }


def _lokr(module: Module, layers: Layers) -> dict[str, Tensor]:
    target = module.members[0]
    found = dict(layers[target.full_name])
    if "lokr_w2" in found:  # without a low rank no reader looks at alpha
        found["lokr_w1"] = found["lokr_w1"] * target.scale
        return {**found, "alpha": torch.tensor(1.0)}
    return {**found, "alpha": torch.tensor(target.alpha)}


def _differences(module: Module, layers: Layers, base: Base | None) -> Tensor:
    assert base is not None, "differences need the weights that they are for"
    weights = [base.weight(member) for member in module.members]
    pairs = zip(module.members, weights, strict=True)
    return _rows(module, [adapted(member, layers[member.full_name], weight) - weight for member, weight in pairs])


def diffusers_state(
    targets: Sequence[Target], state: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """diffusers' and peft's keys with each scale in the second factor, so that readers need not know alpha; and the
    metadata that diffusers looks for."""
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "oft_R": "oft_R.weight"}
    layers = by_layer(targets, state)
    found: dict[str, Tensor] = {}
    for target in targets:
        for name, tensor in layers[target.full_name].items():
            if name == SCALED.get(target.adapter):
                tensor = tensor * target.scale
            found[f"{target.diffusers}.{names.get(name, name)}"] = tensor.to(dtype)
    return found, {"format": "pt", ADAPTER_METADATA: json.dumps(_adapter_metadata(targets), sort_keys=True)}


def _adapter_metadata(targets: Sequence[Target]) -> dict[str, object]:
    content: dict[str, object] = {}
    for component in dict.fromkeys(target.component for target in targets):
        own = [target for target in targets if target.component == component]
        root = own[0].diffusers.partition(".")[0]
        # Without the text encoder's outer name, which transformers 5 no longer has; peft matches by the names' ends.
        names = {target.diffusers.removeprefix(f"{root}.").removeprefix("text_model."): target for target in own}
        content |= {f"{root}.{name}": value for name, value in _settings(own[0].adapter, names).items()}
    return content


def _settings(kind: str, names: Mapping[str, Target]) -> dict[str, object]:
    """peft's configuration of one component's adapters; alpha is the rank."""
    common = {"peft_type": "LORA" if kind in ("lora", "dora") else kind.upper(), "target_modules": list(names)}
    if kind == "oft":
        size = oft_block(next(iter(names.values())))  # peft has one for all; readers see each layer's in its tensor
        return {**common, "r": 0, "oft_block_size": size, "use_cayley_neumann": False, "bias": "none"}
    rank = next(iter(names.values())).rank
    others = {name: target.rank for name, target in names.items() if target.rank != rank}
    alphas = {"alpha": rank, "alpha_pattern": others, "r": rank, "rank_pattern": others, **common}
    if kind in ("loha", "lokr"):
        return alphas
    alphas["lora_alpha"] = alphas.pop("alpha")
    return {**alphas, "bias": "none", "lora_dropout": 0.0, "use_dora": kind == "dora", "use_rslora": False}
