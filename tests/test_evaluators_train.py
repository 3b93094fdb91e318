"""Training a scorer as a whole on a tiny random CLIP: every objective, exact resume, batches cut in many ways, use."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_runs import contents, lines, merged, newest, run_jobs, weights
from tiny_scorers import write_clip
from torch import Tensor

from evaluators import scorer as scorers
from evaluators.calibration import log_loss
from evaluators.recipe import TrainConfig
from evaluators.train import main
from evaluators.training import heldout
from evaluators.training.data import PictureFeed, divided, items_of
from evaluators.training.heldout import HeldOut, margins
from evaluators.training.model import PreferenceModel
from mmalign import config as configuration
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.method import known
from mmalign.preferences import Store
from mmalign.records import Candidate, Record, Vote

METHODS: dict[str, dict[str, Any]] = {
    "pickscore": {"name": "pickscore"},
    "negatives": {"name": "pickscore", "in_batch_negatives": True},
    "bradley_terry": {"name": "bradley_terry", "loss": {"soft": 1.0}},
    "listwise": {"name": "listwise"},
}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SIGTERM, SIGKILL = 15, 9
THINGS = ("cats", "dogs", "red balls", "old houses", "boats", "green trees", "clouds", "spoons", "blue cars", "birds")
PROMPTS = [f"{many} {what}" for many in ("some", "two", "three") for what in THINGS]

RECIPE: dict[str, Any] = {
    "package": "evaluators",
    "model": {"path": ""},
    "data": {"path": "", "pairing": {"strategy": "all", "score": "taste"}},
    "held_out": None,
    "method": {"name": "pickscore"},
    # see tiny_runs.RECIPE for eps
    "optim": {"lr": 1.0e-3, "eps": 1.0e-2},
    "loop": {"steps": 3, "batch_size": 2, "output_dir": "", "trackers": ["jsonl"]},
}


def picture(brightness: float, number: int) -> Media:
    noise = np.random.default_rng(number).normal(0, 12, (32, 32, 3))
    return Media.from_image(Image.fromarray(np.clip(brightness + noise, 0, 255).astype(np.uint8)))


def write_taste(path: Path, prompts: list[str] = PROMPTS) -> Path:
    """Each prompt has two to four pictures; the taste is brightness, and every third prompt has a tie."""

    def rows() -> Iterator[Record]:
        for index, prompt in enumerate(prompts):
            levels = np.random.default_rng(index).permutation(np.linspace(30, 225, 2 + index % 3))
            scores = [round(float(level) / 255, 3) for level in levels]
            if index % 3 == 2:
                scores[1] = scores[0]
            candidates = tuple(
                Candidate(candidate_id=str(k), image=picture(level, 10 * index + k), scores={"taste": scores[k]})
                for k, level in enumerate(levels)
            )
            yield Record(record_id=f"{index:02d}", prompt=prompt, candidates=candidates)

    Store.write(rows(), path)
    return path


class Bench:
    """A folder with a CLIP and a store, and the recipes on them."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "clip"
        write_clip(self.model)
        self.store = write_taste(folder / "store")

    def recipe(self, out: Path, **changes: Any) -> Path:
        own = {"model": {"path": str(self.model)}, "data": {"path": str(self.store)}, "loop": {"output_dir": str(out)}}
        file = out.parent / f"{out.name}.yaml"
        file.write_text(yaml.safe_dump(merged(merged(RECIPE, own), changes)))
        return file

    def train(self, out: Path, **changes: Any) -> int:
        return main([str(self.recipe(out, **changes))])

    def config(self, out: Path, **changes: Any) -> TrainConfig:
        return configuration.load(TrainConfig, self.recipe(out, **changes))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def taught(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt to like bright pictures."""
    run = tmp_path_factory.mktemp("taught") / "run"
    changes: dict[str, Any] = {
        "data": {"items": "prompts"},
        "held_out": {"share": 0.4, "every": 20},
        "optim": {"lr": 3e-3, "eps": 1e-8},
        "loop": {"steps": 60, "batch_size": 8, "log_every": 20},
    }
    assert bench.train(run, **changes) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


def assert_close(one: Path, other: Path) -> None:
    """The same training up to the order of sums in fp32."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_every_objective_is_tested() -> None:
    assert set(known("evaluators")) == {method["name"] for method in METHODS.values()}


@EVERY
@pytest.mark.parametrize("items", ["pairs", "prompts"])
def test_a_run_moves_and_logs(bench: Bench, tmp_path: Path, method: dict[str, Any], items: str) -> None:
    head = None if method.get("in_batch_negatives") else 8
    assert bench.train(tmp_path / "run", method=method, data={"items": items}, model={"head": head}) == 0
    last = lines(tmp_path / "run")[-1]
    assert math.isfinite(last["loss"]) and last["grad_norm"] > 0 and 0 <= last["rewards/accuracies"] <= 1
    if head:
        assert weights(tmp_path / "run")["model/head.safetensors:outer.weight"].any()  # it was 0


# not with in-batch negatives: fewer texts in a forward are another objective
@pytest.mark.parametrize("method", [METHODS[name] for name in METHODS if name != "negatives"])
@pytest.mark.parametrize("items", ["pairs", "prompts"])
def test_accumulation_equals_a_larger_batch(bench: Bench, tmp_path: Path, method: dict[str, Any], items: str) -> None:
    bench.train(tmp_path / "large", method=method, data={"items": items}, loop={"batch_size": 4})
    bench.train(tmp_path / "small", method=method, data={"items": items}, loop={"batch_size": 1, "accumulation": 4})
    assert_close(tmp_path / "large", tmp_path / "small")


def test_two_processes_equal_one(bench: Bench, tmp_path: Path) -> None:
    methods: dict[str, dict[str, Any]] = {
        "listwise": METHODS["listwise"],
        "negatives": METHODS["negatives"],  # texts of all processes, and their gradients
        "authors": {"name": "pickscore", "compat": "pickscore"},  # weights of all processes
    }
    one, two = [], []
    for name, method in methods.items():
        held = {"share": 0.3, "every": 2}
        one.append(bench.recipe(tmp_path / f"{name}-1", method=method, held_out=held, loop={"batch_size": 4}))
        two.append(bench.recipe(tmp_path / f"{name}-2", method=method, held_out=held, loop={"batch_size": 2}))
    assert all(code == 0 for code, _ in run_jobs([{"package": "evaluators", "recipe": str(r)} for r in one], tmp_path))
    done = run_jobs([{"package": "evaluators", "recipe": str(r)} for r in two], tmp_path, processes=2)
    assert all(code == 0 for code, _ in done)
    for name in methods:
        assert_close(tmp_path / f"{name}-1", tmp_path / f"{name}-2")
        looks = [
            [row["held_out/log_loss"] for row in lines(tmp_path / f"{name}-{n}") if "loss" not in row] for n in "12"
        ]
        assert looks[0] == pytest.approx(looks[1], rel=1e-4) and len(looks[0]) == 1


def test_resuming_is_exact_wherever_a_run_was_cut(bench: Bench, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": {"head": 8},
        "held_out": {"share": 0.3, "every": 2},
        "loop": {"steps": 4, "accumulation": 2, "checkpoint_every": 1},
    }
    jobs: list[dict[str, Any]] = [{"package": "evaluators", "recipe": str(bench.recipe(tmp_path / "whole", **changes))}]
    for name, how in (
        ("polite", [SIGTERM, "forward", 4]),
        ("rude", [SIGKILL, "forward", 6]),
        ("mid", [SIGKILL, "save", 2]),
    ):
        recipe = str(bench.recipe(tmp_path / name, **changes))
        jobs += [
            {"package": "evaluators", "recipe": recipe, "interrupt": how},
            {"package": "evaluators", "recipe": recipe},
        ]
    done = run_jobs(jobs, tmp_path)
    assert [code for code, _ in done] == [0, 128 + SIGTERM, 0, -SIGKILL, 0, -SIGKILL, 0]
    for name in ("polite", "rude", "mid"):
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
        assert lines(tmp_path / name) == lines(tmp_path / "whole")
        assert (tmp_path / name / "held_out.json").read_bytes() == (tmp_path / "whole/held_out.json").read_bytes()


# ------------------------------------------------------------------------------------------------------ use


def test_it_learns_and_says_how_well(taught: Path) -> None:
    said = json.loads((taught / "held_out.json").read_text())
    assert said["after"]["accuracy"]["strict"]["value"] > 0.9 > said["before"]["accuracy"]["strict"]["value"]
    assert said["after"]["calibration"]["log_loss"] < said["before"]["calibration"]["log_loss"]
    assert said["after"]["allowed"] == 1
    looks = [line for line in lines(taught) if "held_out/accuracy" in line]
    assert [line["step"] for line in looks] == [20, 40, 60]
    assert looks[-1]["held_out/accuracy"] == said["after"]["accuracy"]["strict"]["value"]


def test_it_loads_back_as_a_scorer(taught: Path, bench: Bench, tmp_path: Path) -> None:
    from transformers import CLIPModel

    trained = scorers.load("trained", {"path": str(taught)})
    bright, dark = picture(220, 1000).open(), picture(40, 1001).open()
    numbers = trained.score_images(["a cat", "a cat"], [bright, dark])
    assert numbers[0]["trained"] > numbers[1]["trained"] + 1
    plain = scorers.load("pickscore", {"path": str(newest(taught) / "model")})
    assert [row["pickscore"] for row in plain.score_images(["a cat"] * 2, [bright, dark])] == pytest.approx(
        [row["trained"] for row in numbers], abs=1e-5
    )
    again = scorers.load("trained", {"path": str(newest(taught))})
    assert again.identity == trained.identity and again.score_images(["a cat"] * 2, [bright, dark]) == numbers
    assert CLIPModel.from_pretrained(newest(taught) / "model").config.projection_dim == 32

    bench.train(tmp_path / "head", model={"head": 8}, optim={"lr": 1e-2})
    headed = scorers.load("trained", {"path": str(tmp_path / "head")})
    bare = scorers.load("pickscore", {"path": str(newest(tmp_path / "head") / "model")})
    assert headed.identity != bare.identity
    assert headed.score_images(["a cat"], [bright])[0]["trained"] != pytest.approx(
        bare.score_images(["a cat"], [bright])[0]["pickscore"], abs=1e-6
    )


def test_training_scores_what_the_scorer_scores(bench: Bench, taught: Path) -> None:
    config = bench.config(taught.parent / "same")
    model = PreferenceModel(config.model)
    model.load(newest(taught) / "model")
    pictures = [picture(level, level).open() for level in (30, 90, 160)]
    with torch.no_grad():
        scores = model(model.tokens(["a cat", "two dogs"]), model.preprocess.images(pictures), torch.tensor([0, 1, 1]))[
            0
        ]
    rows = scorers.load("trained", {"path": str(taught)}).score_images(["a cat", "two dogs", "two dogs"], pictures)
    assert [row["trained"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-5)


def test_only_what_is_asked_for_is_trained(bench: Bench, tmp_path: Path) -> None:
    bench.train(tmp_path / "part", model={"text_layers": 0, "vision_layers": 1}, optim={"lr": 1e-2})
    from safetensors.torch import load_file

    before, after = load_file(bench.model / "model.safetensors"), weights(tmp_path / "part")
    changed = {name for name in before if not torch.equal(before[name], after[f"model/model.safetensors:{name}"])}
    assert {"logit_scale", "visual_projection.weight", "vision_model.post_layernorm.weight"} <= changed
    assert all(
        name.startswith(("vision_model.encoder.layers.1.", "vision_model.post", "visual_projection", "logit_scale"))
        or name.startswith(("text_model.final_layer_norm", "text_projection"))
        for name in changed
    )
    assert any(name.startswith("vision_model.encoder.layers.1.") for name in changed)


def test_what_is_judged_is_what_becomes_the_scorer(bench: Bench, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"held_out": {"share": 0.4}, "optim": {"lr": 1e-2, "ema_decay": 0.9}}
    assert bench.train(tmp_path / "run", **changes) == 0
    held = HeldOut.of(divided(bench.config(tmp_path / "run", **changes))[1])
    trained = scorers.load("trained", {"path": str(tmp_path / "run")})
    found = []
    for item in held.items:
        rows = trained.score_images([item.prompt] * len(item.pictures), [one.open() for one in item.pictures])
        found += [rows[i]["trained"] - rows[j]["trained"] for i, j in item.pairs]
    said = json.loads((tmp_path / "run/held_out.json").read_text())["after"]["calibration"]["log_loss"]
    assert said == pytest.approx(log_loss(np.array(found), held.confidence), abs=1e-6)


def test_processes_share_what_is_held_out(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench.config(tmp_path / "a", held_out={"share": 0.5}, data={"pairing": {"ties": "soft"}})
    kept, judged, _ = divided(config)
    held, model = HeldOut.of(judged), PreferenceModel(config.model)
    feed = PictureFeed(config, kept, held.items, model.preprocess, model.tokens)
    whole = margins(model, feed, held, torch.device("cpu"))

    monkeypatch.setattr(heldout, "BATCH", 3)
    sizes: list[int] = []
    plain = model.forward

    def forward(tokens: Tensor, pixels: Tensor, owner: Tensor) -> Any:
        sizes.append(len(pixels))
        return plain(tokens, pixels, owner)

    monkeypatch.setattr(model, "forward", forward)
    ranks: list[Any] = []
    for rank in (0, 1):
        here = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
        monkeypatch.setattr(heldout, "processes", lambda here=here: here)
        monkeypatch.setattr(heldout, "gather_object", lambda found: (ranks.extend(found), [*ranks, *found][:2])[1])
        shared = margins(model, feed, held, torch.device("cpu"))
    np.testing.assert_allclose(shared, whole, atol=1e-5)
    assert sum(sizes) == sum(len(item.pictures) for item in held.items) and max(sizes) == 3
    assert abs(len(ranks[0]) - len(ranks[1])) <= 1


def test_weights_are_means_over_the_data(bench: Bench, tmp_path: Path) -> None:
    kept, _, _ = divided(bench.config(tmp_path / "a"))
    for kind in ("pairs", "prompts"):
        config = bench.config(tmp_path / "a", data={"items": kind})
        model = PreferenceModel(config.model)
        feed = PictureFeed(config, kept, (), model.preprocess, model.tokens)
        every = feed.batch(items_of(kept, config.data.items), torch.device("cpu"))
        assert feed.mean_weight(True) == pytest.approx((1 / every.counts).sum().item() / feed.size)
        assert feed.mean_weight(False) == pytest.approx(len(every.counts) / feed.size)


def test_patience_ends_a_run(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {"share": 0.4, "every": 1, "patience": 1}
    shuffled = {"shuffle_labels": True}
    assert bench.train(tmp_path / "run", held_out=held, data=shuffled, optim={"lr": 0.05}, loop={"steps": 30}) == 0
    assert len([line for line in lines(tmp_path / "run") if "loss" in line]) < 30
    assert "stopped: the held-out log loss was lowest after update 1" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- data


def test_no_prompt_is_on_both_sides(bench: Bench, tmp_path: Path) -> None:
    kept, judged, note = divided(bench.config(tmp_path / "a", held_out={"share": 0.4}))
    assert not {pair.a.prompt for pair in kept} & {pair.a.prompt for pair in judged}
    assert f"{len(judged)} pairs held out" in note
    again = divided(bench.config(tmp_path / "a", held_out={"share": 0.4}, loop={"seed": 1}))  # every run's are the same
    assert [pair.item_id for pair in again[1]] == [pair.item_id for pair in judged]


def test_labels_are_drawn_as_a_rater_would(bench: Bench, tmp_path: Path) -> None:
    from mmalign.pairdata import PairDataSettings, PairingSettings, read_pairs

    store = write_taste(tmp_path / "store", [f"a picture of {number} things" for number in range(300)])
    pairing = PairingSettings(strategy="all", score="taste", spread=0.5)
    sure, _ = read_pairs(PairDataSettings(path=store, pairing=pairing), 0)
    drawn, _ = read_pairs(PairDataSettings(path=store, pairing=pairing, draw_labels=True), 0)
    kept = [one.label == other.label for one, other in zip(sure, drawn, strict=True)]
    expected = float(np.mean([pair.ordered()[2] for pair in sure]))
    assert np.mean(kept) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(kept)))
    assert all(pair.ordered()[2] == 1 for pair in drawn)
    assert HeldOut.of(drawn).allowed == pytest.approx(np.mean(kept))  # what who knows the truth would reach
    assert HeldOut.of(sure).allowed == pytest.approx(expected)
    with pytest.raises(UserError, match=r"pairing\.spread"):
        bench.config(tmp_path / "x", data={"draw_labels": True})


def test_drawn_ties_have_a_side(bench: Bench) -> None:
    from mmalign.pairdata import PairDataSettings, PairingSettings, read_pairs

    pairing = PairingSettings(strategy="all", score="taste", spread=0.5, ties="soft")
    asked = PairDataSettings(path=bench.store, pairing=pairing, draw_labels=True)
    drawn, ties = read_pairs(asked, 0)[0], read_pairs(asked.model_copy(update={"draw_labels": False}), 0)[0]
    of_ties = [one for one, other in zip(drawn, ties, strict=True) if other.label == "tie"]
    assert {pair.label for pair in of_ties} == {"a", "b"}
    assert HeldOut.of(of_ties).allowed == 0.5


def test_the_control_is_judged_by_true_labels(bench: Bench, tmp_path: Path) -> None:
    held = {"share": 0.5}
    kept, judged, _ = divided(bench.config(tmp_path / "a", held_out=held))
    shuffled, of_control, _ = divided(bench.config(tmp_path / "a", held_out=held, data={"shuffle_labels": True}))
    assert [pair.label for pair in of_control] == [pair.label for pair in judged]
    assert [pair.label for pair in shuffled] != [pair.label for pair in kept]


def test_held_out_ties_alone_judge_nobody(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_taste(tmp_path / "store")
    monkeypatch.setattr("evaluators.training.data._drawn", lambda prompt, held: prompt == "only a tie")
    tie = tuple(Candidate(candidate_id=str(k), image=picture(90, k), scores={"taste": 0.5}) for k in range(2))
    records = [*Store.open(store).records(), Record(record_id="t", prompt="only a tie", candidates=tie)]
    both = Store.write(records, tmp_path / "both").path
    data = {"path": str(both), "pairing": {"ties": "soft"}}
    with pytest.raises(UserError, match="0 with a preferred side held out"):
        divided(bench.config(tmp_path / "a", data=data, held_out={"share": 0.5}))


def test_pairs_of_equal_ids_stay_apart(bench: Bench, tmp_path: Path) -> None:
    pairs = divided(bench.config(tmp_path / "a"))[0][:2]
    twins = [replace(pair, item_id="same") for pair in pairs]
    assert len(items_of(twins, "pairs")) == 2


def test_mistakes_are_one_line(bench: Bench, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    answers = tuple(Candidate(candidate_id=k, text=f"answer {k}") for k in "ab")
    Store.write([Record(record_id="0", prompt="q", candidates=answers, votes=(Vote(a="a", b="b", label="a"),))], texts)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("compares texts", {"data": {"path": str(texts), "pairing": {"strategy": "votes", "score": None}}}),
        ("no preference store", {"data": {"path": str(tmp_path / "none")}}),
        ("0 with a preferred side held out", {"held_out": {"share": 0.001}}),
        (r"'drop' or 'soft'.*keep", {"data": {"pairing": {"ties": "keep"}}}),
        (
            "a tie would be trained as a win",
            {"method": {"name": "bradley_terry"}, "data": {"pairing": {"ties": "soft"}}},
        ),
        ("2 layers, not 5", {"model": {"vision_layers": 5}}),
        ("needs the name of its split", {"held_out": {"path": str(bench.store)}}),
        ("trained on and held out", {"held_out": {"split": "train"}}),
        ("a head is none of them", {"model": {"head": 8}, "method": METHODS["negatives"]}),
        ("no method 'pickscor'", {"method": {"name": "pickscor"}}),
        ("no folder with a config.json", {"model": {"path": str(tmp_path)}}),
        ("Unknown loss 'sigmoidd'", {"method": {"name": "bradley_terry", "loss": {"sigmoidd": 1.0}}}),
    ]
    for expected, changes in cases:
        with pytest.raises(UserError, match=expected) as caught:
            bench.train(tmp_path / "run", **changes)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no run is named"):
        scorers.load("trained")
    with pytest.raises(UserError, match="no such checkpoint"):
        scorers.load("trained", {"path": str(tmp_path / "nothing")})
    run = tmp_path / "head"
    bench.train(run, model={"head": 8})
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("package: evaluators", "package: vlm"))
    with pytest.raises(UserError, match="a run of vlm is no scorer"):
        scorers.load("trained", {"path": str(other)})
    with pytest.raises(UserError, match="head"):
        bench.train(tmp_path / "bare", loop={"init_from": str(newest(tmp_path / "head") / "model")})


def test_a_run_starts_from_another(taught: Path, bench: Bench, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data": {"items": "prompts"}, "held_out": {"share": 0.4}}
    bench.train(tmp_path / "next", **changes, loop={"init_from": str(newest(taught)), "steps": 1})
    ended = json.loads((taught / "held_out.json").read_text())["after"]
    assert json.loads((tmp_path / "next/held_out.json").read_text())["before"] == ended


def test_weights_are_not_sharded(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="whole on every process"):
        bench.train(tmp_path / "run")


def test_other_layers_are_another_run(bench: Bench, tmp_path: Path) -> None:
    bench.train(tmp_path / "run", model={"vision_layers": 1})
    with pytest.raises(UserError, match=r"has layers text: all, vision: last 1, but this run has layers .*vision: all"):
        bench.train(tmp_path / "run", loop={"steps": 4})


def test_a_broken_picture_is_found_before_training(bench: Bench, tmp_path: Path) -> None:
    good = picture(100, 0)
    broken = Media(data=good.read()[:-40], place="photo 7")
    candidates = tuple(
        Candidate(candidate_id=str(k), image=image, scores={"taste": float(k)})
        for k, image in enumerate((good, broken))
    )
    store = Store.write([Record(record_id="0", prompt="p", candidates=candidates)], tmp_path / "store")
    with pytest.raises(UserError, match="cannot decode"):
        bench.train(tmp_path / "run", data={"path": str(store.path)})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_published_size_makes_an_update(bench: Bench, tmp_path: Path) -> None:
    """CLIP ViT-H/14 as PickScore's: every layer is there, with random weights; the last of each tower is trained."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path / "clip-h"
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32}
    config = CLIPConfig(
        text_config={**text, "hidden_act": "gelu", "projection_dim": 1024},
        vision_config={**vision, "hidden_act": "gelu", "projection_dim": 1024, "patch_size": 14, "image_size": 224},
        projection_dim=1024,
    )
    model = CLIPModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(986e6, rel=0.001)
    model.half().save_pretrained(folder)
    del model
    changes: dict[str, Any] = {
        "model": {"path": str(folder), "text_layers": 1, "vision_layers": 1},
        "loop": {"steps": 1, "batch_size": 1, "gradient_checkpointing": True, "precision": "bf16"},
    }
    assert bench.train(tmp_path / "run", **changes) == 0
    (line,) = lines(tmp_path / "run")
    assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
