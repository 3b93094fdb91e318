"""Vision-language training as a whole on a tiny random LLaVA: every method, exact resume, batches cut in many ways."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from tiny_runs import contents, lines, newest, run_jobs, weights
from tiny_talks import Talk

from mmalign.errors import UserError

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo"},
    "sft": {"name": "sft"},
    "simpo": {"name": "simpo"},
    "orpo": {"name": "orpo"},
    "povid_1": {"name": "povid", "stage": 1},
    "povid_paper": {"name": "povid"},
    "povid_authors": {"name": "povid", "form": "authors", "tokens": "own", "overflow": "wrap"},
    "realign_rdpo": {"name": "realign_rdpo"},
    "realign_authors": {"name": "realign_rdpo", "compat": "authors"},
    "mdpo": {"name": "mdpo"},
    "tdpo1": {"name": "tdpo", "form": "tdpo1"},
    "tdpo2": {"name": "tdpo"},
    "rrpo": {"name": "rrpo", "alpha": 0.5},
}
TETHERED = ("tdpo1", "tdpo2", "rrpo")  # with a divergence over the vocabulary
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SIGTERM, SIGKILL = 15, 9


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    return Talk(tmp_path_factory.mktemp("talk"))


def assert_close(one: Path, other: Path) -> None:
    """The same training up to the order of sums in fp32."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    for first, second in zip(lines(one), lines(other), strict=True):
        for name in first:
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=2e-4), name


@EVERY
def test_a_run_starts_where_it_must_and_learns(talk: Talk, tmp_path: Path, method: dict[str, Any]) -> None:
    assert talk.train(tmp_path / "run", method=method, loop={"steps": 4}) == 0
    first, *_, last = lines(tmp_path / "run")
    if method["name"] in ("dpo", "povid", "realign_rdpo", "mdpo", "tdpo", "rrpo"):
        assert first["rewards/margins_abs"] == 0
        terms = {"realign_rdpo": 2, "mdpo": 3}.get(method["name"], 1)
        assert first["loss"] == pytest.approx(terms * math.log(2), abs=1e-6)
        assert first["logps/chosen"] == pytest.approx(first["logps/ref_chosen"])
        assert last["rewards/margins_abs"] > 0
        if "kl/chosen" in first:
            assert first["kl/chosen"] == 0 < last["kl/chosen"]
    assert math.isfinite(last["loss"]) and last["grad_norm"] > 0
    assert (newest(tmp_path / "run") / "model" / "adapter_model.safetensors").is_file()
    moved = [tensor for name, tensor in weights(tmp_path / "run").items() if ".lora_B." in name]
    assert moved and any(tensor.any() for tensor in moved)


def test_resuming_is_exact_wherever_a_run_was_cut(talk: Talk, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "method": METHODS["povid_paper"],
        "loop": {"steps": 4, "accumulation": 2, "checkpoint_every": 1},
    }
    jobs: list[dict[str, Any]] = [{"package": "vlm", "recipe": str(talk.recipe(tmp_path / "whole", **changes))}]
    for name, how in (
        ("polite", [SIGTERM, "forward", 4]),
        ("rude", [SIGKILL, "forward", 6]),
        ("mid", [SIGKILL, "save", 2]),
    ):
        recipe = str(talk.recipe(tmp_path / name, **changes))
        jobs += [{"package": "vlm", "recipe": recipe, "interrupt": how}, {"package": "vlm", "recipe": recipe}]
    done = run_jobs(jobs, tmp_path)
    assert [code for code, _ in done] == [0, 128 + SIGTERM, 0, -SIGKILL, 0, -SIGKILL, 0]
    whole = contents(tmp_path / "whole")
    for name in ("polite", "rude", "mid"):
        assert contents(tmp_path / name) == whole
        assert lines(tmp_path / name) == lines(tmp_path / "whole")


def test_a_tethered_run_resumes_exactly(talk: Talk, tmp_path: Path) -> None:
    for out, steps in (("whole", 4), ("part", 2), ("part", 4)):
        talk.train(tmp_path / out, method=METHODS["rrpo"], loop={"steps": steps, "accumulation": 2})
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert lines(tmp_path / "part") == lines(tmp_path / "whole")


@EVERY
def test_accumulation_equals_a_larger_batch(talk: Talk, tmp_path: Path, method: dict[str, Any]) -> None:
    talk.train(tmp_path / "large", method=method, loop={"batch_size": 4})
    talk.train(tmp_path / "small", method=method, loop={"batch_size": 1, "accumulation": 4})
    assert_close(tmp_path / "large", tmp_path / "small")


