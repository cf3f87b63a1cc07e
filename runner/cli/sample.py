"""runner sample."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runner.cli import out
from runner.cli.applied import applied_run, stages_of
from runner.cli.common import run_file, settings_option
from runner.errors import Diagnostic, Exit, Invalid, InvalidConfig, UsageError
from runner.files import file_problem, near_name

if TYPE_CHECKING:
    from runner.config.prompts import Placed
    from runner.execute.sampling import Sampling
    from runner.families.prompts import ReadyPrompt
    from runner.plan.prepare import Prepared


LENGTHS = ("frames", "seconds", "sections")
_KEYS: tuple[tuple[str, Any], ...] = (
    ("--negative-prompt", str),
    ("--width", click.IntRange(8, 8192)),
    ("--height", click.IntRange(8, 8192)),
    ("--num-inference-steps", click.IntRange(1, 1000)),
    ("--cfg-scale", click.FloatRange(0, 100)),
    ("--sampler", str),
    ("--seed", int),
    ("--frames", click.IntRange(1)),
    ("--seconds", click.FloatRange(0, min_open=True)),
    ("--sections", click.IntRange(1)),
    ("--fps", click.FloatRange(1, 240)),
    ("--embedded-guidance", click.FloatRange(0, 100)),
    ("--guidance-rescale", click.FloatRange(0, 1)),
    ("--flow-shift", click.FloatRange(0, 100, min_open=True)),
    ("--image", str),
    ("--end-image", str),
    ("--image-mask", str),
    ("--control-image", str),
    ("--control-mask", str),
    ("--one-frame", str),
    ("--latent-paddings", str),
    ("--custom-system-prompt", str),
    ("--rope-scaling-factor", click.FloatRange(0, 4, min_open=True)),
    ("--rope-scaling-timestep-threshold", click.FloatRange(0, 1000)),
)
_WRITTEN = {
    "one_frame": " Written as in a prompt file: target_index=1,control_index=0;10,no_post.",
    "latent_paddings": " Written with commas: 3,2,1,0.",
    "control_image": " May be given again.",
    "control_mask": " May be given again.",
    "seed": " Here -1 draws one at each call.",
}
"""What the command line adds to the schema's words."""
_REPEATED = {"control_image": "control_images", "control_mask": "control_masks"}


def _key_options(command: Any) -> Any:
    """The keys of [[sampling.prompts]], for prompts that have none of their own; the schema says what each is."""
    from schemas.sampling import Prompt
    from schemas.walk import docstrings

    told = docstrings(Prompt)
    command = click.option("--bulk-decode/--no-bulk-decode", default=None, help=told["bulk_decode"])(command)
    for name, kind in reversed(_KEYS):
        key = name.removeprefix("--").replace("-", "_")
        text = told[_REPEATED.get(key, key)] + _WRITTEN.get(key, "")
        command = click.option(name, type=kind, multiple=key in _REPEATED, help=text)(command)
    return command


