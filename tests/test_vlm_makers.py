"""Makers: stores of preferences about the shapes world and about other pictures, and what is left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vlms
from PIL import Image

from mmalign import data
from mmalign.config import NamedSection, parse_section
from mmalign.errors import UserError
from mmalign.media import Media
from mmalign.pairing import make_pairs
from mmalign.preferences import Store
from mmalign.records import Candidate, Record
from mmalign.shapes import checker, talk
from mmalign.shapes.scenes import Scene, Thing
from vlm import making
from vlm.conversations import conversations
from vlm.examples import Example, SourceSettings, answer_about, is_false, read_examples, scene_as_json, scene_of
from vlm.makers import injected, refilled, sampled
from vlm.models import VisionLanguageModel, open_model
from vlm.recipe import TrainConfig
from vlm.settings import VlmModelSettings
from vlm.similarity import shared_words, similarity


def never() -> VisionLanguageModel:
    raise AssertionError("no model is needed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlms.write("llava", tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="module")
def model(folder: Path) -> VisionLanguageModel:
    return open_model(VlmModelSettings(path=str(folder)))


def made(name: str, model: Any = never, **options: Any) -> list[Record]:
    maker = making.load(name)
    return list(maker.records(parse_section(maker.Options, options, "make"), model))


def scene(record: Record) -> Scene:
    found = scene_of(record.context, record.where)
    assert found is not None
    return found


def photographs(folder: Path) -> Path:
    """A file of prompts with pictures and true answers, as users have them."""
    answers = [
        "A brown dog sits on a red couch.",
        "There is a cat on the couch and a dog under the table.",
        "A man with a red hat stands behind the table.",
        "It is quiet.",
    ]
    folder.mkdir()
    rows = []
    for index, answer in enumerate(answers):
        tiny_vlms.picture(index).save(folder / f"{index}.png")
        rows.append({"prompt": "What is there?", "media": [f"{index}.png"], "candidates": [{"text": answer}]})
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "answers.jsonl"


# ------------------------------------------------------------------------------------------------ examples


def test_scenes_come_with_true_answers_and_balanced_questions() -> None:
    for source in ("shapes:train", "shapes:even"):
        examples = read_examples(SourceSettings(source=source, count=40, questions=2, seed=4))
        assert examples == read_examples(SourceSettings(source=source, count=40, questions=2, seed=4))
        assert len({example.key for example in examples}) == len(examples)
        answers = Counter(example.answer for example in examples if example.prompt != talk.DESCRIBE)
        assert answers["yes"] == answers["no"] == 80
        for example in examples[::7]:
            assert example.scene is not None
            pixels = np.asarray(example.media[0].open())
            assert checker.shown(pixels) == set(example.scene.things)
            assert answer_about(example.scene, example.prompt) == example.answer
            assert talk.split_of(example.scene.things) == "train"
    companions = [
        talk.missing_companions(one.scene.things)
        for one in read_examples(SourceSettings(source="shapes:even", count=60, questions=0))
        if one.scene is not None
    ]
    assert sum(map(bool, companions)) > 25  # the habit is broken there


def test_a_scene_survives_a_context_and_nonsense_is_refused() -> None:
    for one in talk.draw(30, split="train", seed=1):
        assert scene_of({"scene": json.loads(json.dumps(scene_as_json(one)))}, "row") == one
    assert scene_of({}, "row") is None
    for bad in (
        {"things": ["red dog"], "relation": None},
        {"things": [], "relation": None},
        "red circle",
        {"things": 3},
    ):
        with pytest.raises(UserError, match="not a scene"):
            scene_of({"scene": bad}, "row")


def test_an_unknown_world_or_source_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'shapes:train'"):
        read_examples(SourceSettings(source="shapes:trian"))
    with pytest.raises(UserError, match="no such file"):
        read_examples(SourceSettings(source=str(tmp_path / "nothing")))
    source = photographs(tmp_path / "photographs")
    with pytest.raises(UserError, match="5 records asked for, there are 4"):
        read_examples(SourceSettings(source=str(source), count=5))
    assert len(read_examples(SourceSettings(source=str(source), count=2))) == 2


# ------------------------------------------------------------------------------------------------ injected


def test_injected_pairs_are_false_and_as_long_as_the_truth() -> None:
    records = made("injected", source="shapes:train", count=150, questions=1, additions=0.3)
    assert len(records) == 450  # a description and two questions each
    lengths = np.zeros(2)
    kinds: Counter[str] = Counter()
    for record in records:
        chosen, rejected = (candidate.text or "" for candidate in record.candidates)
        true = scene(record)
        assert chosen == answer_about(true, record.prompt) != rejected
        if record.prompt == talk.DESCRIBE:
            assert not talk.named(rejected) <= set(true.things)
            lengths += len(chosen.split()), len(rejected.split())
        else:
            assert {chosen, rejected} == {"yes", "no"}
        assert record.candidates[1].media is None
        about = record.context["made"]
        assert about["maker"] == "injected" and about["by"] == "rules"
        kinds.update(edit["kind"] for edit in about["edits"])
    assert abs(lengths[1] / lengths[0] - 1) < 0.05
    assert set(kinds) == {"object", "attribute", "addition", "omission", "answer"}
    assert records == made("injected", source="shapes:train", count=150, questions=1, additions=0.3)
    pairs = list(make_pairs(records))
    assert len(pairs) == 450
    first, second = conversations(pairs[0])
    assert first.answer == records[0].candidates[0].text and second.answer == records[0].candidates[1].text


def test_habits_may_come_from_another_source() -> None:
    def planted(records: Sequence[Record]) -> int:
        return sum(
            bool(talk.named(record.candidates[1].text or "") & set(talk.missing_companions(scene(record).things)))
            for record in records
        )

    options = {"source": "shapes:even", "count": 80, "questions": 0, "additions": 0.5}
    assert planted(made("injected", habits="shapes:train", **options)) > 2 * planted(made("injected", **options))


def test_injection_into_other_peoples_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photographs(tmp_path / "photographs")
    records = made("injected", source=str(source), additions=0.0)
    assert "3 answers have hallucinations injected, 1 are left out" in capsys.readouterr().err
    for record in records:
        chosen, rejected = (candidate.text for candidate in record.candidates)
        assert chosen != rejected and record.media[0].open().size == (48, 40)
    store = Store.write(records, tmp_path / "store")
    again = made("injected", source=str(tmp_path / "store"))  # the winners of a store are true answers
    assert {record.candidates[0].text for record in again} == {record.candidates[0].text for record in records}
    assert len(store) == 3


class Scripted:
    """An annotator whose replies are given by a function."""

    identity = "scripted"

    def __init__(self, reply: Any) -> None:
        self.reply, self.asked = reply, list[Any]()

    def replies(self, requests: Sequence[Any]) -> Iterator[tuple[int, str]]:
        self.asked += requests
        yield from ((index, self.reply(request)) for index, request in enumerate(requests))


def test_a_model_may_write_the_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reply(request: Any) -> str:
        true = request.prompt.split("True answer: ")[1].split("\n")[0]
        if true in ("yes", "no"):
            return true  # of no use
        return "there is a red circle." if "red circle" in true else ""

    by = Scripted(reply)
    monkeypatch.setattr(injected, "open_annotator", lambda *_, **__: (by, tmp_path / "replies.jsonl"))
    records = made("injected", count=60, annotator={"name": "endpoint"})
    assert records == []  # "a red circle" alone is true of all pictures it was said of
    assert all(request.images for request in by.asked)
    by.reply = lambda request: "there is a dog and a green circle."
    (tmp_path / "replies.jsonl").unlink()
    records = made("injected", count=60, questions=0, annotator={"name": "endpoint"})
    assert len(records) > 0 and all(Thing("green", "circle") not in scene(record).things for record in records)
    assert "Question: describe the picture." in records[0].context["made"]["prompt"]
    assert records[0].context["made"]["by"] == records[0].candidates[1].model == "scripted"


# ------------------------------------------------------------------------------------------------ refilled


def test_refilled_pairs_describe_the_retrieved_picture(
    model: VisionLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"count": 50, "questions": 1, "index": str(tmp_path / "index.safetensors")}
    records = made("refilled", lambda: model, **options)
    assert len(records) > 50
    assert f"{len(records)} answers are filled from similar pictures" in capsys.readouterr().err
    prompts = Counter(record.prompt == talk.DESCRIBE for record in records)
    assert prompts[True] > 20 and prompts[False] > 20
    answers = Counter(record.candidates[0].text for record in records)
    assert answers["yes"] == answers["no"] > 10  # nothing teaches to say yes
    for record in records:
        chosen, rejected = record.candidates
        (retrieved,) = rejected.media or ()
        assert chosen.media is None and retrieved != record.media[0]
        pixels = np.asarray(retrieved.open())
        true = scene(record)
        if record.prompt == talk.DESCRIBE:
            assert talk.named(rejected.text or "") == checker.shown(pixels) != set(true.things)
        about = record.context["made"]
        assert shared_words([chosen.text or ""], [rejected.text or ""]) == [about["similarity"]]
        assert about["similarity"] < 0.95 and about["retrieved"] == retrieved.sha256()
        assert "[MASK]" in about["masked"] and is_false(example_of(record), rejected.text or "")
    again = made("refilled", lambda: model, **options)
    assert [record.candidates[1].text for record in again] == [record.candidates[1].text for record in records]
    (pair, *_) = make_pairs(records)
    assert pair.chosen.media != pair.rejected.media
    one, other = conversations(pair)
    assert one.images[0].tobytes() != other.images[0].tobytes()


def example_of(record: Record) -> Example:
    answer = record.candidates[0].text or ""
    return Example(
        key="k",
        prompt=record.prompt,
        media=record.media,
        answer=answer,
        truths=(answer,),
        group="g",
        scene=scene(record),
    )


def test_neighbours_are_tried_in_order_until_one_says_something_else(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = photographs(tmp_path / "photographs")
    said: list[tuple[str, str]] = []
    replies = ["brown dog sits on a red couch", "red dog sits on a brown couch", "blue bird sits on a red car"]

    def reply(request: Any) -> str:
        masked = request.prompt.split("Answer: ")[1].split("\n")[0]
        said.append((masked, request.images[0].sha256()))
        if "sits" not in masked:
            return masked  # never filled: left out
        return f"A {replies[sum(text == masked for text, _ in said) - 1]}."

    by = Scripted(reply)
    monkeypatch.setattr(refilled, "open_annotator", lambda *_, **__: (by, tmp_path / "replies.jsonl"))
    (record,) = made("refilled", lambda: model, source=str(source), refill={"name": "local"}, neighbours=3)
    assert record.candidates[1].text == "A blue bird sits on a red car."
    assert record.context["made"]["rank"] == 2 and record.candidates[1].model == "scripted"
    order = [digest for text, digest in said if "sits" in text]
    assert len(order) == len(set(order)) == 3 and record.media[0].sha256() not in order
    assert record.candidates[1].media is not None and record.candidates[1].media[0].sha256() == order[2]


def test_rules_do_not_fill_what_they_cannot_see(model: VisionLanguageModel, tmp_path: Path) -> None:
    source = photographs(tmp_path / "photographs")
    with pytest.raises(UserError, match=r"rules fill masks in the shapes world alone.*make\.refill"):
        made("refilled", lambda: model, source=str(source))


def test_similarity_by_words_and_by_an_encoder(tmp_path: Path) -> None:
    assert shared_words(["a red dog", "", "A dog."], ["a red cat", "", "a DOG"]) == [0.5, 1.0, 1.0]
    from transformers import BertConfig, BertModel

    tokenizer = tiny_vlms.tokenizer([], bos="<s>", eos="</s>")
    tokenizer.model_max_length = 32
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    alike = similarity(str(tmp_path / "encoder"))
    same, other = alike(["a cat", "a cat"], ["a cat", "two dogs on the red mat"])
    assert same == pytest.approx(1.0, abs=1e-6) and other < 0.999
    alone = alike(["a cat"], ["two dogs on the red mat"])
    assert alone == pytest.approx([other], abs=1e-5)  # padding changes nothing
    with pytest.raises(UserError, match=r"sentence encoder does not open.*make\.encoder"):
        similarity(str(tmp_path / "nothing"))


# ------------------------------------------------------------------------------------------------ sampled


def test_sampled_answers_are_ranked_by_the_truth(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(_: Any, talks: Sequence[Any], *, seeds: Sequence[int], **__: Any) -> list[str]:
        assert len(set(seeds)) == len(talks)
        texts, red = [], "there is a red circle."
        for index, one in enumerate(talks):
            if one.messages[-1]["content"][-1]["text"] == talk.DESCRIBE:
                texts.append([red, "there is nothing.", "a red circle", red][index % 4])
            else:
                texts.append(["yes", "no", "maybe", "yes"][index % 4])
        return texts

    monkeypatch.setattr(sampled, "answer", answers)
    records = made("sampled", lambda: model, count=40, questions=1)
    described = [record for record in records if record.prompt == talk.DESCRIBE]
    assert len(records) == len(described) + 80
    for record in records:
        (vote,) = record.votes
        by_id = {candidate.candidate_id: candidate for candidate in record.candidates}
        best, worst = by_id[vote.a], by_id[vote.b]
        if record.prompt == talk.DESCRIBE:
            there = Thing("red", "circle") in scene(record).things
            assert ("circle" in (best.text or "")) is there  # naming it is recall, or a hallucination
            assert worst.text == ("there is nothing." if there else best.text and "there is a red circle.")
            assert len(by_id) == 3  # the same text once
        else:
            assert best.text == answer_about(scene(record), record.prompt) != worst.text
        assert set(best.scores) == set(sampled.SCORERS)
    assert {bool(Thing("red", "circle") in scene(record).things) for record in described} == {True, False}


def test_ties_are_dropped_and_other_pictures_refused(model: VisionLanguageModel, tmp_path: Path) -> None:
    options = {"count": 4, "questions": 0, "max_new_tokens": 3, "batch_size": 16}
    assert made("sampled", lambda: model, **options) == []  # random weights name nothing
    with pytest.raises(UserError, match="nobody knows how truthful"):
        made("sampled", lambda: model, source=str(photographs(tmp_path / "photographs")))


def test_truthfulness_counts_false_mentions_and_recall() -> None:
    record = Record(
        record_id="r",
        prompt=talk.DESCRIBE,
        media=(Media.from_image(Image.new("RGB", (2, 2))),),
        candidates=(Candidate(candidate_id="chosen", text="there is a red circle and a blue square."),),
        context={"scene": scene_as_json(Scene((Thing("red", "circle"), Thing("blue", "square")), "above"))},
    )
    example = example_of(record)
    said = "a red circle, a green square, a green square and a red circle"
    assert sampled.truthfulness(example, said) == {"false": 2.0, "recall": 0.5}
    assert sampled.truthfulness(example, "") == {"false": 0.0, "recall": 0.0}


# ------------------------------------------------------------------------------------------------ making


def recipe(tmp_path: Path, folder: Path, **make: Any) -> dict[str, Any]:
    return {
        "package": "vlm",
        "model": {"path": str(folder)},
        "adapter": None,
        "make": make or None,
        "data": {"path": str(tmp_path / "store")},
        "method": {"name": "dpo"},
        "optim": {"lr": 1e-4},
        "loop": {"steps": 1, "output_dir": str(tmp_path / "run")},
    }


def test_a_recipes_store_is_made_once(folder: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate_json(
        json.dumps(recipe(tmp_path, folder, name="injected", count=5, questions=0))
    )
    making.ensure_store(config, never)
    assert len(Store.open(tmp_path / "store")) == 5
    making.ensure_store(config.model_copy(update={"make": NamedSection(name="nothing")}), never)  # it is there
    without = config.model_copy(update={"make": None, "data": config.data.model_copy(update={"path": tmp_path / "x"})})
    making.ensure_store(without, never)
    assert not (tmp_path / "x").exists()


def test_a_maker_that_fails_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate_json(json.dumps(recipe(tmp_path, folder, name="injected", source="shapes:no")))
    with pytest.raises(UserError, match="no world"):
        making.ensure_store(config, never)
    assert not list(tmp_path.iterdir())


def test_mmalign_data_make(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(tmp_path, folder, name="refilled", count=30)))  # JSON is YAML
    assert data.main(["make", str(file), "make.questions=0", "make.neighbours=20"]) == 0
    store = Store.open(tmp_path / "store")
    assert f"{len(store)} records made by refilled" in capsys.readouterr().out
    assert all((record.candidates[1].media or ())[0].open().size == (32, 32) for record in store.records())
    assert data.main(["check", str(tmp_path / "store")]) == 0
    with pytest.raises(UserError, match="something is here already"):
        data.main(["make", str(file)])
    with pytest.raises(UserError, match=r"no way to make data.*Did you mean 'refilled'"):
        data.main(["make", str(file), "make.name=refiled", f"data.path={tmp_path / 'other'}"])
    with pytest.raises(UserError, match=r"make\.tua"):
        data.main(["make", str(file), "make.tua=0.5", f"data.path={tmp_path / 'other'}"])
    file.write_text(json.dumps(recipe(tmp_path, folder)))
    with pytest.raises(UserError, match="does not say how its data are made"):
        data.main(["make", str(file)])


def test_every_maker_is_found_by_its_file() -> None:
    assert making.known() == ["injected", "refilled", "sampled"]
    for name in making.known():
        assert making.load(name).Options().source == "shapes:train"
