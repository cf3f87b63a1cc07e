"""Stable Diffusion 1.5, torch-free: what a checkpoint holds, defaults, adapter targets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from runner.errors import Invalid
from runner.families.locate import KeyPath, child_folder, locate_model, weights_in
from runner.families.sd.architecture import Layer, clip_layers, count, unet_layers, vae_layers
from runner.families.sd.keys import identify, match_component
from runner.families.sd.memory import predict_memory
from runner.families.spec import Component, Defaults, FamilySpec, Model, ModelProblem, Target
from runner.formats.headers import Header, read_header
from schemas import RunConfig
from schemas.network import Network

SHIPPED = Path(__file__).parent / "configs" / "sd15"
BUILTIN = Path(__file__).parent / "builtin"
FOLDERS = {"denoiser": "unet", "vae": "vae", "text_encoder_1": "text_encoder"}
LAYERS = {"denoiser": unet_layers, "vae": vae_layers, "text_encoder_1": clip_layers}
CHECKPOINT: KeyPath = ("model", "checkpoint")
_KEYS: dict[str, KeyPath] = {"vae": ("model", "vae"), "text_encoder_1": ("model", "text_encoder_1")}


def inspect(config: RunConfig, folder: Path) -> Model:
    """Reads headers and configurations only. Raises `ModelProblem`."""
    place = locate_model(config.model.checkpoint, folder, config.model.revision, BUILTIN, CHECKPOINT)
    trains = {
        "denoiser": bool(config.training.components.denoiser),
        "text_encoder_1": bool(config.training.components.text_encoder_1),
    }
    configs = _configs(place)
    components = {}
    for name in FOLDERS:
        given = {"vae": config.model.vae, "text_encoder_1": config.model.text_encoder_1}.get(name)
        fresh = config.model.from_scratch and trains.get(name, False)
        if given is not None:
            components[name] = _given_component(name, given, folder, configs[name])
        elif place.is_dir():
            components[name] = _folder_component(name, place / FOLDERS[name], place, configs[name], fresh)
        else:
            components[name] = _file_component(name, place, configs[name], CHECKPOINT, fresh)
    return _model(config, folder, place, components)


def _configs(place: Path) -> dict[str, Mapping[str, Any]]:
    """The architecture of each component: the directory's own, or the shipped one for a single file."""
    if not place.is_dir():
        return {name: read_json(SHIPPED / sub / "config.json") for name, sub in FOLDERS.items()}
    index = place / "model_index.json"
    if index.is_file():
        kind = str(read_json(index).get("_class_name", ""))
        if "XL" in kind or "3" in kind or "Flux" in kind or "Video" in kind:
            raise ModelProblem(CHECKPOINT, f"{place} is a {kind}, not of family sd15", "name the family that it is of")
    configs: dict[str, Mapping[str, Any]] = {}
    for name, sub in FOLDERS.items():
        file = place / sub / "config.json"
        if not file.is_file():
            raise ModelProblem(
                CHECKPOINT, f"{place} is no diffusers directory of Stable Diffusion: {sub}/config.json is missing",
                "name the folder that holds model_index.json, or a single file",
            )  # fmt: skip
        configs[name] = read_json(file)
    unet = configs["denoiser"]
    if unet.get("addition_embed_type") is not None:
        raise ModelProblem(CHECKPOINT, f"{place} is an SDXL model, not of family sd15")
    if unet.get("cross_attention_dim") == 1024:
        raise ModelProblem(CHECKPOINT, f"{place} is a Stable Diffusion 2 model, not of family sd15")
    if unet.get("in_channels") != configs["vae"].get("latent_channels"):
        raise ModelProblem(
            CHECKPOINT, f"the U-Net in {place} takes {unet.get('in_channels')} channels (an inpainting or depth model?)",
            "train on the plain text-to-image model",
        )  # fmt: skip
    return configs


