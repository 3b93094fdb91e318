"""Rollouts and what is trained on them: exact gradients step by step, exact resume, batches that change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from test_diffusion_train import apart
from tiny_runs import Tiny, contents, lines, newest, run_jobs

from mmalign.errors import UserError

REWARD = {"terms": [{"name": "red", "function": "tiny_reward:red"}]}
ROLLOUT: dict[str, Any] = {
    "prompts": "",
    "prompts_per_round": 4,
    "per_prompt": 2,
    "kernel": "ddim",
    "steps": 3,
    "guidance_scale": 3.0,
    "batch_size": 3,
    "reward": REWARD,
}
METHODS: dict[str, dict[str, Any]] = {
    "pso": {"name": "pso", "beta": 50.0},
    "d3po": {"name": "d3po"},
    "prdp": {"name": "prdp", "beta": 0.01, "clip": 0.1},
    "ddpo": {"name": "ddpo", "clip": 0.01},
}
EVERY = pytest.mark.parametrize("method", METHODS)
LORA: dict[str, Any] = {}
FULL: dict[str, Any] = {"adapter": None}
SIGTERM, SIGKILL = 15, 9


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text(
        "".join(f"a {colour} {shape}\n" for colour in ("red", "blue") for shape in ("circle", "square", "star"))
    )
    return file


def changes(name: str, prompts: Path, **more: Any) -> dict[str, Any]:
    """A recipe's differences from that of the tiny runs."""
    rollout = {**ROLLOUT, "prompts": str(prompts), **more.pop("rollout", {})}
    loop = {"steps": 4, "batch_size": 2, **more.pop("loop", {})}
    own = {**METHODS[name], **more.pop("method", {})}
    return {"data": None, "rollout": rollout, "method": own, "loop": loop, **more}


# ------------------------------------------------------------------------------------------------ a run as a whole


@EVERY
@pytest.mark.parametrize("kind", [pytest.param(LORA, id="lora"), pytest.param(FULL, id="full")])
def test_a_run_moves_from_the_reference(
    tiny: Tiny, tmp_path: Path, prompts: Path, method: str, kind: dict[str, Any]
) -> None:
    assert tiny.train(tmp_path / "run", **changes(method, prompts, **kind)) == 0
    first, *_, last = lines(tmp_path / "run")
    assert first["reward/mean"] == pytest.approx(last["reward/mean"], abs=0.2)
    assert first["grad_norm"] > 0
    if method != "ddpo":
        assert abs(first["kl/sampled"]) < 1e-2  # drawn by the reference itself
        assert last["kl/sampled"] != 0
    if "rewards/margins_abs" in first:
        assert first["rewards/margins_abs"] < 1e-5 < last["rewards/margins_abs"]


@EVERY
def test_how_many_are_drawn_at_once_changes_nothing(tiny: Tiny, tmp_path: Path, prompts: Path, method: str) -> None:
    for size in (1, 8):
        tiny.train(tmp_path / str(size), **changes(method, prompts, rollout={"batch_size": size}, loop={"steps": 2}))
    assert apart(tmp_path / "1", tmp_path / "8") < 1e-6


@EVERY
def test_accumulated_prompts_are_a_batch_of_them(tiny: Tiny, tmp_path: Path, prompts: Path, method: str) -> None:
    tiny.train(tmp_path / "one", **changes(method, prompts, loop={"batch_size": 4, "steps": 2}))
    tiny.train(tmp_path / "four", **changes(method, prompts, loop={"batch_size": 1, "accumulation": 4, "steps": 2}))
    assert apart(tmp_path / "one", tmp_path / "four") < 1e-6


