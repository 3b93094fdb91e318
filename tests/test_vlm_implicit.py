"""mmalign eval preference for runs on answers: implicit rewards against brute force, ties, intervals, mistakes."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import write_store
from tiny_talks import RECIPE, Talk, merged, picture, records

from mmalign import checkpoint
from mmalign.cli import run_entry
from mmalign.errors import UserError
from mmalign.evaluation import main
from mmalign.pairdata import PairDataSettings, read_pairs
from mmalign.preferences import Store
from mmalign.records import Candidate, Record, Vote
from vlm import weights
from vlm.adapters import add_lora, train_fully
from vlm.batch import Row
from vlm.conversations import Conversation, conversations
from vlm.models import VisionLanguageModel, open_model
from vlm.settings import VlmLoraSettings, VlmModelSettings
from vlm.tuned import find_tuned, open_base, open_tuned

BETA = 0.3
SUM, MEAN = "(implicit reward, sum over tokens)", "(implicit reward, mean per token)"


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    return Talk(tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def made(talk: Talk, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run that ended with weights that some function made."""

    def make(name: str, change: Callable[[VisionLanguageModel], None], **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        recipe = merged(
            RECIPE,
            {"model": {"path": str(talk.model)}, "data": {"path": str(talk.store)}, "method": {"beta": BETA}}
            | {"loop": {"output_dir": str(folder)}},
        )
        (folder / "config.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
        model = open_model(VlmModelSettings(path=str(talk.model)))
        base = model.identity
        change(model)
        writers = {"model": lambda into: weights.save_weights(model, into)}
        checkpoint.save(folder, 3, {}, keep=1, method="dpo", summary={"base": base}, writers=writers)
        return folder

    return make


def adapted(scale: float, dropout: float = 0.0) -> Callable[[VisionLanguageModel], None]:
    def change(model: VisionLanguageModel) -> None:
        add_lora(model.network, model.family, VlmLoraSettings(rank=2, projector=True, dropout=dropout))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.network.named_parameters():
            if ".lora_B." in name:
                parameter.data = scale * torch.randn(parameter.shape, generator=generator)

    return change


def projected(model: VisionLanguageModel) -> None:
    """Full fine-tuning that moved the projector."""
    train_fully(model.network, model.family)
    for parameter in model.network.model.multi_modal_projector.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    assert run_entry(main, ["preference", *map(str, words), "--split", "train", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def log_prob(model: VisionLanguageModel, side: Conversation) -> tuple[float, int]:
    """Of an answer, from the logits of a plain forward; and its tokens."""
    row = model.encode(side)
    batch = model.collate([row])
    with torch.no_grad():
        logits = model.network(**model.inputs(batch)).logits[0].float()
    at = row.completion.nonzero().flatten()
    every = logits.log_softmax(-1)[at - 1, row.ids[at]]
    return every.sum().item(), len(at)


def test_policy_and_base_that_are_equal_know_nothing(
    talk: Talk, made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, run in {"lora": made("lora", adapted(0)), "full": made("full", lambda _: None, adapter=None)}.items():
        for found in ask(capsys, run, "--store", talk.store, "--out", tmp_path / name):
            assert (found["accuracy"], found["margin_mean"], found["ties"], found["pairs"]) == (0.5, 0, 5, 5), name
    rows = [json.loads(line) for line in (tmp_path / "lora" / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(set(row["margins"].values()) == {0} for row in rows)
    assert "ties counted half" in (tmp_path / "lora" / "preference.md").read_text()


@pytest.mark.parametrize(("change", "more"), [(adapted(0.5), {}), (projected, {"adapter": None})], ids=["lora", "full"])
def test_brute_force(
    talk: Talk,
    made: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[VisionLanguageModel], None],
    more: dict[str, Any],
) -> None:
    run = made("run", change, **more)
    found = ask(capsys, run, "--store", talk.store, "--batch-size", 2, "--out", tmp_path / "out")
    tuned = find_tuned(run)
    policy, base = open_tuned(tuned), open_base(tuned)
    pairs, _ = read_pairs(PairDataSettings(path=talk.store), 0)
    sums, means = [], []
    for pair in pairs:
        (chosen, count), (rejected, other) = (
            (log_prob(policy, side)[0] - log_prob(base, side)[0], log_prob(base, side)[1])
            for side in conversations(pair)
        )
        sums.append(BETA * (chosen - rejected))
        means.append(BETA * (chosen / count - rejected / other))
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert [row["pair"] for row in rows] == [pair.item_id for pair in pairs]
    for one, (name, expected) in zip(found, ((SUM, sums), (MEAN, means)), strict=True):
        assert one["judge"] == f"{run} {name}"
        assert [row["margins"][one["judge"]] for row in rows] == pytest.approx(expected, abs=1e-5)
        assert min(map(abs, expected)) > 1e-4  # clear of ties
        assert one["accuracy"] == sum(margin > 0 for margin in expected) / 5
        assert one["margin_mean"] == pytest.approx(sum(expected) / 5, abs=1e-5)
    assert json.loads((tmp_path / "out" / "preference.json").read_text())["judges"] == found


def test_what_is_judged_is_without_dropout(
    talk: Talk, made: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with_it, without = (ask(capsys, made("run", adapted(0.5, rate)), "--store", talk.store) for rate in (0.5, 0.0))
    assert [one["margin_mean"] for one in with_it] == [one["margin_mean"] for one in without]


def test_pictures_of_a_batch_are_held_at_a_time(
    talk: Talk, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode, made_so_far, alive = VisionLanguageModel.encode, [], []

    def counted(model: VisionLanguageModel, side: Conversation) -> Row:
        row = encode(model, side)
        made_so_far.append(weakref.ref(row.ids))
        alive.append(sum(ids() is not None for ids in made_so_far))
        return row

    monkeypatch.setattr(VisionLanguageModel, "encode", counted)
    ask(capsys, made("run", adapted(0.5)), "--store", talk.store, "--batch-size", 2)
    assert len(alive) == 2 * 5 and max(alive) == 2 * 2


def test_training_shows(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk.train(tmp_path / "run", loop={"steps": 12, "batch_size": 5}, optim={"lr": 0.05}) == 0
    capsys.readouterr()
    for found in ask(capsys, tmp_path / "run", "--store", talk.store):
        assert found["accuracy"] == 1 and found["margin_mean"] > 0
    newest = checkpoint.latest(tmp_path / "run").path
    assert newest is not None
    assert ask(capsys, newest, "--store", talk.store)[0]["accuracy"] == 1


def test_pairs_of_one_picture_are_a_cluster_and_long_ones_are_left_out(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(number: int, text: str) -> Record:
        return Record(
            record_id=str(number),
            prompt=f"question {number}",
            media=(picture(number // 2),),
            candidates=(Candidate(candidate_id="good", text=text), Candidate(candidate_id="bad", text="no")),
            votes=(Vote(a="good", b="bad", label="a"),),
        )

    Store.write([record(0, "a"), record(1, "b"), record(2, "c"), record(3, "d" * 600)], tmp_path / "store")
    found = ask(capsys, made("run", adapted(0.5)), "--store", tmp_path / "store")[0]
    assert (found["pairs"], found["groups"], found["failed"]) == (3, 2, 1) and found["ci95"] is not None
    Store.write([record(3, "d" * 600)], tmp_path / "long")
    words = ["preference", str(made("again", adapted(0.5))), "--store", str(tmp_path / "long"), "--split", "train"]
    assert run_entry(main, words) == 2
    assert "all 1 pairs are longer than the model's 512 tokens" in capsys.readouterr().err


def test_mistakes_are_one_line(
    talk: Talk, made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made("run", adapted(0.5))
    pictures = write_store(tmp_path / "pictures", 4)
    empty = tmp_path / "empty"
    Store.write(
        [
            replace(record, candidates=(record.candidates[0], replace(record.candidates[1], text=" ")))
            for record in records()
        ],
        empty,
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("package: evaluators\n")
    for words, message in (
        ([run, "--store", tmp_path / "none"], "no preference store here"),
        ([run, "--store", pictures], "expected an answer in text, got an image"),
        ([run, "--store", empty], "the answer is empty"),
        ([run, "--store", talk.store, "--split", "held"], "no split 'held'"),
        ([tmp_path / "none", "--store", talk.store], "no such folder"),
        ([talk.model, "--store", talk.store], "not the folder of a run"),
        ([tmp_path / "other", "--store", talk.store], "a run of evaluators has no base"),
        (["--store", talk.store, "--scorer", "shapes"], "pairs are of texts"),
        ([run, "--store", talk.store, "--batch-size", 0], "must be at least 1"),
    ):
        assert run_entry(main, ["preference", "--split", "train", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and "Traceback" not in error, words


def test_rewards_are_asked_of_a_run_only(talk: Talk, tmp_path: Path) -> None:
    from mmalign.runs import package

    (tmp_path / "run" / "step-1" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("package: vlm\n")
    for path in ("run", "run/step-1", "run/step-1/model"):
        assert package(tmp_path / path) == "vlm"
    with pytest.raises(UserError, match="Give a run's folder or a checkpoint"):
        package(tmp_path)
