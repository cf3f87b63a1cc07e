"""Arguments of schedules and optimizers, and keys that count steps, are checked before anything is encoded."""

from __future__ import annotations

from typing import Any

import pytest

from runner.config.load import load
from runner.errors import Invalid, InvalidConfig
from runner.plan.diff import make_plan
from tests.inprocess import applied, prepared
from tests.support import Place


def findings(place: Place, training: str, *settings: str, rest: str = "") -> list[str]:
    """All findings of a run.toml with these lines, as text."""
    text = f'schema_version = 1\n[run]\nname = "t"\n[model]\nfamily = "sd15"\ncheckpoint = "model"\n[network]\n[[dataset.sources]]\npath = "pics"\n{rest}\n[training]\n{training}\n'
    try:
        return [finding.render() for finding in prepared(place.text(text), *settings).warnings]
    except InvalidConfig as error:
        return [finding.render() for finding in error.diagnostics]


POLYNOMIAL = 'max_train_steps = 4\nlearning_rate = 1e-4\nscheduler = { type = "polynomial", args = { lr_end = 1e-4 } }'


def test_polynomial_must_fall(place: Place) -> None:
    (found,) = findings(place, POLYNOMIAL)
    assert found.startswith(
        'error: the schedule "polynomial" falls to lr_end = 0.0001, which is not below learning_rate = 0.0001\n'
    )
    assert "run.toml:14:45" in found
    assert "run.toml:13:1" in found
    assert found.endswith("lower lr_end; it is a learning rate, not a share")
    by_hand = findings(place, "max_train_steps = 4\nlearning_rate = 1e-8\nscheduler.type = 'polynomial'")
    assert "falls to lr_end = 1e-07, which is not below learning_rate = 1e-08" in by_hand[0]
    assert findings(place, POLYNOMIAL.replace("lr_end = 1e-4", "lr_end = 1e-5, power = 2")) == []


WRONG = [
    (
        "cosine_with_restarts",
        "num_cycles = [1, 2]",
        '`num_cycles` of the schedule "cosine_with_restarts" must be an integer, at least 1 and at most 1000, not [1, 2]',
    ),
    ("cosine_with_restarts", "num_cycles = 1.5", "must be an integer, at least 1 and at most 1000, not 1.5"),
    ("cosine_with_restarts", "num_cycles = 0", "must be an integer, at least 1 and at most 1000, not 0"),
    ("cosine", "num_cycles = -0.5", "must be a number, above 0 and at most 1000, not -0.5"),
    ("polynomial", "power = [2.0]", "must be a number, above 0 and at most 100, not [2.0]"),
    ("polynomial", "lr_end = -1.0", "must be a number, at least 0, not -1.0"),
    ("warmup_stable_decay", "decay_ratio = 1.5", "must be a number, above 0 and at most 1, not 1.5"),
    ("warmup_stable_decay", "min_lr_ratio = 2", "must be a number, at least 0 and at most 1, not 2"),
    ("piecewise", "boundaries = [2, 1], factors = [1, 1, 1]", "`boundaries` must be whole numbers of steps, ascending"),
    ("piecewise", "boundaries = [2, 2], factors = [1, 1, 1]", "`boundaries` must be whole numbers of steps, ascending"),
    (
        "piecewise",
        "boundaries = [0], factors = [1, 1]",
        "`number 1` of the list `boundaries` must be an integer, at least 1, not 0",
    ),
    (
        "piecewise",
        "boundaries = [2], factors = [1, -1]",
        "`number 2` of the list `factors` must be a number, at least 0, not -1",
    ),
    ("piecewise", "boundaries = 2, factors = [1, 1]", "needs `boundaries` and one more of `factors`"),
]


@pytest.mark.parametrize(("kind", "args", "message"), WRONG)
def test_arguments_of_schedules_have_types_and_ranges(place: Place, kind: str, args: str, message: str) -> None:
    found = findings(place, f'max_train_steps = 4\nscheduler = {{ type = "{kind}", args = {{ {args} }} }}')
    assert len(found) == 1
    assert message in found[0]
    assert "run.toml:13:" in found[0]


def test_a_setting_is_checked_like_the_file(place: Place) -> None:
    found = findings(
        place, "max_train_steps = 4", "training.scheduler.type=polynomial", "training.scheduler.args.lr_end=[1]"
    )
    assert len(found) == 1
    assert "--set training.scheduler.args.lr_end=[1]" in found[0]


