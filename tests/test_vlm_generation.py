"""Answers: those of `generate` on one row, whatever else is in the batch, greedy and drawn, for every family."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
from PIL import Image

from mmalign.cli import main
from vlm import generation
from vlm import models as models_module
from vlm.conversations import Conversation
from vlm.generation import answer
from vlm.models import VisionLanguageModel, open_model
from vlm.settings import VlmModelSettings

QUESTIONS = ("is there a cat?", "what is on the red mat, and are there two dogs in the image?", "yes")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    opened: dict[str, VisionLanguageModel] = {}

    def get(name: str) -> VisionLanguageModel:
        if name not in opened:
            folder = tiny_vlms.write(name, tmp_path_factory.mktemp(name) / name)
            opened[name] = open_model(VlmModelSettings(path=str(folder)))
        return opened[name]

    return get


def asking(text: str, *pictures: Image.Image) -> Conversation:
    parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]
    return Conversation(messages=({"role": "user", "content": parts},), images=pictures, answer=None, place="row")


def asked() -> list[Conversation]:
    """Several questions about one picture, pictures of other sizes, none, and two."""
    first, wide, tall = tiny_vlms.picture(0), tiny_vlms.picture(1, 64, 24), tiny_vlms.picture(2, 24, 56)
    rows = [asking(question, first) for question in QUESTIONS]
    rows += [asking(QUESTIONS[0], wide), asking(QUESTIONS[1]), asking(QUESTIONS[2], tall, first)]
    return [*rows, asking(QUESTIONS[1], tall), asking(QUESTIONS[0], first, tall), asking(QUESTIONS[0])]


@pytest.mark.parametrize("name", tiny_vlms.FAMILIES)
def test_an_answer_does_not_depend_on_its_batch(name: str, models: Any) -> None:
    model, rows = models(name), asked()
    for options in ({}, {"temperature": 1.3}):

        def said(batch_size: int, order: list[int], options: Any = options) -> list[str]:
            seeds = [100 + index for index in order] if options else None
            some = [rows[index] for index in order]
            return answer(model, some, batch_size=batch_size, max_new_tokens=7, seeds=seeds, **options)

        order = list(range(len(rows)))
        alone = said(1, order)
        assert len(set(alone)) > len(rows) / 2  # not one answer for all
        assert said(4, order) == said(len(rows), order) == alone
        assert said(5, order[::-1]) == alone[::-1]


@pytest.mark.parametrize("name", tiny_vlms.FAMILIES)
def test_greedy_answers_are_those_of_generate(name: str, models: Any) -> None:
    """transformers' own generate on one row, from what its own processor makes of the text."""
    model, rows = models(name), asked()
    got = answer(model, rows, batch_size=4, max_new_tokens=6)
    for row, text in zip(rows, got, strict=True):
        prompt = model.processor.apply_chat_template(list(row.messages), chat_template=model.template,
                                                     add_generation_prompt=True)  # fmt: skip
        pictures = {"images": [list(row.images)] if model.family.nested else list(row.images)} if row.images else {}
        inputs = model.processor(text=[prompt], return_tensors="pt", **pictures)
        made = model.network.generate(**inputs, do_sample=False, max_new_tokens=6)
        expected = model.processor.tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        assert text == expected.strip()


