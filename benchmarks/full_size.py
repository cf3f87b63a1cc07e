"""Runs of full size without their weights: a run.toml on files of the real keys and shapes, planned as any run is, and what
its stages are given, up to the first step. Tensors come from what is there: within `pretended` they hold no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tomlkit

from tests.stand_in import write_flux, write_stand_in, write_video
from tests.support import draw_clip, draw_pictures, merged

TOKENS = 64
"""Tokens that are seen of a text where a mask says how many."""
POOLED = {"sdxl": 1280, "sd3": 2048, "flux1": 768, "hunyuan_video": 768, "framepack": 768}
MASKED = ("chroma", "hunyuan_video", "framepack")

BASE: dict[str, Any] = {
    "schema_version": 1,
    "run": {"name": "r"},
    "model": {"dtype": "bf16"},
    "network": {"rank": 16},
    "dataset": {"batch_size": 1, "sources": [{"path": "images"}]},
    "training": {"max_train_steps": 8, "learning_rate": 1e-4, "mixed_precision": "bf16"},
    "sampling": {"num_inference_steps": 4, "prompts": [{"prompt": "a red circle"}]},
}
VIDEO: dict[str, Any] = {
    "model": {
        "vae": "hunyuan-video-vae.safetensors",
        "text_encoder_1": "llava_llama3_fp16.safetensors",
        "tokenizer_1": "llama-tokenizer",
        "text_encoder_2": "clip_l.safetensors",
        "quantization": "fp8_scaled",
    },
    "network": {"rank": 32, "alpha": 1},
    "training": {"optimizer": {"type": "adamw8bit"}, "memory": {"gradient_checkpointing": True}},
}


def pictures(family: str, size: int, batch: int) -> dict[str, Any]:
    return {
        "model": {"family": family, "checkpoint": f"{family}.safetensors"},
        "dataset": {"resolution": size, "batch_size": batch},
        "sampling": {"width": size, "height": size},
    }


def clips(family: str, file: str, size: int, frames: int, **source: Any) -> dict[str, Any]:
    chosen = {"path": "clips", "kind": "video", **source}
    return {
        "model": {"family": family, "checkpoint": file},
        "dataset": {"resolution": [size, size], "sources": [chosen]},
        "sampling": {"width": size, "height": size, "prompts": [{"prompt": "a red circle", "frames": frames}]},
    }


def flux(file: str, number: int) -> dict[str, Any]:
    return {
        "model": {
            "checkpoint": file,
            "vae": "ae.safetensors",
            f"text_encoder_{number}": "t5xxl_fp16.safetensors",
            f"tokenizer_{number}": "t5-tokenizer",
            **({"text_encoder_1": "clip_l.safetensors"} if number > 1 else {}),
        }
    }


@dataclass(frozen=True)
class Setting:
    """A run at full size, as changes of `BASE`; how its files are written."""

    family: str
    title: str
    changes: tuple[dict[str, Any], ...]
    write: Callable[[Path], Any]


def stand_in(family: str, without: tuple[str, ...] = ()) -> Callable[[Path], Any]:
    return lambda folder: write_stand_in(folder / f"{family}.safetensors", family, without)


def _framepack(folder: Path) -> None:
    from PIL import Image

    write_video(folder, "framepack")
    Image.new("RGB", (640, 640)).save(folder / "start.png")


SETTINGS = (
    Setting("sdxl", "SDXL 1024² b1", (pictures("sdxl", 1024, 1),), stand_in("sdxl")),
    Setting("sdxl", "SDXL 1024² b4", (pictures("sdxl", 1024, 4),), stand_in("sdxl")),
    Setting("sd3", "SD3 medium 1024² b3", (pictures("sd3", 1024, 3),), stand_in("sd3", ("t5xxl",))),
    Setting("flux1", "FLUX.1 512² b1", (pictures("flux1", 512, 1), flux("flux1-dev.safetensors", 2)), write_flux),
    Setting(
        "framepack",
        "FramePack 640², window 9, b1, fp8, checkpointing",
        (
            VIDEO,
            clips("framepack", "FramePackI2V_HY_bf16.safetensors", 640, 73, frame_extraction="full"),
            {
                "model": {"variant": "i2v", "image_encoder": "sigclip_vision_patch14_384.safetensors"},
                "sampling": {"prompts": [{"prompt": "a red circle", "image": "start.png", "sections": 2}]},
            },
        ),
        _framepack,
    ),
    Setting(
        "hunyuan_video",
        "HunyuanVideo 544², 45 frames, b1, fp8, checkpointing",
        (VIDEO, clips("hunyuan_video", "hunyuan.safetensors", 544, 45, target_frames=[45], frame_extraction="head")),
        lambda folder: write_video(folder, "hunyuan_video"),
    ),
    Setting("chroma", "Chroma 512² b1", (pictures("chroma", 512, 1), flux("Chroma1-HD.safetensors", 1)), write_flux),
    Setting("sd15", "SD 1.5 512² b1", (pictures("sd15", 512, 1),), stand_in("sd15")),
)
"""Those that matter most come first. Videos are as their recipes have them; stills without checkpointing, in bf16."""


@dataclass(kw_only=True)
class Same:
    """Encodings of the right shapes for every key."""

    row: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> dict[str, Any]:
        return dict(self.row)


def planned(setting: Setting, folder: Path) -> Any:
    """The run as a plan has it; weights are read as headers alone."""
    from runner.config.load import load
    from runner.plan.compile import compile_graph
    from runner.plan.prepare import prepare
    from runner.store.store import find_store

    content = BASE
    for change in setting.changes:
        content = merged(content, change)
    setting.write(folder)
    if content["dataset"]["sources"][0]["path"] == "clips":
        frames = 73 if setting.family == "framepack" else 45
        draw_clip(folder / "clips" / "0.mp4", frames, (64, 64))
        (folder / "clips" / "0.txt").write_text("a red circle", encoding="utf-8")
    else:
        draw_pictures(folder / "images", content["dataset"]["batch_size"], size=64)
    file = folder / "run.toml"
    file.write_text(tomlkit.dumps(content), encoding="utf-8")
    return compile_graph(prepare(load(file), find_store(folder)))


def text_row(model: Any) -> dict[str, Any]:
    """The conditioning of one text."""
    import torch

    name = "text" if model.makes_video else "hidden"
    row = {name: torch.zeros(model.text_tokens, model.text_width, dtype=torch.bfloat16)}
    if model.family in MASKED:
        row["mask"] = (torch.arange(model.text_tokens) < TOKENS).float()
    if model.family in POOLED:
        row["pooled"] = torch.zeros(POOLED[model.family], dtype=torch.bfloat16)
    return row


def picture_row(model: Any, item: Any) -> dict[str, Any]:
    """The encoding of one picture or clip."""
    import torch

    frames = 1 if item.clip is None else (item.clip.length - 1) // model.frame_factor + 1
    row = {"latents": torch.zeros(model.latent_shape(item.fit.bucket, frames), dtype=torch.bfloat16)}
    if model.image_tokens:
        row["image"] = torch.zeros(729, 1152, dtype=torch.bfloat16)
    return row


@contextmanager
def without_weights() -> Iterator[None]:
    """Loading a component gives tensors of its shapes."""
    import torch

    def shapes_alone(component: Any, shapes: Mapping[str, Any], options: Any) -> dict[str, Any]:
        device = "cuda:0" if options.device.type == "cpu" else options.device
        return {name: torch.empty(shape, dtype=options.dtype, device=device) for name, shape in shapes.items()}

    def apply(module: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> torch.nn.Module:
        """Moves in the plain way: PyTorch's own swaps the insides of fake tensors, which they refuse."""
        for own in module.modules():
            for held in (own._parameters, own._buffers):
                for name, x in list(held.items()):
                    with torch.no_grad():
                        moved = None if x is None else fn(x)
                    if moved is not x and moved is not None:
                        is_weight = isinstance(x, torch.nn.Parameter)
                        held[name] = torch.nn.Parameter(moved, x.requires_grad) if is_weight else moved
        return module

    with (
        patch("runner.families.parts.load.read_component", shapes_alone),
        patch.object(torch.nn.Module, "_apply", apply),
    ):
        yield