OPTIMIZERS: list[tuple[str, str]] = [
    ('type = "prodigy", args = { d0 = 0.0 }', "`d0` of the optimizer must be a number, above 0, not 0.0"),
    ('type = "adafactor", args = { decay_rate = 0.8 }', "must be a number, at least -1 and below 0, not 0.8"),
    ('type = "adafactor", args = { beta1 = true }', "must be a number, at least 0 and below 1, not True"),
    ('type = "muon", args = { ns_steps = 0 }', "must be an integer, at least 1 and at most 99, not 0"),
    (
        'type = "schedule_free_adamw", args = { warmup_steps = 50 }',
        "the warm-up of 50 steps is longer than the run of 4",
    ),
    (
        'type = "adafactor", args = { warmup_init = true }',
        "`warmup_init` is the warm-up of relative_step, which is off",
    ),
]


@pytest.mark.parametrize(("optimizer", "message"), OPTIMIZERS)
def test_arguments_of_optimizers_have_ranges(place: Place, optimizer: str, message: str) -> None:
    found = findings(place, f"max_train_steps = 4\nlearning_rate = 1\noptimizer = {{ {optimizer} }}")
    assert len(found) == 1
    assert message in found[0]


RELATIVE = 'optimizer = { type = "adafactor", args = { relative_step = true } }'
FREE = 'optimizer.type = "schedule_free_adamw"'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            f"learning_rate = 1e-4\n{RELATIVE}",
            "with relative_step adafactor finds the size of its steps itself; `learning_rate` would do nothing",
        ),
        (f"scheduler.type = 'cosine'\n{RELATIVE}", "`scheduler.type` would do nothing"),
        (f"scheduler.warmup_steps = 2\n{RELATIVE}", "`scheduler.warmup_steps` would do nothing"),
        (f"components.denoiser = 1e-5\n{RELATIVE}", "`components.denoiser` would do nothing"),
        (
            f"scheduler.type = 'cosine'\n{FREE}",
            "schedule_free_adamw averages its weights in place of a schedule; `scheduler.type` would bend the average",
        ),
        (f"scheduler.warmup_ratio = 0.5\n{FREE}", "`scheduler.warmup_ratio` would bend the average"),
        (
            "scheduler.type = 'linear'\noptimizer.type = 'schedulefree.SGDScheduleFree'",
            "`scheduler.type` would bend the average",
        ),
        (
            f"memory.optimizer_offload = true\n{FREE}",
            "changes between two sets of weights and cannot work tensor by tensor, as optimizer_offload would have it",
        ),
        (
            "memory.optimizer_offload = true\noptimizer.type = 'prodigy'\nlearning_rate = 1",
            "finds one learning rate from all tensors together and cannot work tensor by tensor",
        ),
    ],
)
def test_what_an_optimizer_would_not_look_at_is_refused(place: Place, lines: str, message: str) -> None:
    found = findings(place, f"max_train_steps = 4\n{lines}")
    assert len(found) == 1, found
    assert found[0].startswith("error: ")
    assert message in found[0]
    assert "run.toml:13:" in found[0]
    assert "run.toml:14:" in found[0]


def test_what_is_not_given_is_not_refused(place: Place) -> None:
    for lines in (RELATIVE, FREE, f"scheduler.type = 'constant'\n{FREE}", f"scheduler.warmup_steps = 0\n{RELATIVE}"):
        assert findings(place, f"max_train_steps = 4\n{lines}") == []


def test_a_rate_that_multiplies_is_near_one(place: Place) -> None:
    (found,) = findings(place, "max_train_steps = 4\nlearning_rate = 1e-4\noptimizer.type = 'prodigy'")
    assert found.startswith(
        "warning: prodigy finds the learning rate itself and multiplies it by learning_rate = 0.0001"
    )


# --- steps that follow from epochs --------------------------------------------------------------------------------------

EPOCHS = "max_train_epochs = 2\ngradient_accumulation_steps = 5"  # ten pictures: two steps an epoch, four in all


