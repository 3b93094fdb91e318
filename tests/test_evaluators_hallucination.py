"""CHAIR, POPE and their shapes-world kin against numbers worked by hand, on files as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluators.hallucination import chair, pope, shapes
from evaluators.hallucination.__main__ import main
from evaluators.hallucination.estimate import Estimate, share, table
from mmalign.errors import UserError
from mmalign.shapes.scenes import Thing
from mmalign.shapes.talk import Question

SYNONYMS = """\
person, girl, boy, man, woman, child, baby, adult, passenger
dog, puppy
hot dog
cat
bench
bus
train
tie
toilet
chair, seat
knife
elephant
jet, airplane
skis, ski
wine glass
sheep
"""


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def values(measures: dict[str, Estimate]) -> dict[str, float | None]:
    return {name: one.value for name, one in measures.items()}


# ----------------------------------------------------------------------------------------- estimates


def test_a_share_knows_its_units_its_images_and_its_interval() -> None:
    one = share([("a", True), ("a", True), ("b", False), ("c", True)])
    assert (one.value, one.n, one.images) == (0.75, 4, 3)
    assert one.ci95 is not None and one.ci95[0] < 0.75 < one.ci95[1]
    assert share([]) == Estimate(value=None, ci95=None, n=0, images=0)
    assert share([("a", True), ("a", False)]).ci95 is None  # one image has no interval
    never = share([(str(i), False) for i in range(20)])
    assert never.value == 0
    assert never.ci95 == pytest.approx((0, 0.1611), abs=1e-4)  # Wilson, 0 of 20
    assert never.as_json() == {"value": 0.0, "ci95": list(never.ci95 or ()), "n": 20, "images": 20}


def test_intervals_are_clustered_by_image() -> None:
    """Eight answers that agree within an image are worth their two images, not eight."""
    together = share([(image, image == "a") for image in "ab" for _ in range(4)])
    apart = share([(f"{image}{i}", image == "a") for image in "ab" for i in range(4)])
    assert together.value == apart.value == 0.5
    assert together.ci95 == pytest.approx((0.0, 1.0), abs=2e-3)
    assert apart.ci95 is not None and apart.ci95[0] > 0.0


def test_the_table_names_every_number() -> None:
    text = table({"chair_s": share([("a", True), ("b", False)]), "chair_i": share([])})
    assert text.splitlines()[0].startswith("chair_s  0.500 [0.002, 0.998]  n=2, images=2")
    assert text.splitlines()[1].startswith("chair_i  none to count")


# ---------------------------------------------------------------------------------------------- POPE


def test_pope_numbers_by_hand() -> None:
    """TP 8, FP 2, TN 7, FN 3."""
    labels = [True] * 8 + [False] * 2 + [False] * 7 + [True] * 3
    said = ["Yes."] * 10 + ["No."] * 10
    found = pope.measure(labels, said, [str(i) for i in range(20)])
    assert tuple(found) == pope.NUMBERS
    assert values(found) == pytest.approx(
        {"accuracy": 0.75, "precision": 0.8, "recall": 8 / 11, "f1": 16 / 21, "yes_ratio": 0.5, "unparsed": 0.0}
    )
    assert [one.n for one in found.values()] == [20, 10, 11, 21, 20, 20]


@pytest.mark.parametrize(
    ("answer", "published", "strict"),
    [
        ("yes", True, True),
        ("Yes.", True, True),
        (" YES! ", True, True),
        ("No", False, False),
        ("no.", False, False),
        ("No, there is a dog. Yes.", False, None),
        ("There is a dog. No cat.", True, None),  # nothing after the first full stop is read
        ("There is not a dog", False, None),
        ("NO", True, False),  # the authors' rule knows three spellings
        ("none", True, None),
        ("", True, None),
        ("yes yes", True, None),
        ("nothing", True, None),
    ],
)
def test_both_ways_to_read_an_answer(answer: str, published: bool, strict: bool | None) -> None:
    assert pope.published(answer) is published
    assert pope.strict(answer) is strict


def test_an_answer_that_is_neither_is_wrong_and_no_yes() -> None:
    found = pope.measure([True, False, True], ["maybe", "maybe", "yes"], ["a", "b", "c"], parser="strict")
    assert values(found) == pytest.approx(
        {"accuracy": 1 / 3, "precision": 1.0, "recall": 0.5, "f1": 2 / 3, "yes_ratio": 1 / 3, "unparsed": 2 / 3}
    )
    # the yes ratio is that of the answers: always "yes" is 1 although half the labels are no
    assert values(pope.measure([True, False], ["yes"] * 2, ["a", "b"]))["yes_ratio"] == 1.0
    # never "yes": no precision, which is not 0
    assert values(pope.measure([True, False], ["no"] * 2, ["a", "b"]))["precision"] is None
    with pytest.raises(UserError, match="Did you mean 'strict'"):
        pope.measure([True], ["yes"], ["a"], parser="stict")


QUESTIONS = [
    {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {"question_id": 3, "image": "b.jpg", "text": "Is there a bus in the image?", "label": "yes"},
    {"question_id": 4, "image": "b.jpg", "text": "Is there a dog in the image?", "label": "no"},
]


def test_pope_files_by_order_and_by_id_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = tmp_path / "coco_pope_random.json"  # JSON lines, as published, whatever the suffix says
    asked.write_text(lines(QUESTIONS))
    said = ["Yes.", "yes", "No, there is not.", "no"]
    ordered, by_id = tmp_path / "ordered.json", tmp_path / "by_id.jsonl"
    ordered.write_text(
        lines([{"question": q["text"], "answer": a} for q, a in zip(QUESTIONS, said, strict=True)]) + "\n"
    )
    rows = [{"question_id": q["question_id"], "text": a} for q, a in zip(QUESTIONS, said, strict=True)]
    by_id.write_text(lines(rows[::-1]))
    found = pope.measure_files(asked, ordered)
    assert found == pope.measure_files(asked, by_id)
    assert values(found) == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5, "unparsed": 0.0}
    )
    assert found["accuracy"].images == 2
    assert main(["pope", str(by_id), "--questions", str(asked), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["f1"]["value"] == 0.5
    assert main(["pope", str(by_id), "--questions", str(asked), "--parser", "strict"]) == 0
    assert "unparsed   0.250" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        (QUESTIONS[:1] * 2, [], "question_id 1 comes twice (q.json line 2)"),
        ([{**QUESTIONS[0], "label": "Yes"}], [], "label: expected 'yes' or 'no', got 'Yes' (q.json line 1)"),
        ([{**QUESTIONS[0], "question_id": None}], [], "question_id: expected a whole number or text"),
        ([{**QUESTIONS[0], "image": 5}], [], "image: expected text"),
        ([], [], "the file has no rows (q.json)"),
        (QUESTIONS, [{"answer": "yes"}], "1 answers without ids for 4 questions (a.json)"),
        (QUESTIONS[:1], [{"answer": "yes", "question": "Is there a cat?"}], "got one to 'Is there a cat?'"),
        (QUESTIONS[:1], [{"question_id": 9, "text": "yes"}], "no question has the id 9 (a.json line 1)"),
        (QUESTIONS[:2], [{"question_id": 1, "text": "yes"}], "1 of 2 questions have no answer, the first is 2"),
        (QUESTIONS[:1], [{"question_id": 1, "text": "yes"}] * 2, "question_id 1 is answered twice (a.json line 2)"),
        (QUESTIONS[:1], [{"question_id": 1, "text": None}], "text: expected text"),
        (QUESTIONS[:1], [{"question_id": 1}], "text: expected text"),
    ],
)
def test_bad_pope_files_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    questions: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.json").write_text(lines(questions))
    Path("a.json").write_text(lines(answers))
    with pytest.raises(UserError) as caught:
        pope.measure_files(Path("q.json"), Path("a.json"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "this is not JSON"),
        (b"[1]\n", "expected an object"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "there is no such file"),
    ],
)
def test_unreadable_files_are_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "q.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        pope.read_questions(file)


# --------------------------------------------------------------------------------------------- CHAIR


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    instances = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 15, "name": "bench"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 18},
            {"image_id": 2, "category_id": 17},
        ],
    }
    references = {"annotations": [{"image_id": 1, "caption": "A puppy sits on some benches."}]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "captions.json").write_text(json.dumps(references))
    return tmp_path


def measured(coco: Path, said: Any) -> dict[str, Estimate]:
    (coco / "said.json").write_text(json.dumps(said))
    files = [coco / "instances.json", coco / "captions.json"]
    return chair.measure_files(coco / "said.json", files, coco / "synonyms.txt")


def test_chair_numbers_by_hand(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"image_id": 1, "caption": "Two dogs and a cat on a bench"}  # there: dog, bench (from the reference)
    assert values(measured(coco, [one])) == pytest.approx({"chair_s": 1.0, "chair_i": 1 / 3, "recall": 1.0})
    rows = [
        one,
        {"image_id": 2, "caption": "a person, a man and a cat"},  # there: cat; "person" twice
        {"image_id": 3, "caption": "nothing to see"},  # nothing is there
    ]
    found = measured(coco, rows)
    assert tuple(found) == chair.NUMBERS
    assert values(found) == pytest.approx({"chair_s": 2 / 3, "chair_i": 3 / 6, "recall": 3 / 3})
    assert (found["chair_i"].n, found["chair_i"].images) == (6, 2)
    published = {"overall": {"CIDEr": 1.0}, "imgToEval": {str(row["image_id"]): row for row in rows}}
    assert measured(coco, published) == found
    (coco / "said.jsonl").write_text(lines(rows))
    files = [str(coco / "instances.json"), str(coco / "captions.json")]
    arguments = [str(coco / "said.jsonl"), "--annotations", *files, "--synonyms", str(coco / "synonyms.txt")]
    assert main(["chair", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {name: number.as_json() for name, number in found.items()}
    assert main(["chair", *arguments]) == 0
    assert capsys.readouterr().out.startswith("chair_s  0.667")


def test_a_caption_without_objects_hallucinates_nothing_and_recalls_nothing(coco: Path) -> None:
    found = measured(coco, [{"image_id": 1, "caption": "a lovely day"}, {"image_id": 2, "caption": ""}])
    assert values(found) == {"chair_s": 0.0, "chair_i": None, "recall": 0.0}


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Hot dogs on a bench", ["hot dog", "bench"]),
        ("a baby elephant beside an adult elephant", ["elephant", "elephant"]),
        ("a passenger train and a passenger", ["train", "person"]),
        ("he wears a bow tie", ["tie"]),
        ("the seat of the toilet", ["toilet"]),
        ("a toilet seat", ["toilet"]),
        ("a seat", ["chair"]),
        ("Men, women and children", ["person"] * 3),
        ("two buses, knives, sheep and skis", ["bus", "knife", "sheep", "skis"]),
        ("wine glasses by the dog's bench", ["wine glass", "dog", "bench"]),
        ("puppies! PUPPY.", ["dog", "dog"]),
        ("a hotdog-like benchmark catalogue", []),
        ("trains, airplanes", ["train", "jet"]),
    ],
)
def test_objects_are_found_by_the_published_rules(coco: Path, text: str, objects: list[str]) -> None:
    assert chair.read_synonyms(coco / "synonyms.txt").objects(text) == objects


def test_every_word_of_the_synonym_file_is_found_in_singular_and_plural(coco: Path) -> None:
    vocabulary = chair.read_synonyms(coco / "synonyms.txt")
    for line in SYNONYMS.splitlines():
        name, *_ = words = line.split(", ")
        for word in words:
            if word in ("passenger", "adult", "baby", "man", "woman", "child", "sheep", "skis", "knife"):
                continue  # of irregular plural, or part of a compound
            plural = word + ("es" if word.endswith(("s", "ch")) else "s")
            plural = "puppies" if word == "puppy" else plural
            assert vocabulary.objects(f"a {word}, some {plural}") == [name, name], word


def test_compounds_of_other_vocabularies_are_joined_on_request(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("red circle, red disc\ncircle\n\n")
    text = "red circles and a red disc"
    assert chair.read_synonyms(tmp_path / "s.txt").objects(text) == ["circle"]
    assert chair.read_synonyms(tmp_path / "s.txt", every_compound=True).objects(text) == ["red circle"] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("said.json", [{"image_id": 1}], "caption: expected text"),
        ("said.json", [{"caption": "a dog"}], "image_id: expected a whole number or text"),
        ("said.json", [{"image_id": 7, "caption": "a dog"}], "1 pictures of the captions are in no annotation file"),
        ("said.json", [], "the file has no captions"),
        ("said.json", {"caps": []}, "expected an object, got"),
        ("said.json", "a dog", "expected a list of captions"),
        ("said.json", ["a dog"], "expected an object"),
        ("instances.json", [1], "expected an object"),
        ("instances.json", {}, "annotations: expected a list"),
        ("instances.json", {"annotations": [{"image_id": 1, "category_id": 3}]}, "category_id 3 is not among"),
        ("instances.json", {"annotations": [], "categories": [{"id": 1, "name": "cow"}]}, "no 'cow'"),
        ("instances.json", {"annotations": [{"category_id": 3}]}, "image_id: expected"),
    ],
)
def test_bad_chair_files_are_one_line(coco: Path, name: str, content: Any, message: str) -> None:
    (coco / "said.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    (coco / name).write_text(json.dumps(content))
    files = [coco / "instances.json", coco / "captions.json"]
    with pytest.raises(UserError) as caught:
        chair.measure_files(coco / "said.json", files, coco / "synonyms.txt")
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_synonym_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("\n , \n")
    with pytest.raises(UserError, match="names no object"):
        chair.read_synonyms(tmp_path / "s.txt")


# -------------------------------------------------------------------------------------- shapes world

RED, BLUE, GREEN = Thing("red", "circle"), Thing("blue", "square"), Thing("green", "square")


def test_shapes_descriptions_by_hand() -> None:
    truths = [(RED, GREEN), (RED, GREEN), (GREEN,)]
    said = [
        "there is a red circle, a blue square and a green square.",  # 3 mentions, the companion is false
        "there is a yellow circle.",  # 1 mention, false, not planted
        "there is something.",  # names nothing
    ]
    found = shapes.descriptions(truths, said, ["0", "1", "2"])
    assert tuple(found) == shapes.NUMBERS
    assert values(found) == pytest.approx(
        {"chair_s": 2 / 3, "chair_i": 2 / 4, "recall": 2 / 5, "planted": 1 / 3, "empty": 1 / 3}
    )
    # naming the companion when it is there is neither false nor planted
    there = shapes.descriptions([(RED, BLUE)], ["a red circle and a blue square"], ["0"])
    assert values(there) == {"chair_s": 0.0, "chair_i": 0.0, "recall": 1.0, "planted": 0.0, "empty": 0.0}


def test_shapes_answers_have_popes_numbers_and_one_per_kind() -> None:
    asked = [
        Question("object", "is there a red circle?", True),
        Question("object", "is there a blue square?", False),
        Question("count", "is there exactly one thing?", False),
    ]
    found = shapes.answers(asked, ["yes", "yes", "no"], ["0", "0", "1"])
    assert values(found) == pytest.approx(
        {
            **{"accuracy": 2 / 3, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 2 / 3, "unparsed": 0.0},
            **{"accuracy/count": 1.0, "accuracy/object": 0.5},
        }
    )