@click.command()
@run_file
@settings_option
@click.option(
    "--checkpoint",
    default="best",
    help="best, last, base, a step (50, 50:ema) or a file of weights.",
    show_default=True,
)
@click.option("--prompt", "texts", multiple=True, help="A prompt; options may follow in it as in a prompt file.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A .txt, .toml or .json file of prompts.")
@click.option(
    "--dialect",
    metavar="NAME",
    help="What the letters of options in a prompt mean: kohya, musubi or framepack. Unset: by family.",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[:MULTIPLIER]",
    help="An adapter file (LoRA, DoRA, LoHa, LoKr, OFT, differences; of any tool) to merge into the model; may be given again.",
)
@click.option("--include", multiple=True, help="Only layers of --lora whose name matches this regular expression.")
@click.option("--exclude", multiple=True, help="Not the layers of --lora whose name matches.")
@click.option(
    "--skip-unknown",
    is_flag=True,
    help="Leave out what of --lora the model has no place for (it is counted and named), instead of refusing the file.",
)
@click.option(
    "--save-merged",
    type=click.Path(path_type=Path),
    help="Write the whole model with checkpoint and LoRA files merged; pictures are then made only of prompts given here.",
)
@click.option("--interactive", is_flag=True, help="Read prompts line by line; leave with Ctrl+D.")
@click.option(
    "--out", "folder", type=click.Path(path_type=Path), help="Where pictures go; unset: the run's folder, samples/made."
)
@_key_options
@click.option(
    "--output-type",
    type=click.Choice(["media", "images", "latent", "both", "latent_images"]),
    default="media",
    help="media: .png and .mp4; images: a video as numbered pictures; latent: before decoding; both; latent_images.",
)
@click.option("--vae-chunk-size", type=click.IntRange(8, 1024), help="Width of the strips of convolutions over time.")
@click.option("--vae-tile-size", type=click.IntRange(64, 8192), help="Side of the tiles that are decoded, in pixels.")
@click.option("--blocks-to-swap", type=click.IntRange(0), help="Blocks of the denoiser that wait in the host's memory.")
def command(
    file: Path,
    settings: tuple[str, ...],
    checkpoint: str,
    texts: tuple[str, ...],
    prompt_file: Path | None,
    dialect: str | None,
    interactive: bool,
    folder: Path | None,
    loras: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    skip_unknown: bool,
    save_merged: Path | None,
    output_type: str,
    vae_chunk_size: int | None,
    vae_tile_size: int | None,
    blocks_to_swap: int | None,
    **defaults: Any,
) -> int:
    """Make pictures with a checkpoint of what FILE's run last applied, its --set included.

    Without prompts, those of run.toml are made: the same bytes as in training. --width and the other keys of
    [[sampling.prompts]] are for prompts that do not say them themselves.
    """
    if (include or exclude or skip_unknown) and not loras:
        raise UsageError(
            "--include, --exclude and --skip-unknown are for LoRA files, and none is given", hint="say --lora FILE"
        )
    include, exclude = _expressions("--include", include), _expressions("--exclude", exclude)
    files = [_lora_file(lora) for lora in loras]
    if save_merged is not None and save_merged.suffix != ".safetensors":
        raise UsageError(f"--save-merged {save_merged}: the file is a .safetensors file")
    if save_merged is not None and save_merged.exists():
        raise UsageError(f"{save_merged} is there already; it is not overwritten", hint="name another place")
    more = {"vae_chunk_size": vae_chunk_size, "vae_tile_size": vae_tile_size, "blocks_to_swap": blocks_to_swap}
    settings = (*settings, *(f"sampling.{name}={value}" for name, value in more.items() if value is not None))
    prepared = applied_run(file, settings, stages_of(checkpoint))
    chosen_dialect = _dialect(dialect, prepared)
    unused = [name for name, value in defaults.items() if value not in (None, ())]
    if unused and not texts and prompt_file is None and not interactive:
        option = "--" + unused[0].replace("_", "-")
        raise UsageError(
            f"{option} is for prompts that are given here, and none is",
            hint="say --prompt, --prompt-file or --interactive; those of run.toml are made as they stand there",
        )
    prompts = _prompts(prepared, texts, prompt_file, chosen_dialect, defaults)
    if save_merged is not None and not texts and prompt_file is None:
        prompts = []
    if not prompts and not interactive and save_merged is None:
        raise UsageError(
            "there is nothing to make: run.toml has no prompts", hint="say --prompt, --prompt-file or --interactive"
        )
    from runner.core.process import prepare_environment

    prepare_environment(prepared.config.run.deterministic)
    from runner.execute.sampling import LoraFile, Sampling
    from runner.store.lock import in_use

    target = folder or prepared.output_dir / "samples" / "made"
    loaded = [
        LoraFile(file=file, multiplier=factor, include=include, exclude=exclude, skip_unknown=skip_unknown)
        for file, factor in files
    ]
    with in_use(prepared.store, "runner sample"):
        sampling = Sampling(prepared, checkpoint, keep_loaded=interactive, loras=loaded, output=output_type)
        for note in sampling.notes:
            out.say(f"note: {note}")
        if save_merged is not None:
            sampling.save_merged(save_merged)
            out.data(str(save_merged))
        for path in sampling.make(prompts, target):
            out.data(str(path))
        if interactive:
            _interact(sampling, prepared, chosen_dialect, defaults, target)
    return Exit.DONE