def test_two_processes_equal_one(talk: Talk, tmp_path: Path) -> None:
    one, two = [], []
    for name, method in METHODS.items():
        one.append(talk.recipe(tmp_path / f"{name}-1", method=method, loop={"batch_size": 4, "steps": 2}))
        two.append(talk.recipe(tmp_path / f"{name}-2", method=method, loop={"batch_size": 2, "steps": 2}))
    assert all(code == 0 for code, _ in run_jobs([{"package": "vlm", "recipe": str(r)} for r in one], tmp_path))
    done = run_jobs([{"package": "vlm", "recipe": str(r)} for r in two], tmp_path, processes=2)
    assert all(code == 0 for code, _ in done)
    for name in METHODS:
        assert_close(tmp_path / f"{name}-1", tmp_path / f"{name}-2")


def test_a_tether_holds(talk: Talk, tmp_path: Path) -> None:
    for method, where, strengths in (("rrpo", "kl/chosen", (0.0, 5.0)), ("tdpo2", "kl/rejected", (0.0, 20.0))):
        drifts = []
        for alpha in strengths:
            run = tmp_path / f"{method}-{alpha:g}"
            talk.train(run, method=METHODS[method] | {"alpha": alpha}, loop={"steps": 6})
            drifts.append(lines(run)[-1][where])
        assert 0 < 1.5 * drifts[1] < drifts[0]


def test_a_cached_reference_changes_nothing_and_is_kept(talk: Talk, tmp_path: Path) -> None:
    for name in ("dpo", "realign_rdpo"):
        changes: dict[str, Any] = {"method": METHODS[name], "loop": {"steps": 6}}
        talk.train(tmp_path / f"{name}-plain", **changes)
        cache = {"reference": {"cache": str(tmp_path / name)}}
        talk.train(tmp_path / f"{name}-first", **changes, **cache)
        talk.train(tmp_path / f"{name}-again", **changes, **cache)
        assert_close(tmp_path / f"{name}-plain", tmp_path / f"{name}-first")
        assert contents(tmp_path / f"{name}-first") == contents(tmp_path / f"{name}-again")
        assert list((tmp_path / name).rglob("scores-*.safetensors"))
    for name in ("povid_paper", "realign_authors", *TETHERED):
        with pytest.raises(UserError, match=r"reference\.cache"):
            talk.train(tmp_path / "no", method=METHODS[name], reference={"cache": str(tmp_path / "no-cache")})


