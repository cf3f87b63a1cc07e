"""The command line as people use it: verbs, exit codes, streams, and what they print."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomli

from tests.support import ROOT, Place

VERBS = (
    "apply",
    "copy",
    "diff",
    "doctor",
    "explain",
    "export",
    "fmt",
    "gc",
    "plan",
    "recipes",
    "report",
    "sample",
    "schema",
    "select",
    "status",
    "validate",
)


def test_help_lists_every_verb_and_each_has_help(place: Place) -> None:
    text = place.run("--help").ok().out
    for verb in VERBS:
        assert f"  {verb} " in text
    assert "Make pictures with a checkpoint" in place.run("sample", "--help").ok().out


def test_usage_errors_are_64(place: Place) -> None:
    for arguments, part in (
        (("aply",), "did you mean 'apply'?"),
        (("plan", "--nope"), "--nope"),
        (("plan", "--target", "trian"), "trian"),
        (("export", "run.toml"), "--format"),
    ):
        result = place.run(*arguments)
        assert result.code == 64, result.err
        assert part in result.err


def test_validate_lists_all_errors_at_once(place: Place) -> None:
    place.text(
        'schema_version = 1\n[run]\nname = "t"\n[model]\nfamily = "sd15"\nchekpoint = "model"\n[[dataset.sources]]\npath = "gone"\n[training]\nmax_train_steps = "lots"\n'
    )
    result = place.run("validate")
    assert result.code == 3
    assert result.out == ""
    heads = [line for line in result.err.splitlines() if line.startswith("error")]
    assert heads == [
        "error: [model] needs `checkpoint`",
        "error: unknown key `chekpoint` in [model]",
        'error: `training.max_train_steps` must be an integer from 1 to 10,000,000, not the text "lots"',
    ]
    record = json.loads(place.run("validate", "--json").out)
    assert record["valid"] is False
    assert {place["line"] for found in record["diagnostics"] for place in found["places"]} >= {6, 10}
    place.write()
    assert place.run("validate").code == 0


def test_data_goes_to_stdout_and_the_rest_to_stderr(finished: Place) -> None:
    result = finished.run("apply").ok()
    assert "Nothing to do" in result.err
    assert [Path(line).name for line in result.out.splitlines()] == ["strip.png", "report.html", "best.safetensors"]
    assert all(Path(line).exists() for line in result.out.splitlines())
    assert json.loads(finished.run("plan", "--json").out)["actions"][0]["stage"] == "cache.latents"
    assert "\x1b" not in finished.run("plan").out


def test_status(finished: Place) -> None:
    rows = json.loads(finished.run("status", "--json").ok().out)
    assert len(rows) == 1
    assert (rows[0]["name"], rows[0]["state"], rows[0]["step"], rows[0]["total"]) == ("t", "finished", 6, 6)
    assert int(rows[0]["chosen"]) in (2, 4, 6)
    assert "finished" in finished.run("status").ok().out


def test_recipes_are_listed_and_copied(place: Place) -> None:
    assert "quickstart" in place.run("recipes").ok().out
    target = place.folder / "mine"
    place.run("copy", "quickstart", str(target), "--set", "training.max_train_steps=7", "--set", "run.name=mine").ok()
    text = (target / "run.toml").read_text()
    assert tomli.loads(text)["training"]["max_train_steps"] == 7
    assert "# the folder's number is its repeats, as in Kohya's tools" in text
    assert len(list((target / "images").rglob("*.png"))) == 336
    place.run("validate", str(target / "run.toml")).ok()
    again = place.run("copy", "quickstart", str(target))
    assert again.code == 64
    assert "mine is not overwritten: it holds " in again.err
    assert "images, run.toml\nhint: name another folder" in again.err
    assert "did you mean" in place.run("copy", "quikstart", "x").err


@pytest.mark.slow
def test_copied_recipes_run_with_a_step(place: Place) -> None:
    target = place.folder / "mine"
    place.run(
        "copy",
        "quickstart",
        str(target),
        "--set",
        "training.max_train_steps=2",
        "--set",
        "sampling.num_inference_steps=2",
    ).ok()
    place.run("apply", str(target / "run.toml")).ok()
    assert (target / "published" / "hearts.safetensors").exists()
    assert (target / "runs" / "hearts" / "report.html").exists()


def test_explain(place: Place) -> None:
    text = place.run("explain", "training.learning_rate").ok().out
    for part in ("training.learning_rate", "1e-4", "number"):
        assert part in text
    assert "there is training.learning_rate" in place.run("explain", "training.learning_rat").err
    assert place.run("explain", "nonsense").code == 64


def test_schema_is_the_committed_one(place: Place) -> None:
    assert json.loads(place.run("schema").ok().out) == json.loads((ROOT / "docs" / "run.schema.json").read_text())
    place.run("schema", "--out", "s.json").ok()
    assert (place.folder / "s.json").read_bytes() == (ROOT / "docs" / "run.schema.json").read_bytes()


def test_doctor(place: Place) -> None:
    text = place.run("doctor").ok().out
    for part in ("python", "torch", "diffusers"):
        assert part in text.lower()


def test_fmt_keeps_comments_and_meaning(place: Place) -> None:
    before = place.file.read_text()
    place.text("# mine\n" + before.replace(" = ", "  =   "))
    place.run("fmt").ok()
    after = place.file.read_text()
    assert after.startswith("# mine\n")
    assert tomli.loads(after) == tomli.loads(before)
    place.run("fmt", "--full").ok()
    assert "cfg_scale = 7.5" in place.file.read_text()
    place.run("fmt", "--minimal").ok()
    assert "weight_decay" not in place.file.read_text()
    assert tomli.loads(place.file.read_text())["training"]["learning_rate"] == 0.001
    place.text("[run\n")
    assert place.run("fmt").code == 3
    assert place.file.read_text() == "[run\n"


def test_a_moved_project_is_still_done(finished: Place, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished.folder, tmp_path / "moved", symlinks=True)
    moved = Place(tmp_path / "moved")
    assert moved.run("plan", "--detailed-exitcode", "--target", "select").code == 0
    assert "-/+" in moved.run("plan", "--set", "training.learning_rate=5e-4").ok().out


def test_errors_of_the_environment(place: Place) -> None:
    missing = place.run("plan", "gone.toml")
    assert missing.code == 3
    assert "error: there is no file gone.toml" in missing.err
    nowhere = place.run("apply", "--set", "run.output_dir=/proc/nowhere")
    assert nowhere.code == 1
    assert "/proc/nowhere cannot be written: No such file or directory" in nowhere.err
    result = place.run("apply", "--set", "run.device=cuda:7")
    assert result.code == 3
    assert "error: run.device is cuda:7, but " in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("target", ["wheel", "editable"])
def test_shipped_files_are_found(target: str, tmp_path: Path) -> None:
    """One function finds recipes and templates in an installed wheel and in a checkout."""
    code = "from runner.shipped import shipped; print(shipped('recipes')); print(shipped('templates'))"
    if target == "wheel":
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "wheel",
                "--no-deps",
                "--no-build-isolation",
                "-q",
                "-w",
                str(tmp_path),
                str(ROOT),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        wheel = next(tmp_path.glob("*.whl"))
        names = zipfile.ZipFile(wheel).namelist()
        assert not [name for name in names if "micro-base/images" in name or ".runner" in name or "/runs/" in name]
        assert wheel.stat().st_size < 8_000_000
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
        environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin"}
        code = "import runner; assert 'site' in runner.__file__; " + code
    else:
        environment = {"PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    recipes, templates = (Path(line) for line in done.stdout.splitlines())
    assert (recipes / "quickstart" / "run.toml").is_file()
    assert (recipes / "quickstart" / "images" / "10_heart").is_dir()
    assert (templates / "report.html").is_file()