@pytest.mark.slow
@EVERY
def test_two_processes_are_one_with_twice_the_prompts(tiny: Tiny, tmp_path: Path, prompts: Path, method: str) -> None:
    alone = tiny.recipe(tmp_path / "alone", **changes(method, prompts, loop={"batch_size": 2}))
    both = tiny.recipe(tmp_path / "both", **changes(method, prompts, loop={"batch_size": 1}))
    run_jobs([{"recipe": str(alone)}], tmp_path)
    run_jobs([{"recipe": str(both)}], tmp_path, processes=2)
    assert apart(tmp_path / "alone", tmp_path / "both") < 1e-6


@pytest.mark.slow
@EVERY
def test_an_interrupted_round_goes_on_exactly(tiny: Tiny, tmp_path: Path, prompts: Path, method: str) -> None:
    rollout = {"passes": 2}  # a round has four updates here: two of two prompts, twice
    settings = changes(method, prompts, rollout=rollout, loop={"steps": 7, "checkpoint_every": 1})
    whole, cut = tiny.recipe(tmp_path / "whole", **settings), tiny.recipe(tmp_path / "cut", **settings)
    jobs = [{"recipe": str(whole)}]
    for signal, update in ((SIGTERM, 2), (SIGKILL, 2), (SIGTERM, 1)):
        jobs.append({"recipe": str(cut), "interrupt": [signal, "forward", update]})
    codes = [code for code, _ in run_jobs([*jobs, {"recipe": str(cut)}], tmp_path)]
    assert codes == [0, 143, -SIGKILL, 143, 0]
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_resume_inside_a_round(tiny: Tiny, tmp_path: Path, prompts: Path) -> None:
    rollout = {"passes": 2}
    loop = {"batch_size": 1, "steps": 6, "checkpoint_every": 1}
    settings = changes("prdp", prompts, rollout=rollout, loop=loop)
    whole, cut = tiny.recipe(tmp_path / "whole", **settings), tiny.recipe(tmp_path / "cut", **settings)
    run_jobs([{"recipe": str(whole)}], tmp_path, processes=2)
    short = tiny.recipe(tmp_path / "cut", **changes("prdp", prompts, rollout=rollout, loop={**loop, "steps": 3}))
    run_jobs([{"recipe": str(short)}], tmp_path, processes=2)
    cut = tiny.recipe(tmp_path / "cut", **settings)
    run_jobs([{"recipe": str(cut)}], tmp_path, processes=2)
    # the schedule of the learning rate ends elsewhere in the short run, so it is constant here
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_a_checkpoint_between_rounds_keeps_no_trajectories(tiny: Tiny, tmp_path: Path, prompts: Path) -> None:
    def names(steps: int) -> set[str]:
        out = tmp_path / str(steps)
        tiny.train(out, **changes("prdp", prompts, loop={"steps": steps}))
        return {name for name in contents(out) if "states" in name}

    assert names(1) and not names(2)  # a round has two updates


def test_offline_rounds_repeat_and_their_old_scores_follow_the_policy(
    tiny: Tiny, tmp_path: Path, prompts: Path
) -> None:
    rollout = {"policy": "reference", "pool": 1}
    tiny.train(tmp_path / "run", **changes("prdp", prompts, rollout=rollout, loop={"batch_size": 4, "steps": 3}))
    rows = lines(tmp_path / "run")
    assert len({row["reward/mean"] for row in rows}) == 1  # the same pictures
    assert rows[0]["kl/sampled"] == pytest.approx(0, abs=1e-3)
    assert rows[1]["kl/sampled"] != rows[2]["kl/sampled"]


# ------------------------------------------------------------------------------------------------------- the watch


