"""Answers: those of `generate` on one row, whatever else is in the batch, greedy and drawn, for every family."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_vlms
import torch
from PIL import Image

from vlm import generation
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