def read_json(file: Path) -> dict[str, Any]:
    """A component's configuration. Raises `ModelProblem`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelProblem(CHECKPOINT, f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelProblem(CHECKPOINT, f"{file} holds no table")
    return content


@cache
def _layers(name: str, config: str) -> list[Layer]:
    return LAYERS[name](json.loads(config))


def component_layers(component: Component) -> list[Layer]:
    """The layers of a component of a model."""
    return _layers(component.name, json.dumps(component.config, sort_keys=True))


def _make_layers(name: str, config: Mapping[str, Any], key: KeyPath) -> list[Layer]:
    try:
        return _layers(name, json.dumps(config, sort_keys=True))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ModelProblem(
            key, f"the configuration of the {FOLDERS[name]} is not one of Stable Diffusion ({error})"
        ) from None


def _folder_component(name: str, sub: Path, place: Path, config: Mapping[str, Any], fresh: bool) -> Component:
    weights = weights_in(sub)
    layers = _make_layers(name, config, CHECKPOINT)
    if weights is None:
        if fresh:
            return Component(name, (), (sub / "config.json",), "none", config, count(layers))
        raise ModelProblem(
            CHECKPOINT, f"{sub} holds no weights", "expected model.safetensors or diffusion_pytorch_model.safetensors"
        )
    return _component(name, weights, (sub / "config.json", weights), config, layers, CHECKPOINT)


def _file_component(name: str, file: Path, config: Mapping[str, Any], key: KeyPath, fresh: bool) -> Component:
    layers = _make_layers(name, config, key)
    if fresh:
        return Component(name, (), (), "none", config, count(layers))
    return _component(name, file, (file,), config, layers, key)


def _given_component(name: str, given: str, folder: Path, config: Mapping[str, Any]) -> Component:
    key = _KEYS[name]
    place = locate_model(given, folder, None, BUILTIN, key)
    if not place.is_dir():
        return _file_component(name, place, config, key, False)
    sub = child_folder(place, FOLDERS[name])
    weights = weights_in(sub)
    if weights is None or not (sub / "config.json").is_file():
        raise ModelProblem(key, f"{sub} needs config.json and a weights file")
    own = read_json(sub / "config.json")
    return _component(name, weights, (sub / "config.json", weights), own, _make_layers(name, own, key), key)


def _component(
    name: str, weights: Path, files: tuple[Path, ...], config: Mapping[str, Any], layers: list[Layer], key: KeyPath
) -> Component:
    header = header_of(weights, key)
    match = match_component(name, header.tensors, layers)
    if match.problem is not None:
        kind = identify(header.tensors)
        if kind is not None:
            raise ModelProblem(key, f"{weights} is {kind}; the family is sd15", "name a Stable Diffusion 1.5 file here")
        raise ModelProblem(key, f"{weights}: the {FOLDERS[name]} is not that of Stable Diffusion 1.5: {match.problem}")
    return Component(name, (weights,), files, match.layout, config, count(layers), match.keys)


def header_of(file: Path, key: KeyPath) -> Header:
    """The file's header, its problems named at a key of run.toml."""
    try:
        return read_header(file)
    except Invalid as error:
        raise ModelProblem(key, str(error), error.diagnostics[0].hint) from None