def watch(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    file = tmp_path / "unseen.txt"
    file.write_text("a green circle\na green square\n")
    scorers = {"clip": {"name": "clip"}}
    return {"prompts": str(file), "count": 2, "every": 2, "scorers": scorers, **settings}


def test_a_watched_run_trains_as_one_that_is_not(tiny: Tiny, tmp_path: Path, prompts: Path) -> None:
    from evaluators.overoptimisation import read_history

    tiny.train(tmp_path / "alone", **changes("prdp", prompts))
    looked = watch(tmp_path, max_degenerate=None)
    tiny.train(tmp_path / "watched", **changes("prdp", prompts), watch=looked)
    assert apart(tmp_path / "alone", tmp_path / "watched") == 0
    history = read_history(tmp_path / "watched" / "watch.jsonl")
    assert [one.step for one in history] == [0, 2, 4]
    assert history[0].kl is None and history[1].kl is not None
    assert history[0].proxy != history[2].proxy


def test_a_watch_stops_a_run_and_stops_it_again(
    tiny: Tiny, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looked = watch(tmp_path, max_kl=1e-9)
    for _ in range(2):
        assert tiny.train(tmp_path / "run", **changes("prdp", prompts, loop={"steps": 8}), watch=looked) == 0
        assert "mmalign: stopped: " in capsys.readouterr().out
        assert newest(tmp_path / "run").name == "checkpoint-00000004"  # the first look after a round that has moved


def test_what_is_watched_must_not_be_trained_on(tiny: Tiny, tmp_path: Path, prompts: Path) -> None:
    leaking = {**watch(tmp_path), "prompts": str(prompts)}
    with pytest.raises(UserError, match="2 watched prompts are trained on"):
        tiny.train(tmp_path / "run", **changes("prdp", prompts), watch=leaking)


# --------------------------------------------------------------------------------------------------- exact gradients


def parts_of(tiny: Tiny, tmp_path: Path, prompts: Path, name: str, **more: Any) -> tuple[Any, Any, Any]:
    """(loop, method, groups) of a recipe, with a policy that has moved since the rollout."""
    from diffusion.feeds import make_feed
    from diffusion.models import load_model
    from diffusion.recipe import TrainConfig
    from diffusion.train import assemble
    from diffusion.trajectories import Turn
    from mmalign import config as configuration
    from mmalign import method as methods

    config = configuration.load(TrainConfig, tiny.recipe(tmp_path / "parts", **changes(name, prompts, **more)))
    module = methods.load("diffusion", name)
    model = load_model(config.model, train_full=config.adapter is None)
    loop, parts, _ = assemble(config, model, make_feed(module, config, model))
    built = module.build(configuration.parse_section(module.Options, config.method, "method"), parts)
    batch = next(built.batches(iter([Turn(1, 0)])))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loop.parameters:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return loop, built, batch


@EVERY
def test_step_by_step_is_the_gradient_of_the_whole_graph(
    tiny: Tiny, tmp_path: Path, prompts: Path, method: str
) -> None:
    from diffusion.rollout import step_scores

    loop, built, batch = parts_of(tiny, tmp_path, prompts, method, method={"clip": 0.9})
    assert not batch.unmoved  # the second update of its round
    losses = [loss for loss, _ in built.losses(batch)]
    assert len(losses) == built.passes(batch) == built._parts.kernel.trained
    pieces = torch.autograd.grad(sum(losses), loop.parameters)

    groups = built.chosen_pictures(batch.groups)
    chains, parts = groups.trajectories, built._parts
    rows = torch.arange(len(groups)).repeat_interleave(groups.images)
    now = [
        step_scores(
            parts.module,
            parts.guided,
            parts.kernel,
            chains.states,
            torch.full((len(chains),), step),
            groups.conditioning.select(rows),
        )
        for step in range(parts.kernel.trained)
    ]
    base = chains.old if chains.ref is None else chains.ref
    shape = (len(groups), groups.images, parts.kernel.trained)
    ratios = (base - torch.stack(now, 1)).float().view(shape)
    value, _ = built.loss(ratios, (base - chains.old).float().view(shape), groups)
    whole = torch.autograd.grad(value.mean(), loop.parameters)

    assert torch.stack(losses).sum().item() == pytest.approx(value.mean().item(), rel=1e-5)
    size = torch.stack([g.norm() for g in whole]).norm()
    assert size > 0
    for one, other in zip(pieces, whole, strict=True):
        assert (one - other).norm() < 1e-4 * size


def test_log_ratios_are_zero_where_the_policy_is_the_reference(tiny: Tiny, tmp_path: Path, prompts: Path) -> None:
    _, _, batch = parts_of(tiny, tmp_path, prompts, "prdp")
    assert batch.groups.trajectories.log_ratios().abs().max() < 1e-6


def test_the_pictures_are_those_of_the_kernel(tiny: Tiny, tmp_path: Path, prompts: Path) -> None:
    """A state after a step is its mean plus its deviation times a standard normal draw: half squares of one half."""
    _, _, batch = parts_of(tiny, tmp_path, prompts, "prdp")
    half = batch.groups.trajectories.old
    assert half.mean().item() == pytest.approx(0.5, abs=0.05)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"path": "x"}}, "draws for itself and reads no pairs"),
        ({"rollout": None}, "has no rollout section"),
        ({"rollout": {"prompts_per_round": 3}}, "no whole number of updates"),
        ({"rollout": {"pool": 2}}, "rounds repeat only where"),
        ({"rollout": {"kernel": "euler_ancestral", "steps": 1}}, "nothing to train on"),
        ({"reference": {"cache": "runs/cache"}}, "nothing to keep"),
        ({"method": {"compare": "dominance"}, "rollout": {"per_prompt": 3}}, "dominance compares two pictures, not 3"),
    ],
)
def test_settings_that_contradict_each_other(
    tiny: Tiny, tmp_path: Path, prompts: Path, settings: dict[str, Any], message: str
) -> None:
    recipe = changes("pso", prompts, **{key: value for key, value in settings.items() if key in ("method", "loop")})
    for key, value in settings.items():
        if key == "rollout" and value is not None:
            recipe["rollout"] = {**recipe["rollout"], **value}
        elif key not in ("method", "loop"):
            recipe[key] = value
    with pytest.raises(UserError, match=message):
        tiny.train(tmp_path / "run", **recipe)
    assert not newest_or_none(tmp_path / "run")