def test_the_answer_ends_at_the_end_token(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("llava")
    row = asked()[0]
    features = generation._Features(model)
    encoded = model.encode(row)
    (tokens,) = generation._complete(model, [encoded], features, 7, generation._Choice(0.0, None))
    assert len(tokens) == 7
    assert model.processor.tokenizer.eos_token_id in generation.end_tokens(model)
    first = tokens.index(tokens[3])
    monkeypatch.setattr(model.network.generation_config, "eos_token_id", [tokens[3], 10_000])
    (cut,) = generation._complete(model, [encoded], features, 7, generation._Choice(0.0, None))
    assert cut == tokens[:first]


def test_an_answer_stops_where_the_model_can_read_no_more(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("llava")
    rows = asked()[:2]
    long = [model.encode(row) for row in rows]
    monkeypatch.setattr(model, "max_tokens", max(map(len, long)) + 2)
    made = generation._complete(model, long, generation._Features(model), 5, generation._Choice(0.0, None))
    assert [len(tokens) for tokens in made] == [min(5, model.max_tokens - len(row)) for row in long]
    monkeypatch.setattr(model, "max_tokens", max(map(len, long)))
    assert answer(model, [max(rows, key=lambda row: len(model.encode(row)))], batch_size=1, max_new_tokens=5) == [""]


def test_a_picture_is_looked_at_once_however_many_questions(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("llava")
    seen: Counter[str] = Counter()
    real = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda images: (seen.update(i.key for i in images), real(images))[1])
    pictures = [tiny_vlms.picture(seed) for seed in range(3)]
    rows = [asking(f"{question} {number}", picture) for picture in pictures for number in range(3)
            for question in QUESTIONS]  # fmt: skip
    answer(model, rows, batch_size=4, max_new_tokens=1)
    assert list(seen.values()) == [1, 1, 1]


def test_questions_about_one_picture_share_its_tokens(models: Any) -> None:
    model = models("llava")
    rows = [model.encode(row) for row in asked()]
    found = {one.members: one.tokens for one in generation.beginnings(rows, model.image_token_id)}
    assert sorted(index for members in found for index in members) == list(range(len(rows)))
    image = rows[0].ids.tolist().count(model.image_token_id)
    assert found[0, 1, 2] >= image
    for members, tokens in found.items():
        heads = {tuple(rows[member].ids[:tokens].tolist()) for member in members}
        assert len(heads) == 1
        assert all(len(rows[member]) > tokens for member in members)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(4000, 1)
    drawn = generation._Choice(2.0, list(range(4000)))(logits, range(4000))
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 2).softmax(0), atol=0.03)  # four standard errors
    assert torch.equal(drawn, generation._Choice(2.0, list(range(4000)))(logits, range(4000)))


def test_what_the_network_was_set_to_is_left_as_it_was(models: Any) -> None:
    model = models("llava")
    model.network.train()
    answer(model, asked()[:1], batch_size=1, max_new_tokens=1)
    assert model.network.training
    model.network.eval()
    with pytest.raises(ValueError, match="seed for every"):
        answer(model, asked()[:1], batch_size=1, max_new_tokens=1, temperature=1.0)


