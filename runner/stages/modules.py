"""The modules that train, as training, sampling and scoring all build them: the same calls, so the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from runner.core.swap import BlockSwap
from runner.errors import RunFailed
from runner.formats.adapter_read import read_adapters
from runner.inputs.train import TrainInputs
from runner.model.model import Model
from runner.networks.attach import Dropouts, attach
from runner.seeding import derive
from runner.stages.context import Context


@dataclass
class Trained:
    """Component → module, for the denoisers and the text encoders that train; and what trains, by name."""

    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    swap: BlockSwap | None = None

    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Puts a checkpoint's tensors in place. Raises `RunFailed` where the names are not these."""
        if set(weights) != set(self.parameters):
            differing = sorted(set(weights) ^ set(self.parameters))
            raise RunFailed(f"the checkpoint is not one of this run: {len(differing)} tensors differ ({differing[0]})")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])


def learning_rates(inputs: TrainInputs, model: Model) -> dict[str, float]:
    """Component → learning rate, for those that train."""
    rates = model.rates(inputs.components.rates)
    return {name: inputs.learning_rate if value is True else float(value) for name, value in rates.items()}


def build(context: Context, inputs: TrainInputs, init_from: Path | None, plain: bool = False) -> Trained:
    """Loads the denoisers and the text encoders that train, with fresh adapters where adapters train. `plain`: nothing is
    quantized, for files that hold the whole model."""
    model = context.runtime.model
    trains = learning_rates(inputs, model)
    whole = inputs.targets is None
    dtype = torch.bfloat16 if inputs.optimizer.stochastic_rounding else torch.float32
    modules: dict[str, nn.Module] = {}
    for component in dict.fromkeys((*model.denoising, *trains)):
        is_whole = whole and component in trains
        seed = derive(inputs.seed, "from_scratch") if inputs.from_scratch and component in trains else None
        modules[component] = context.load(component, whole=dtype if is_whole else None, scratch_seed=seed, plain=plain)
    context.free()  # what packing quantized weights has left
    if inputs.targets is not None:
        adapter = inputs.adapter
        assert adapter is not None
        dropouts = Dropouts(adapter.dropout, adapter.rank_dropout, adapter.module_dropout)
        parameters = attach(modules, inputs.targets, dropouts, adapter.decompose_factor, inputs.seed)
        if init_from is not None:
            start = read_adapters(init_from, inputs.targets, adapter.decompose_factor)
            with torch.no_grad():
                for name, tensor in start.items():
                    parameters[name].copy_(tensor)
    else:
        parameters = {
            f"{component}.{name}": parameter
            for component in trains
            for name, parameter in modules[component].named_parameters()
        }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for module in modules.values():
        module.eval()  # adapters come in training mode, with their dropout on
    return Trained(modules, parameters)


def build_swapped(context: Context, inputs: TrainInputs) -> Trained:
    """The same for training, sampling and scoring: with blocks that wait on the host where the run says so."""
    trained = build(context, inputs, context.runtime.init_from)
    swap_blocks(context, trained, context.runtime.blocks_to_swap)
    return trained


def swap_blocks(context: Context, trained: Trained, swapped: int) -> None:
    """Has so many of the denoiser's blocks wait on the host; of several denoisers one has room, as they take turns."""
    if swapped:
        total, largest = context.family.spec.count_blocks(context.runtime.model)
        trained.swap = BlockSwap(denoising_blocks(context, trained), total - largest + swapped, context.device)
        context.free()


def denoising_blocks(context: Context, trained: Trained) -> list[nn.Module]:
    """The denoisers' repeated blocks, one denoiser after the other."""
    spec, model = context.family.spec, context.runtime.model
    return [trained.modules[own].get_submodule(name) for own in model.denoising for name in spec.blocks(model, own)]