def test_a_frozen_copy_is_the_reference_of_full_training(talk: Talk, tmp_path: Path) -> None:
    for name in ("dpo", "rrpo"):
        talk.train(tmp_path / name, method=METHODS[name], adapter=None, optim={"lr": 1.0e-3})
        first, *_, last = lines(tmp_path / name)
        assert first["rewards/margins_abs"] == 0 < last["rewards/margins_abs"]
        assert first.get("kl/chosen", 0) == 0
        assert (newest(tmp_path / name) / "model" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_the_trained_model_opens_in_peft_and_transformers(talk: Talk, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from vlm.tuned import find_tuned, open_base, open_tuned

    talk.train(tmp_path / "lora", loop={"steps": 4})
    talk.train(tmp_path / "full", adapter=None, loop={"steps": 2})
    for name in ("lora", "full"):
        tuned = find_tuned(tmp_path / name)
        base, ours = open_base(tuned), open_tuned(tuned)
        if name == "lora":
            theirs = PeftModel.from_pretrained(
                AutoModelForImageTextToText.from_pretrained(talk.model, dtype=torch.float32), tuned.weights
            ).eval()
            loaded = AutoModelForImageTextToText.from_pretrained(talk.model, dtype=torch.float32).eval()
            loaded.load_adapter(str(tuned.weights))
        else:
            theirs = loaded = AutoModelForImageTextToText.from_pretrained(tuned.weights, dtype=torch.float32).eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            expected = ours.network(input_ids=ids).logits
            for other in (theirs, loaded):
                torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(base.network(input_ids=ids).logits, expected, atol=1e-5)


def test_a_run_goes_on_from_another_ones_weights(talk: Talk, tmp_path: Path) -> None:
    talk.train(tmp_path / "first", method=METHODS["povid_1"], loop={"steps": 4})
    start = str(newest(tmp_path / "first"))
    talk.train(tmp_path / "second", method=METHODS["povid_paper"], loop={"steps": 2, "init_from": start})
    of_run = {"steps": 2, "init_from": str(tmp_path / "first")}  # means its newest checkpoint, and the run says so
    talk.train(tmp_path / "again", method=METHODS["povid_paper"], loop=of_run)
    assert contents(tmp_path / "again") == contents(tmp_path / "second")
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["loop"]["init_from"] == start
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "first" / "config.yaml", tmp_path / "empty")
    with pytest.raises(UserError, match=r"no checkpoint to start from \(loop\.init_from=.*Train that run first"):
        talk.train(tmp_path / "no", loop={"init_from": str(tmp_path / "empty")})
    line = lines(tmp_path / "second")[0]
    assert line["rewards/margins_abs"] == 0  # the reference starts there too
    assert line["logps/ref_chosen"] != pytest.approx(lines(tmp_path / "first")[0]["logps/ref_chosen"], abs=1e-4)


def test_a_tie_is_no_win(talk: Talk, tmp_path: Path) -> None:
    for method in (METHODS["dpo"], METHODS["simpo"], METHODS["rrpo"]):
        with pytest.raises(UserError, match=r"a tie would be trained as a win .*data\.pairing\.ties"):
            talk.train(tmp_path / "run", method=method, data={"pairing": {"ties": "soft"}})


def test_long_rows_are_left_out_and_counted(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlm.models import open_model
    from vlm.settings import VlmModelSettings

    talk.train(tmp_path / "all")
    longest = int(capsys.readouterr().out.split("longest row ")[1].split()[0])
    assert longest < open_model(VlmModelSettings(path=str(talk.model))).max_tokens
    talk.train(tmp_path / "short", model={"max_tokens": longest - 1})
    assert f"left out: longer than {longest - 1} tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="no pair that the model can read"):
        talk.train(tmp_path / "none", model={"max_tokens": 3})


def test_controls_change_what_they_say(talk: Talk, tmp_path: Path) -> None:
    for name, data in (("plain", {}), ("blank", {"blank_images": True}), ("shuffled", {"shuffle_labels": True})):
        talk.train(tmp_path / name, data=data, loop={"steps": 1})
    plain, blank, shuffled = (lines(tmp_path / name)[0] for name in ("plain", "blank", "shuffled"))
    assert plain["logps/chosen"] != blank["logps/chosen"]
    assert plain["logps/chosen"] != shuffled["logps/chosen"]


def test_weights_that_do_not_fit_are_refused_in_one_line(talk: Talk, tmp_path: Path) -> None:
    from tiny_vlms import write

    from vlm.models import open_model
    from vlm.settings import VlmModelSettings
    from vlm.tuned import find_tuned, open_base
    from vlm.weights import load_weights, open_weights

    talk.train(tmp_path / "lora", loop={"steps": 1})
    tuned = find_tuned(tmp_path / "lora")
    other = open_model(VlmModelSettings(path=str(write("smolvlm", tmp_path / "other"))))
    with pytest.raises(UserError, match="the adapter belongs to another model"):
        open_weights(other, tuned.weights)
    with pytest.raises(UserError, match="expected the whole model, found an adapter"):
        load_weights(open_base(tuned), tuned.weights)
    with pytest.raises(UserError, match="no such folder"):
        open_weights(other, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found no weights"):
        open_weights(other, tmp_path / "empty")
    with pytest.raises(UserError, match="LoRA of rank 2, but this run has adapter LoRA of rank 4"):
        talk.train(tmp_path / "lora", adapter={"rank": 4}, loop={"steps": 2})
    with pytest.raises(UserError, match="saved with alpha 2, this run has alpha 4"):
        talk.train(tmp_path / "lora", adapter={"alpha": 4.0}, loop={"steps": 2})
    moved = find_tuned(tmp_path / "lora", base=str(tmp_path / "other"))
    with pytest.raises(UserError, match="but this base is"):
        open_base(moved)


def test_pairs_that_a_method_cannot_use_are_refused_before_training(talk: Talk, tmp_path: Path) -> None:
    import shutil

    from mmalign.preferences import Store
    from mmalign.records import Candidate, Record, Vote

    words = (Candidate(candidate_id="a", text="yes"), Candidate(candidate_id="b", text="no"))
    vote = (Vote(a="a", b="b", label="a"),)
    Store.write([Record(record_id="r", prompt="is it?", candidates=words, votes=vote)], tmp_path / "blind")
    with pytest.raises(UserError, match="0 pictures on the chosen side"):
        talk.train(tmp_path / "run", method=METHODS["realign_rdpo"], data={"path": str(tmp_path / "blind")})
    with pytest.raises(UserError, match="no preference store here"):
        talk.train(tmp_path / "run", data={"path": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="no method 'dppo' in vlm"):
        talk.train(tmp_path / "run", method={"name": "dppo"})
    shutil.copytree(talk.store, tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError):
        talk.train(tmp_path / "run", data={"path": str(tmp_path / "damaged")})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
