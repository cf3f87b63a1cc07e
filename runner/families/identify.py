"""What a weights file is, from its key names and shapes alone: each family knows its own files and those of its relatives;
torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runner.families.registry import family_spec
from runner.formats.adapter_names import is_adapter_file
from runner.model.layers import Shape
from runner.registry import FAMILIES, installed


@dataclass(frozen=True)
class Kind:
    """A kind of file in words, and the family that trains it, where there is one."""

    words: str
    family: str | None = None


@dataclass(frozen=True)
class FileNames:
    """The keys of a file, with dtypes and shapes."""

    tensors: Mapping[str, tuple[str, Shape]]

    def has(self, *parts: str) -> bool:
        """Whether any of the parts is in any key."""
        return any(part in key for key in self.tensors for part in parts)

    def shape(self, *endings: str, without: str = "\0") -> Shape:
        """Of the first tensor whose key ends so; () where there is none."""
        found = (shape for key, (_, shape) in self.tensors.items() if key.endswith(endings) and without not in key)
        return next(found, ())


def identify(tensors: Mapping[str, tuple[str, Shape]]) -> Kind | None:
    """The kind of a file; None where it is unknown. Families of other packages are asked first: they know the built-in
    ones, which do not know them."""
    file = FileNames(tensors)
    if is_adapter_file(list(tensors)) or file.has(".oft_diag"):
        return Kind("a LoRA file, not a checkpoint")
    if file.has("control_model.", "controlnet_cond_embedding"):
        return Kind("a ControlNet")
    for name in sorted(installed(), key=lambda name: name in FAMILIES):
        recognise = family_spec(name).recognise
        kind = recognise(file) if recognise is not None else None
        if kind is not None:
            return kind
    return _part(file)


def _part(file: FileNames) -> Kind | None:
    """A part of some model, which is none itself."""
    if file.has("mlp.gate_proj."):
        return Kind("a LLaMA text encoder only")
    if file.has("vision_model.", "embeddings.patch_embedding."):
        return Kind("an image encoder only")
    if file.has("conv1.conv.weight"):
        return Kind("a video autoencoder only")
    if file.has("encoder.down"):
        return Kind("an autoencoder only")
    if file.has("text_model.", "token_embedding", "SelfAttention"):
        return Kind("a text encoder only")
    return None