@dataclass(kw_only=True)
class FullSize:
    """A run of full size, loaded on the pretended GPU."""

    graph: Any
    context: Any
    inputs: Any
    trained: Any
    texts: Same
    pictures: Same

    @classmethod
    def load(cls, setting: Setting, folder: Path) -> FullSize:
        import torch

        from runner.core.events import Events
        from runner.families.registry import family
        from runner.inputs.train import TrainInputs
        from runner.stages.context import Context
        from runner.stages.modules import build_swapped

        graph = planned(setting, folder)
        inputs = graph.of(TrainInputs)
        context = Context(
            family=family(setting.family),
            store=graph.prepared.store,
            runtime=graph.runtime,
            numerics=inputs.numerics,
            device=torch.device("cuda:0"),
            events=Events(folder / "events.jsonl", ()),
        )
        model = graph.runtime.model
        with without_weights():
            trained = build_swapped(context, inputs)
        return cls(
            graph=graph,
            context=context,
            inputs=inputs,
            trained=trained,
            texts=Same(row=text_row(model)),
            pictures=Same(row=picture_row(model, inputs.items[0])),
        )

    def task(self) -> Any:
        """The training task, with the loader that gives its batches."""
        from runner.stages.loader import Sources, StepLoader
        from runner.stages.task import DiffusionTask

        context, model, inputs = self.context, self.graph.runtime.model, self.inputs
        process = context.family.process(inputs.numerics)
        sources = Sources(
            latents=self.pictures,
            latent_key=lambda picture, view: picture,
            latent_shape=lambda item: model.latent_shape(item.fit.bucket, item.latent_frames(model.frame_factor)),
            texts=self.texts,
            text_key=lambda text: text,
            learned=lambda item, view, row: context.family.learned(item, view, inputs.numerics.guidance, row),
            discrete=process.prediction_type != "flow",
            shift_points=context.family.spec.shift_points,
        )
        return DiffusionTask(context, inputs, self.trained, StepLoader(inputs, sources, 0), None, None)

    def optimizer(self) -> Any:
        """As stages/train.py builds it."""
        from runner.optim.build import build_optimizer, parameter_groups
        from runner.optim.single import SingleOptions
        from runner.stages.modules import learning_rates

        inputs, runtime = self.inputs, self.graph.runtime
        groups = parameter_groups(self.trained.parameters, learning_rates(inputs, runtime.model))
        options = SingleOptions(runtime.fused_backward, runtime.optimizer_offload, False, 0.0)
        return build_optimizer(inputs.optimizer, groups, options)

    def encoded(self, prompt: Any) -> Any:
        """What encoding a prompt gives."""
        import torch

        from runner.stages.pictures import Encoded

        found = Encoded({(prompt.system_prompt, text): self.texts.get(text) for text in prompt.texts})
        if self.graph.runtime.model.image_tokens:
            start = torch.zeros(self.graph.runtime.model.latent_shape((prompt.width, prompt.height)))
            sections = range(prompt.own.sections)
            found.pictures[prompt.index] = {
                **{f"start.{number}": start for number in sections},
                **{f"image.{number}": torch.zeros(729, 1152) for number in sections},
            }
        return found

    def scorer(self) -> Any:
        from runner.inputs.select import SelectInputs
        from runner.stages.score import Scorer

        return Scorer(
            context=self.context,
            inputs=self.graph.of(SelectInputs),
            latents=_Keys(),
            stored=self.pictures,
            texts=_Keys(),
            stored_texts=self.texts,
        )


class _Keys:
    """Encoders that are asked for keys alone."""

    def key(self, *given: Any) -> str:
        return ""