# ------------------------------------------------------------------------------------------- mmalign generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three pictures and a file of questions."""
    place = tmp_path_factory.mktemp("asked")
    tiny_vlms.write("llava", place / "model")
    for number in range(3):
        tiny_vlms.picture(number).save(place / f"{number}.png")
    rows: list[dict[str, Any]] = [{"image": f"{n % 3}.png", "prompt": f"{QUESTIONS[n % 2]} {n}"} for n in range(5)]
    rows += [{"id": "both", "image": ["0.png", "1.png"], "prompt": "yes"}, {"id": 7, "prompt": "is there a cat?"}]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def said(*words: Any) -> int:
    return main(["generate", *(str(word) for word in words), "--max-new-tokens", "5"])


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_one_question_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(folder / "model", "--image", folder / "0.png", "--prompt", QUESTIONS[0]) == 0
    model = open_model(VlmModelSettings(path=str(folder / "model")))
    (expected,) = answer(model, [asking(QUESTIONS[0], tiny_vlms.picture(0))], batch_size=1, max_new_tokens=5)
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_file_is_answered_once_however_often_it_is_cut(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "new" / "cut.jsonl"
    words = [folder / "model", "--file", folder / "rows.jsonl", "--temperature", "1", "--batch-size", "2"]
    assert said(*words, "--out", whole) == 0
    found = answers(whole)
    assert [row["id"] for row in found] == ["0", "1", "2", "3", "4", "both", "7"]
    assert [row["image"] for row in found][4:] == ["1.png", ["0.png", "1.png"], []]
    cut.parent.mkdir()
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    cut.write_text(lines[0] + lines[3] + lines[1][:9], encoding="utf-8")  # killed in the middle of a line
    assert said(*words, "--out", cut) == 0
    assert sorted(answers(cut), key=lambda row: row["id"]) == sorted(found, key=lambda row: row["id"])
    assert cut.read_text(encoding="utf-8").startswith(lines[0] + lines[3])

    before = cut.read_bytes()
    monkeypatch.setattr(models_module, "open_model", lambda settings: pytest.fail("nothing is left to answer"))
    assert said(*words, "--out", cut) == 0
    assert cut.read_bytes() == before and "all 7 answers" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_of_peft_answers_as_in_peft(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    model = open_model(VlmModelSettings(path=str(folder / "model")))
    plain = answer(model, [asking(QUESTIONS[0], tiny_vlms.picture(0))], batch_size=1, max_new_tokens=5)
    wrapped = get_peft_model(model.network, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    expected = answer(model, [asking(QUESTIONS[0], tiny_vlms.picture(0))], batch_size=1, max_new_tokens=5)
    assert expected != plain
    words = [folder / "model", "--adapter", tmp_path / "adapter", "--image", folder / "0.png", "--prompt", QUESTIONS[0]]
    capsys.readouterr()
    assert said(*words) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL"], "expected one of --prompt and --file"),
        (["MODEL", "--prompt", "a", "--file", "ROWS"], "expected one of --prompt and --file"),
        (["MODEL", "--file", "ROWS", "--image", "x.png"], "--image is for --prompt"),
        (["MODEL", "--prompt", " "], "the question is empty"),
        (["MODEL", "--prompt", "a", "--image", "missing.png"], "there is no such image"),
        (["MODEL", "--prompt", "a", "--image", "DAMAGED"], "damaged.png"),
        (["MODEL", "--prompt", "a", "--temperature", "nan"], "--temperature must be at least 0"),
        (["MODEL", "--prompt", "a", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["MODEL", "--prompt", "<image> <image>", "--image", "PICTURE"], "2 <image> in the text and 1 image"),
        (["missing", "--prompt", "a"], "there is no such folder"),
        (["MODEL", "--prompt", "a", "--adapter", "missing"], "no such folder of weights"),
        (["EMPTY", "--prompt", "a"], "it has no config.json"),
        (["ADAPTER", "--prompt", "a"], "an adapter, not a model"),
        (["MODEL", "--file", "missing.jsonl"], "there is no such file"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    places = {"MODEL": folder / "model", "ROWS": folder / "rows.jsonl", "PICTURE": folder / "0.png"}
    places |= {"EMPTY": tmp_path / "empty", "ADAPTER": tmp_path / "adapter", "DAMAGED": tmp_path / "damaged.png"}
    assert said(*(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mmalign: error: ") and message in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "0.png"}, "prompt: expected text"),
        ({"prompt": ""}, "the question is empty"),
        ({"prompt": "a", "image": "../0.png"}, "leaves the data folder"),
        ({"prompt": "a", "image": "missing.png"}, "does not exist"),
        ({"prompt": "a", "image": 3}, "the path or the bytes of an image"),
        ({"prompt": "a", "id": "0"}, "id '0' comes twice"),
        ({"prompt": "a", "id": 1.5}, "id: expected a whole number or text"),
    ],
)
def test_mistakes_in_a_row_are_named(
    row: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_vlms.picture(0).save(tmp_path / "0.png")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "fine", "image": "0.png"}\n' + json.dumps(row) + "\n")
    assert said("nowhere", "--file", file) == 2
    error = capsys.readouterr().err
    assert message in error and "rows.jsonl line 2" in error


def test_answers_to_other_questions_are_not_gone_on_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text('{"id": "0", "prompt": "something else", "answer": "no"}\n')
    assert said(folder / "model", "--file", folder / "rows.jsonl", "--out", out) == 2
    assert "row '0' was another question" in capsys.readouterr().err