def _expressions(option: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    from runner.patterns import pattern_problem

    for pattern in patterns:
        problem = pattern_problem(pattern)
        if problem is not None:
            raise UsageError(f"{option} {pattern!r} is no regular expression: {problem}")
    return patterns


def _lora_file(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:MULTIPLIER`."""
    from runner.plan.adapter_inputs import file_and_multiplier

    file, multiplier = file_and_multiplier(text, Path())
    problem = file_problem(file)
    if problem is not None:
        hint = near_name(file) or "--lora names a .safetensors file, or one and a factor: FILE:0.8"
        raise Invalid(problem, hint=hint)
    if not math.isfinite(multiplier):
        raise UsageError(f"--lora {text}: the multiplier must be a finite number")
    return file, multiplier


def _dialect(given: str | None, prepared: Prepared) -> str:
    from runner.config.prompt_options import DIALECTS

    dialect = given or prepared.config.sampling.dialect or prepared.spec.defaults.dialect
    if dialect not in DIALECTS:
        raise UsageError(f"there is no dialect {dialect!r}", hint=f"dialects are {', '.join(DIALECTS)}")
    return dialect


def _prompts(
    prepared: Prepared, texts: tuple[str, ...], prompt_file: Path | None, dialect: str, defaults: dict[str, Any]
) -> list[ReadyPrompt]:
    from runner.config.prompts import placed_line, placed_prompts

    found = [placed_line(text, dialect, "--prompt", 1) for text in texts]
    if prompt_file is not None:
        found += placed_prompts(prompt_file, dialect)
    if not found:
        return [_seeded(prompt) for prompt in prepared.prompts]
    return _ready(prepared, found, defaults, dialect)


def _ready(prepared: Prepared, placed: list[Placed], defaults: dict[str, Any], dialect: str) -> list[ReadyPrompt]:
    """Fills in what a prompt leaves open: from the command line, then [sampling], then the family."""
    from runner.config.prompt_options import PURE_NOISE_SAMPLERS, pure_noise_problem, sampler_name
    from runner.config.prompts import located
    from runner.families.prompts import PromptProblem, Readying, pure_noise, sampler_problem
    from runner.plan.prompts import prompt_file

    why_pure = pure_noise(prepared.config, prepared.model)
    if defaults.get("sampler"):
        try:
            defaults = {**defaults, "sampler": sampler_name(defaults["sampler"])}
        except ValueError as error:
            raise UsageError(str(error)) from None
        if defaults["sampler"] not in prepared.spec.samplers:
            message, hint = sampler_problem(defaults["sampler"], prepared.spec)
            raise UsageError(message, hint=hint)
        if why_pure is not None and defaults["sampler"] not in PURE_NOISE_SAMPLERS:
            message, hint = pure_noise_problem(defaults["sampler"], why_pure)
            raise UsageError(message, hint=hint)
    given = _given(defaults)
    seed = given.pop("seed", None)
    found = [located(prompt, Path.cwd()) for prompt, _ in placed]
    if seed is not None:
        found = [prompt if prompt.seed is not None else prompt.model_copy(update={"seed": seed}) for prompt in found]
    kept = prepared.config.sampling
    if any(name in given for name in LENGTHS):
        kept = kept.model_copy(update=dict.fromkeys(LENGTHS))
    sampling = located(kept.model_copy(update=given), Path.cwd(), set(given))
    readying = Readying(
        sampling=sampling,
        spec=prepared.spec,
        model=prepared.model,
        seed=prepared.config.run.seed,
        drawn={},
        files=partial(prompt_file, prepared.store, prepared.folder),
        dialect=dialect,
        pure_noise=why_pure,
    )
    ready, wrong = [], []
    for index, prompt in enumerate(found):
        try:
            ready.append(readying.ready(index, prompt))
        except PromptProblem as problem:
            places = placed[index].places
            where = places.get(problem.key, () if problem.key in given else places[""])
            wrong.append(Diagnostic(f"prompt {index + 1}: {problem}", where, problem.hint))
    if wrong:
        raise InvalidConfig(wrong)
    for note in [*readying.notes, *(f"prompt {index + 1}: {problem}" for index, problem in readying.warnings)]:
        out.say(f"note: {note}")
    return [_seeded(prompt) for prompt in ready]


def _given(defaults: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, under the names of [sampling]'s keys. Raises `UsageError`."""
    from runner.config.prompts import one_frame_options
    from schemas.families.framepack import OneFrameInference

    given = {_REPEATED.get(name, name): value for name, value in defaults.items() if value not in (None, ())}
    try:
        if "one_frame" in given:
            given["one_frame"] = OneFrameInference.model_validate(one_frame_options(given["one_frame"]))
        if "latent_paddings" in given:
            given["latent_paddings"] = [int(part) for part in given["latent_paddings"].split(",")]
    except ValueError as error:
        raise UsageError(f"--one-frame or --latent-paddings: {error}") from None
    return given


def _seeded(prompt: ReadyPrompt) -> ReadyPrompt:
    """Draws a seed of -1."""
    import secrets

    from runner.store.run_folder import SEEDS

    return prompt if prompt.seed is not None else replace(prompt, seed=secrets.randbelow(SEEDS))


def _interact(sampling: Sampling, prepared: Prepared, dialect: str, defaults: dict[str, Any], target: Path) -> None:
    from runner.config.prompts import placed_line

    for number, line in enumerate(_lines(), 1):
        if not line.strip():
            continue
        try:
            prompt = _ready(prepared, [placed_line(line, dialect, "prompt", number)], defaults, dialect)[0]
            for path in sampling.make([replace(prompt, index=sampling.count)], target):
                out.data(str(path))
        except (InvalidConfig, Invalid, UsageError) as error:
            out.diagnostics(list(error.diagnostics))


def _lines() -> Iterator[str]:
    """Lines from the terminal with a prompt, or from a pipe."""
    while True:
        if sys.stdin.isatty():
            click.echo("prompt> ", err=True, nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        yield line