def newest_or_none(run: Path) -> Path | None:
    return newest(run) if run.exists() and any(run.glob("checkpoint-*")) else None


def test_pairs_methods_refuse_rollouts(tiny: Tiny, tmp_path: Path, prompts: Path) -> None:
    with pytest.raises(UserError, match="is fed with pairs and draws nothing itself"):
        tiny.train(tmp_path / "run", rollout={**ROLLOUT, "prompts": str(prompts)})


def test_prompts_with_holes_or_twice(tiny: Tiny, tmp_path: Path) -> None:
    for text, message in (("a\n\nb\n", "empty prompt"), ("a\nb\na\n", "again")):
        file = tmp_path / "prompts.txt"
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            tiny.train(tmp_path / "run", **changes("pso", file))


def test_a_reward_that_fails_ends_the_run_in_one_line_and_keeps_its_checkpoint(
    tiny: Tiny, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_reward

    tiny.train(tmp_path / "run", **changes("pso", prompts, loop={"steps": 2}))
    kept = newest(tmp_path / "run")

    def fails(prompts: list[str], images: list[Any]) -> list[float]:
        raise RuntimeError("no such file")

    monkeypatch.setattr(tiny_reward, "red", fails)
    with pytest.raises(UserError, match="RuntimeError: no such file"):
        tiny.train(tmp_path / "run", **changes("pso", prompts, loop={"steps": 4}))
    assert newest(tmp_path / "run") == kept
    for bad, message in ((lambda p, i: [float("nan")] * len(i), "nan"), (lambda p, i: [1.0], "returned 1 values")):
        monkeypatch.setattr(tiny_reward, "red", bad)
        with pytest.raises(UserError, match=message):
            tiny.train(tmp_path / "other", **changes("pso", prompts))
