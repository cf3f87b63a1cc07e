"""Writes what is made from the schema: docs/run_toml.md, docs/run.schema.json and the skeletons in templates/.

python -m tools.make_docs
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from runner.cli.explain import default_text, effect_text
from runner.cli.schema import schema_text
from runner.config.schema import all_keys
from runner.families.keys import foreign_model_keys, foreign_prompt_keys, foreign_source_keys
from runner.families.registry import FAMILIES, family_spec
from schemas.walk import Key

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"lora": "a LoRA", "full": "a full fine-tune"}
LEARNING_RATES = {"lora": "1e-4", "full": "1e-5"}
"""What a skeleton starts from; a full fine-tune at the adapters' rate would wreck the model."""


SOURCE_KEYS = ("repeats", "class_tokens", "regularization", "weight")
VIDEO_SOURCE_KEYS = (
    "kind",
    "control_path",
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "max_frames",
    "source_fps",
)
VIDEO_GIVEN = {
    "model.vae": '"models/vae.safetensors"',
    "model.text_encoder_1": '"models/llama.safetensors"',
    "model.tokenizer_1": '"models/llama-tokenizer"',
    "model.text_encoder_2": '"models/clip_l.safetensors"',
    "dataset.sources.path": '"clips"',
    "dataset.sources.kind": '"video"',
}
"""Video models come in several files."""


def generated() -> dict[Path, str]:
    """File → its content."""
    files = {ROOT / "docs" / "run_toml.md": reference(), ROOT / "docs" / "run.schema.json": schema_text()}
    for family in FAMILIES:
        for method in METHODS:
            files[ROOT / "templates" / f"{family}-{method}.toml"] = skeleton(family, method)
    return files


def reference() -> str:
    """Every key of run.toml with type, default, effect and meaning."""
    lines = [
        "# run.toml, key by key",
        "",
        "Made from the schema by `python -m tools.make_docs`; the same texts as `runner explain KEY`.",
        "",
    ]
    for key in all_keys().values():
        if key.section is not None:
            lines += _section(key)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Key) -> list[str]:
    brackets = f"[[{section.dotted}]]" if section.is_array_of_tables else f"[{section.dotted}]"
    lines = [f"## {brackets}", "", section.documentation, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key in all_keys().values():
        if key.path[:-1] == section.path and key.section is None:
            cells = (
                f"`{key.path[-1]}`",
                key.type_text,
                f"`{default_text(key)}`",
                f"{key.documentation} *{effect_text(key)}*",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def skeleton(family: str, method: str) -> str:
    """A commented run.toml: what is needed is set, the rest stands there as comments with its default."""
    spec = family_spec(family)
    lines = [
        "#:schema ./run.schema.json",
        f"# {METHODS[method][0].upper()}{METHODS[method][1:]} of {spec.title}. Lines that begin with `# ` and a key show defaults.",
        "schema_version = 1",
    ]
    given = {
        "run.name": '"my-run"',
        "model.family": f'"{family}"',
        "model.checkpoint": '"models/model.safetensors"',
        "dataset.sources.path": '"images"',
        "training.max_train_steps": "1000",
        "training.learning_rate": LEARNING_RATES[method],
    }
    given |= VIDEO_GIVEN if spec.clips is not None else {}
    given |= (
        {"model.image_encoder": '"models/image_encoder.safetensors"', "dataset.sources.frame_extraction": '"full"'}
        if family == "framepack"
        else {}
    )
    foreign = {f"model.{key}" for key in foreign_model_keys(spec)}
    foreign |= {f"{table}.{key}" for table in ("sampling", "sampling.prompts") for key in foreign_prompt_keys(spec)}
    unused = foreign_source_keys(spec)
    if spec.clips is None:
        unused += [key for key in VIDEO_SOURCE_KEYS if key != "control_path"]
    foreign |= {f"dataset.{table}.{key}" for table in ("sources", "held_out") for key in unused}
    for section in all_keys().values():
        if section.dotted in foreign:
            continue
        if section.section is None or (section.dotted == "network" and method == "full"):
            continue
        required = section.dotted in ("run", "model", "network", "dataset", "dataset.sources", "training")
        brackets = f"[[{section.dotted}]]" if section.is_array_of_tables else f"[{section.dotted}]"
        lines += ["", *textwrap.wrap(section.documentation, 110, initial_indent="# ", subsequent_indent="# ")]
        lines.append(brackets if required else f"# {brackets}")
        for key in all_keys().values():
            if key.path[:-1] != section.path or key.section is not None or key.dotted in {*spec.refused_keys, *foreign}:
                continue
            first = key.documentation.split(". ")[0].rstrip(".")
            if key.dotted in given:
                lines.append(f"{key.path[-1]} = {given[key.dotted]}")
            elif section.dotted != "dataset.sources" or key.path[-1] in (*SOURCE_KEYS, *VIDEO_SOURCE_KEYS):
                lines.append(f"# {key.path[-1]} = {_shown(key)}  # {first}")
    return "\n".join(lines) + "\n"


def _shown(key: Key) -> str:
    return "…" if key.default is None else json.dumps(key.default, ensure_ascii=False)


def main() -> None:
    for file, text in generated().items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
