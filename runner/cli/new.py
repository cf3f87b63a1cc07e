"""runner new: from a model and a folder of pictures to a short run.toml."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from runner.cli import out
from runner.cli.common import settings_option
from runner.errors import UsageError


@click.command()
@click.option("--model", required=True, help="A checkpoint: a .safetensors or .ckpt file, or a diffusers directory.")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="A folder of pictures (with captions).")
@click.option("--memory", metavar="SIZE", help="The GPU's memory, e.g. 12GB: settings that fit into it are chosen.")
@click.option("--method", type=click.Choice(("lora", "full")), help="An adapter, or the whole denoiser.")
@click.option("--class-tokens", help="Caption of pictures that have no caption file.")
@click.option("--name", help="Name of the run; else the folder's.")
@click.option("--out", "target", type=click.Path(path_type=Path), default=Path("run.toml"), help="The file to write.")
@settings_option
def command(
    model: str, images: Path, memory: str | None, method: str | None, class_tokens: str | None, name: str | None,
    target: Path, settings: tuple[str, ...],
) -> None:  # fmt: skip
    """Write a short run.toml for MODEL and IMAGES; ask at most two questions on a terminal, and none elsewhere."""
    from runner.plan.fit import parse_memory
    from runner.plan.propose import Wishes, propose, uncaptioned

    if target.exists():
        raise UsageError(f"{target} is there and is not overwritten", hint="name another file with --out")
    limit = None if memory is None else parse_memory(memory)
    if memory is not None and limit is None:
        raise UsageError(f"--memory {memory}: write it as 12GB", hint="sizes are in MB, GB, MiB or GiB")
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    if method is None:
        method = "lora"
        if asks:
            method = click.prompt("Train an adapter (lora) or the whole model (full)?", default="lora", type=click.Choice(("lora", "full")), err=True)  # fmt: skip
    without = uncaptioned(images)
    if without and class_tokens is None and asks:
        class_tokens = click.prompt(f"{without} pictures have no caption. Their caption?", default="", err=True) or None
    proposal = propose(Wishes(model, images, method, class_tokens, name, limit, settings), target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(proposal.text, encoding="utf-8")
    for note in proposal.notes:
        out.say(note)
    out.data(str(target))