def test_the_warm_up_is_held_against_the_steps_of_the_epochs(place: Place) -> None:
    (found,) = findings(place, f"{EPOCHS}\nscheduler.warmup_steps = 500")
    assert found.startswith("error: the warm-up of 500 steps is longer than the run of 4 (2 epochs of 2)\n")
    assert "run.toml:14:" in found
    assert "run.toml:12:1" in found
    (found,) = findings(
        place, "max_train_epochs = 2\ngradient_accumulation_steps = 5", "training.scheduler.warmup_steps=500"
    )
    assert "--set training.scheduler.warmup_steps=500" in found
    assert findings(place, f"{EPOCHS}\nscheduler.warmup_steps = 4") == []
    assert findings(place, f"{EPOCHS}\nscheduler.warmup_ratio = 0.9") == []
    free = "optimizer = { type = 'schedule_free_adamw', args = { warmup_steps = 5 } }"
    assert "the warm-up of 5 steps is longer" in findings(place, f"{EPOCHS}\n{free}")[0]


NEVER = [
    (
        "checkpoints.every_n_steps = 5",
        "`every_n_steps` comes to 5 steps, and the run has 4 (2 epochs of 2): there will be one checkpoint, the last",
    ),
    (
        "checkpoints.every_n_epochs = 3",
        "`every_n_epochs` comes to 6 steps, and the run has 4 (2 epochs of 2): there will be one checkpoint, the last",
    ),
    (
        "checkpoints.state_every_n_steps = 50",
        "`state_every_n_steps` comes to 50 steps, and the run has 4 (2 epochs of 2): a kill costs all of it",
    ),
    (
        "ema.update_every = 5",
        "`update_every` comes to 5 steps, and the run has 4 (2 epochs of 2): the average never moves",
    ),
    (
        "logging.every_n_steps = 9",
        "`every_n_steps` comes to 9 steps, and the run has 4 (2 epochs of 2): the log has one line, the last",
    ),
    (
        "scheduler = { type = 'piecewise', args = { boundaries = [2, 4], factors = [1, 0.5, 0.1] } }",
        "boundary 4 of the schedule is not reached: the run has 4 (2 epochs of 2)",
    ),
]


@pytest.mark.parametrize(("line", "message"), NEVER)
def test_what_never_comes_is_said(place: Place, line: str, message: str) -> None:
    (found,) = findings(place, f"{EPOCHS}\n{line}")
    assert found.startswith(f"warning: {message}\n")
    assert "run.toml:14:" in found


def test_samples_that_never_come(place: Place) -> None:
    rest = '[sampling]\nevery_n_epochs = 3\n[[sampling.prompts]]\nprompt = "a"'
    (found,) = findings(place, EPOCHS, rest=rest)
    assert "`every_n_epochs` comes to 6 steps, and the run has 4 (2 epochs of 2): no samples are made" in found
    (found,) = findings(place, EPOCHS, "dataset.sources.0.token_warmup_step=40")
    assert (
        "`token_warmup_step` comes to 40 steps, and the run has 4 (2 epochs of 2): the last tags are never used"
        in found
    )
    assert findings(place, EPOCHS, "dataset.sources.0.token_warmup_step=0.5") == []
    assert findings(place, EPOCHS) == [], "what is not given is not spoken of"


def test_a_step_to_choose_is_one_with_a_checkpoint(place: Place) -> None:
    place.write({"selection": {"strategy": "manual", "step": 5}})
    run = prepared(place.file)
    assert [finding.message for finding in run.warnings] == ["no checkpoint is planned at step 5"]
    with pytest.raises(InvalidConfig, match="there will be no checkpoint at step 5"):
        make_plan(run)
    place.write({"selection": {"strategy": "manual", "step": 4}})
    applied(place.file)
    place.write({"selection": {"strategy": "manual", "step": 4}, "training": {"checkpoints": {"every_n_steps": 3}}})
    assert make_plan(prepared(place.file)), "what is there can be chosen, whatever is planned now"
    place.write({"selection": {"strategy": "manual", "step": 3}, "training": {"checkpoints": {"every_n_steps": 3}}})
    with pytest.raises(InvalidConfig, match="there is no checkpoint at step 3"):
        make_plan(prepared(place.file))


def test_what_a_class_refuses_is_known_before_anything_is_encoded(place: Place) -> None:
    """A value that only the class itself can judge."""
    changes: dict[str, Any] = {"optimizer": {"type": "torch.optim.NAdam", "args": {"momentum_decay": -1.0}}}
    place.write({"training": changes})
    assert not load(place.file).errors
    with pytest.raises(Invalid, match=r"refuses its arguments: Invalid momentum_decay value: -1\.0"):
        applied(place.file, until="train")
    assert not list((place.folder / ".runner").rglob("items/latents/*"))