def _model(config: RunConfig, folder: Path, place: Path, components: dict[str, Component]) -> Model:
    unet, vae, text = (components[name].config for name in ("denoiser", "vae", "text_encoder_1"))
    if unet["cross_attention_dim"] != text["hidden_size"]:
        raise ModelProblem(
            ("model", "text_encoder_1") if config.model.text_encoder_1 else CHECKPOINT,
            f"the text encoder gives {text['hidden_size']} numbers a token, the U-Net takes {unet['cross_attention_dim']}",
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    scheduler_file = (place if place.is_dir() else SHIPPED) / "scheduler" / "scheduler_config.json"
    tokenizer = _tokenizer(config, folder, place)
    return Model(
        family="sd15",
        components=components,
        tokenizer=tokenizer,
        tokenizer_files=_tokenizer_files(tokenizer),
        scheduler=read_json(scheduler_file)
        if scheduler_file.is_file()
        else read_json(SHIPPED / "scheduler" / "scheduler_config.json"),
        native_size=int(unet.get("sample_size", 64)) * factor,
        latent_factor=factor,
        latent_channels=int(vae["latent_channels"]),
        bucket_step=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        size_multiple=factor,
        text_length=int(text["max_position_embeddings"]),
        label=config.model.checkpoint if config.model.checkpoint.startswith("builtin:") else place.name,
    )


def _tokenizer(config: RunConfig, folder: Path, place: Path) -> Path | None:
    if config.model.tokenizer_1 is not None:
        key: KeyPath = ("model", "tokenizer_1")
        found = locate_model(config.model.tokenizer_1, folder, None, BUILTIN, key)
        if not found.is_dir() or not _tokenizer_files(found):
            raise ModelProblem(key, f"{found} is no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt")
        return found
    own = place / "tokenizer"
    return own if place.is_dir() and _tokenizer_files(own) else None


def _tokenizer_files(folder: Path | None) -> tuple[Path, ...]:
    """The files that decide what a tokenizer does; empty where there is none."""
    if folder is None or not folder.is_dir():
        return ()
    names = (
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )
    found = tuple(folder / name for name in names if (folder / name).is_file())
    given = {file.name for file in found}
    return found if "tokenizer.json" in given or {"vocab.json", "merges.txt"} <= given else ()


# --- adapter targets --------------------------------------------------------------------------------------------------

_IN_TRANSFORMER = re.compile(r"\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.)")
_ATTENTION = re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$")
_KOHYA_CONVOLUTIONAL = re.compile(r"\.(resnets|downsamplers|upsamplers)\.")
_CLIP_TARGETS = re.compile(r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$")
PRESETS = ("default", "attention")
_KOHYA_PREFIXES = {"denoiser": "lora_unet_", "text_encoder_1": "lora_te_text_model_"}
_DIFFUSERS_PREFIXES = {"denoiser": "unet.", "text_encoder_1": "text_encoder.text_model."}


def targets(config: RunConfig, model: Model) -> list[Target]:
    """The layers that get adapters: Kohya's default set, a preset, or those whose names match. Raises `ModelProblem`."""
    network = config.network
    if network is None:
        return []
    found: list[Target] = []
    if config.training.components.denoiser:
        layers = [layer for layer in component_layers(model.components["denoiser"]) if layer.kind in ("linear", "conv")]
        chosen = _chosen(layers, network)
        found += [_adapted("denoiser", layer, network) for layer in chosen]
    if config.training.components.text_encoder_1:
        layers = component_layers(model.components["text_encoder_1"])
        found += [_adapted("text_encoder_1", layer, network) for layer in layers if _CLIP_TARGETS.search(layer.name)]
    for name, patterns in (("rank_pattern", network.rank_pattern), ("alpha_pattern", network.alpha_pattern)):
        for pattern in patterns:
            if not any(re.search(pattern, target.name) for target in found):
                raise ModelProblem(
                    ("network", name, pattern), f"{pattern!r} matches none of the {len(found)} layers with adapters"
                )
    return found


def layers(model: Model) -> list[Target]:
    """Every layer that an adapter of a file may be for."""
    denoiser = (layer for layer in component_layers(model.components["denoiser"]) if layer.kind in ("linear", "conv"))
    text = (layer for layer in component_layers(model.components["text_encoder_1"]) if _CLIP_TARGETS.search(layer.name))
    return [_target("denoiser", layer, 1, 1.0) for layer in denoiser] + [
        _target("text_encoder_1", layer, 1, 1.0) for layer in text
    ]


def _chosen(layers: list[Layer], network: Network) -> list[Layer]:
    if isinstance(network.targets, list):
        chosen = [layer for layer in layers if any(re.search(pattern, layer.name) for pattern in network.targets)]
        for index, pattern in enumerate(network.targets):
            if not any(re.search(pattern, layer.name) for layer in layers):
                raise ModelProblem(
                    ("network", "targets", index), f"{pattern!r} matches no layer of the U-Net",
                    "a layer's name looks like down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
                )  # fmt: skip
    elif network.targets == "default":
        chosen = [layer for layer in layers if _IN_TRANSFORMER.search(layer.name)]
    elif network.targets == "attention":
        chosen = [layer for layer in layers if _ATTENTION.search(layer.name)]
    else:
        raise ModelProblem(
            ("network", "targets"), f'there is no preset "{network.targets}"',
            f"presets are {', '.join(PRESETS)}; regular expressions stand in a list",
        )  # fmt: skip
    if network.conv_rank is not None:
        named = {layer.name for layer in chosen}
        chosen = [layer for layer in layers if layer.name in named or _KOHYA_CONVOLUTIONAL.search(layer.name)]
    if not chosen:
        raise ModelProblem(("network", "targets"), "no layer is left to train")
    return chosen


def _adapted(component: str, layer: Layer, network: Network) -> Target:
    def matching(patterns: Mapping[str, Any]) -> Any:
        return next((value for pattern, value in patterns.items() if re.search(pattern, layer.name)), None)

    convolutional = layer.kernel > 1
    rank = matching(network.rank_pattern)
    if rank is None:
        rank = network.conv_rank if convolutional and network.conv_rank is not None else network.rank
    alpha = matching(network.alpha_pattern)
    if alpha is None:
        alpha = network.conv_alpha if convolutional and network.conv_rank is not None else network.alpha
    return _target(component, layer, rank, float(rank if alpha is None else alpha))


def _target(component: str, layer: Layer, rank: int, alpha: float) -> Target:
    kind: Literal["conv", "linear"] = "conv" if layer.kind == "conv" else "linear"
    return Target(
        component, layer.name, kind, layer.inputs, layer.outputs, layer.kernel, rank, alpha,
        _KOHYA_PREFIXES[component] + layer.name.replace(".", "_"), _DIFFUSERS_PREFIXES[component] + layer.name,
    )  # fmt: skip


SD15 = FamilySpec(
    name="sd15",
    title="Stable Diffusion 1.5",
    defaults=Defaults(dtype="bf16", num_inference_steps=30, cfg_scale=7.5, sampler="ddim", dialect="kohya"),
    inspect=inspect,
    targets=targets,
    layers=layers,
    memory=predict_memory,
)
