"""Training as a whole on a tiny random pipeline: exact resume, batches cut in many ways, caches that change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from tiny_runs import Tiny, contents, lines, newest, run_jobs, weights
from torch import Tensor

from mmalign.errors import UserError
from mmalign.reference import AdaptersOff, Cached, FrozenCopy

LORA: dict[str, Any] = {}
FULL: dict[str, Any] = {"adapter": None}
KINDS = pytest.mark.parametrize("kind", [pytest.param(LORA, id="lora"), pytest.param(FULL, id="full")])
SIGTERM, SIGKILL = 15, 9


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def apart(one: Path, other: Path) -> float:
    """|w - w'| / |w| over all weights."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    difference = math.sqrt(sum(float((a[key].double() - b[key].double()).square().sum()) for key in a))
    return difference / math.sqrt(sum(float(value.double().square().sum()) for value in a.values()))


def assert_close(one: Path, other: Path) -> None:
    """The same training up to the order of sums in fp32."""
    assert apart(one, other) < 1e-6
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-4), name


# ------------------------------------------------------------------------------------------------ a run as a whole


@KINDS
def test_a_run_begins_at_margin_zero_and_leaves_what_it_promises(
    tiny: Tiny, tmp_path: Path, kind: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.train(tmp_path / "run", **kind) == 0
    first, *_, last = lines(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins_abs"] == 0
    assert first["errors/chosen"] == first["errors/ref_chosen"] > 0
    assert last["rewards/margins_abs"] > 0
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "grad_norm", "lr"} < last.keys()
    own = "model/unet/diffusion_pytorch_model.safetensors" if kind else "model/pytorch_lora_weights.safetensors"
    assert (newest(tmp_path / "run") / own).is_file()
    assert (tmp_path / "run" / "config.yaml").is_file()
    out = capsys.readouterr().out
    for said in ("trained", "learning rate", "pairs per update  2 = 2 per forward x 1", "logit scale", "expected"):
        assert said in out


def test_validation_samples_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    drawn = {"prompts": ["a red circle", "a blue circle"], "sampler": {"steps": 2}}
    tiny.train(tmp_path / "plain")
    tiny.train(tmp_path / "sampled", validation=drawn, loop={"sample_every": 2})
    assert contents(tmp_path / "plain") == contents(tmp_path / "sampled")
    assert [path.name for path in (tmp_path / "sampled" / "samples").iterdir()] == ["validation-00000002.png"]


def test_init_from_starts_another_run_at_margin_zero(tiny: Tiny, tmp_path: Path) -> None:
    tiny.train(tmp_path / "first")
    before = newest(tmp_path / "first")
    for kind, name in ((LORA, "lora"), (FULL, "full")):
        code = tiny.train(tmp_path / name, **{**kind, "loop": {"init_from": str(before), "steps": 1}})
        assert code == 0
        line = lines(tmp_path / name)[0]
        assert line["step"] == 1 and line["rewards/margins_abs"] == 0
        # the reference is what the first run ended with, not the original
        assert line["errors/ref_chosen"] != lines(tmp_path / "first")[0]["errors/ref_chosen"]


# ------------------------------------------------------------------------------------------ the same, cut differently


@KINDS
def test_accumulating_8_forwards_of_1_equals_1_of_8(tiny: Tiny, tmp_path: Path, kind: dict[str, Any]) -> None:
    # Not bit for bit: convolutions and sums over 8 pairs round in another order than 8 sums over one.
    for batch_size, accumulation in ((8, 1), (1, 8)):
        cut = {"batch_size": batch_size, "accumulation": accumulation}
        tiny.train(tmp_path / f"cut-{batch_size}", **{**kind, "loop": cut})
    assert_close(tmp_path / "cut-8", tmp_path / "cut-1")


@KINDS
def test_gradient_checkpointing_changes_nothing(tiny: Tiny, tmp_path: Path, kind: dict[str, Any]) -> None:
    tiny.train(tmp_path / "plain", **kind)
    tiny.train(tmp_path / "saving", **{**kind, "loop": {"gradient_checkpointing": True}})
    assert_close(tmp_path / "plain", tmp_path / "saving")


@KINDS
def test_caches_change_nothing(
    tiny: Tiny, tmp_path: Path, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = {
        **kind,
        "data": {"cache": str(tmp_path / "latents"), "prompt_dropout": 0.3},
        "reference": {"cache": str(tmp_path / "errors")},
    }
    plain = {**kind, "data": {"prompt_dropout": 0.3}}
    tiny.train(tmp_path / "off", **plain)
    tiny.train(tmp_path / "filling", **cached)
    assert contents(tmp_path / "filling") == contents(tmp_path / "off")  # bit for bit

    def never(*_: object) -> Tensor:
        raise AssertionError("a cached reference was computed again")

    monkeypatch.setattr(AdaptersOff, "score", never)
    monkeypatch.setattr(FrozenCopy, "score", never)
    tiny.train(tmp_path / "filled", **cached)
    assert contents(tmp_path / "filled") == contents(tmp_path / "off")
    assert lines(tmp_path / "filled") == lines(tmp_path / "off")


def test_cached_reference_errors_repeat_after_their_draws(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Cached] = []
    begin = Cached.__init__

    def watched(self: Cached, *args: Any, **named: Any) -> None:
        begin(self, *args, **named)
        made.append(self)

    monkeypatch.setattr(Cached, "__init__", watched)
    tiny.train(
        tmp_path / "run",
        reference={"cache": str(tmp_path / "errors"), "draws": 2},
        loop={"steps": 8, "batch_size": 7},  # 8 epochs of 7 pairs
    )
    assert (len(made[0]), made[0].misses, made[0].hits) == (28, 28, 84)


def test_another_base_data_or_seed_never_meets_cached_errors(tiny: Tiny, tmp_path: Path) -> None:
    first = {"reference": {"cache": str(tmp_path / "errors")}, "loop": {"steps": 1}}
    tiny.train(tmp_path / "first", **first)
    others: list[dict[str, Any]] = [
        {"loop": {"steps": 1, "seed": 1}},
        {"loop": {"steps": 1, "init_from": str(newest(tmp_path / "first"))}},
        {"data": {"prompt_dropout": 0.5}},
        {"data": {"shuffle_labels": True}},
        {"method": {"name": "dpo", "timesteps": [100]}},
    ]
    for number, other in enumerate(others, start=2):
        tiny.train(tmp_path / f"other-{number}", **{**first, **other})
        assert len(list((tmp_path / "errors").iterdir())) == number, other


def test_a_tie_is_no_win(tiny: Tiny, tmp_path: Path) -> None:
    soft = {"pairing": {"ties": "soft"}}
    for method in ({"name": "dpo"}, {"name": "sft"}):
        with pytest.raises(UserError, match=r"a tie would be trained as a win .*data\.pairing\.ties"):
            tiny.train(tmp_path / "run", method=method, data=soft)
    assert tiny.train(tmp_path / "run", method={"name": "dpo", "loss": {"soft": 1.0}}, data=soft) == 0


def test_shuffled_labels_are_a_fair_coin_that_the_seed_tosses(tiny: Tiny, tmp_path: Path) -> None:
    from diffusion.feeds import pair_settings
    from diffusion.recipe import TrainConfig
    from mmalign import config
    from mmalign.pairdata import read_pairs

    def chosen(**changes: Any) -> list[str]:
        recipe = config.load(TrainConfig, tiny.recipe(tmp_path / "run", **changes))
        pairs, _ = read_pairs(pair_settings(recipe), recipe.loop.seed)
        return [pair.chosen.response.sha256() for pair in pairs]  # type: ignore[union-attr]  # pictures

    true = chosen()
    flipped = {
        seed: [a != b for a, b in zip(true, chosen(data={"shuffle_labels": True}, loop={"seed": seed}), strict=True)]
        for seed in range(30)
    }
    assert len({tuple(coins) for coins in flipped.values()}) > 20
    assert 0.35 < sum(map(sum, flipped.values())) / (30 * len(true)) < 0.65
    assert chosen(data={"shuffle_labels": True}) == chosen(data={"shuffle_labels": True})


def test_a_run_on_shuffled_labels_is_another_run(tiny: Tiny, tmp_path: Path) -> None:
    tiny.train(tmp_path / "true")
    tiny.train(tmp_path / "shuffled", data={"shuffle_labels": True})
    assert apart(tmp_path / "true", tmp_path / "shuffled") > 1e-6
    with pytest.raises(UserError, match=r"the checkpoint has pairs .*, but this run has pairs"):
        tiny.train(tmp_path / "true", data={"shuffle_labels": True})


# ---------------------------------------------------------------------------------------- interrupted, several at once

LONG: dict[str, Any] = {
    # 7 pairs, 3 an update: an epoch has 3 updates
    "loop": {"steps": 7, "batch_size": 1, "accumulation": 3, "checkpoint_every": 2},
    "optim": {"ema_decay": 0.9, "schedule": "cosine"},
    "data": {"prompt_dropout": 0.3},
}
POINTS: dict[str, tuple[list[Any], int, str | None]] = {
    "SIGTERM inside an accumulation window": ([SIGTERM, "forward", 3 * 5 + 2], 143, "checkpoint-00000005"),
    "SIGTERM across an epoch": ([SIGTERM, "forward", 3 * 3], 143, "checkpoint-00000003"),
    "SIGKILL between checkpoints": ([SIGKILL, "forward", 3 * 5 + 2], -9, "checkpoint-00000004"),
    "SIGKILL while a checkpoint is written": ([SIGKILL, "save", 2 * 3], -9, "checkpoint-00000004"),
    "SIGKILL before the first checkpoint": ([SIGKILL, "forward", 3 + 2], -9, None),
}


@pytest.fixture(scope="module")
def interrupted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str | None]]]:
    """Every run of the next test, in one process that forks: for each kind one whole run, and each point twice."""
    folder = tmp_path_factory.mktemp("interrupted")
    jobs = {}
    for name, kind in {"lora": {"adapter": {"dropout": 0.2}}, "full": FULL}.items():
        jobs[f"{name} whole"] = {"recipe": str(tiny.recipe(folder / name / "whole", **LONG, **kind))}
        for number, (point, (interrupt, _, _)) in enumerate(POINTS.items()):
            recipe = str(tiny.recipe(folder / name / str(number), **LONG, **kind))
            jobs[f"{name} {point}"] = {"recipe": recipe, "interrupt": interrupt}
            jobs[f"{name} {point}, again"] = {"recipe": recipe}
    return folder, dict(zip(jobs, run_jobs(list(jobs.values()), folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])  # lora with dropout, both with an average
def test_resumed_equals_uninterrupted_bit_for_bit(
    interrupted: tuple[Path, dict[str, tuple[int, str | None]]], kind: str
) -> None:
    folder, ended = interrupted
    assert ended[f"{kind} whole"] == (0, "checkpoint-00000007")
    whole, whole_lines = contents(folder / kind / "whole"), lines(folder / kind / "whole")
    assert any(name.startswith("model_ema/") for name in whole)
    for number, (point, (_, code, left)) in enumerate(POINTS.items()):
        run = folder / kind / str(number)
        assert ended[f"{kind} {point}"] == (code, left), point
        assert ended[f"{kind} {point}, again"] == (0, "checkpoint-00000007"), point
        assert contents(run) == whole, point  # weights, average, optimizer, guard: every byte
        assert lines(run) == whole_lines, point  # every step once
        assert not list(run.glob(".checkpoint*")), point


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tiny: Tiny, tmp_path: Path) -> None:
    # Not bit for bit: gradients of 2 pairs are averaged over processes, where one process sums over 4 pairs.
    short = {"steps": 4, "checkpoint_every": 2}
    kinds = {"lora": LORA, "full": FULL}
    recipes = {}
    for name, kind in kinds.items():
        tiny.train(tmp_path / f"one-{name}", **{**kind, "loop": {**short, "batch_size": 4}})
        recipes[name] = str(tiny.recipe(tmp_path / f"two-{name}", **{**kind, "loop": {**short, "batch_size": 2}}))
    # only the second process hears the signal, both stop after the same update, and the next start goes on
    stopped = {"recipe": recipes["lora"], "interrupt": [SIGTERM, "forward", 3], "rank": 1}
    ended = run_jobs([stopped, {"recipe": recipes["lora"]}, {"recipe": recipes["full"]}], tmp_path, processes=2)
    assert ended == [(143, "checkpoint-00000003"), (0, "checkpoint-00000004"), (0, "checkpoint-00000004")]
    for name in kinds:
        assert_close(tmp_path / f"one-{name}", tmp_path / f"two-{name}")
        assert [line["step"] for line in lines(tmp_path / f"two-{name}")] == [1, 2, 3, 4]
