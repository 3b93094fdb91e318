"""The embedded vision-language model's build, at a tiny size: what is taught, how it is packed, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from mmalign.errors import UserError
from mmalign.shapes import render, talk
from mmalign.shapes.scenes import Scene, Thing
from vlm import build

TINY = build.Size(width=32, layers=1, pictures=24, questions=1, every=1, quick=3, final=4)
SCENES = talk.draw(6, split="train", seed=2)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model, processor = build.new_vlm(TINY, seed=0)
    return model.eval(), processor


def asked(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def test_every_word_of_the_world_is_one_token_and_any_text_comes_back(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1].tokenizer
    assert len(tokenizer) < 1000  # training stopped because nothing was left to merge
    words = {word for scene in SCENES for question in talk.questions(scene) for word in question.text.split()}
    for word in words:
        assert len(tokenizer(f" {word.rstrip('?')}", add_special_tokens=False).input_ids) == 1
    for text in ("there is a red circle, and a blue square.", "Grüße, [MASK] ☃\n", "yes"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]


def test_packed_lessons_are_what_the_processor_makes_of_the_conversation(tiny: tuple[Any, Any]) -> None:
    """Token by token: the prefix and each turn are the template's text, which has the prompt as a prefix."""
    model, processor = tiny
    lessons = build.prepare(SCENES, processor, pairs=1, seed=0)
    for index, scene in enumerate(SCENES):
        picture = Image.fromarray(render.render(scene, talk.picture_seed(0, index, split="train")))
        messages = asked(talk.DESCRIBE)
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == f"USER: <image>\n{talk.DESCRIBE} ASSISTANT:"
        answer = {"role": "assistant", "content": [{"type": "text", "text": talk.describe(scene)}]}
        whole = processor.apply_chat_template([*messages, answer])
        assert whole == f"{prompt} {talk.describe(scene)}</s>"
        inputs = processor(images=[picture], text=[whole], return_tensors="pt")
        turn = lessons.turns[index][0]
        assert inputs.input_ids[0].tolist() == [*lessons.prefix, *turn.ids]
        ahead = processor(images=[picture], text=[prompt], return_tensors="pt").input_ids[0].tolist()
        assert ahead == [*lessons.prefix, *turn.ids[: turn.answer]]
        torch.testing.assert_close(inputs.pixel_values, build.scaled(lessons.pixels[[index]]))
    assert inputs.input_ids[0].tolist().count(model.config.image_token_id) == model.config.image_seq_length == 64


def test_lessons_are_balanced(tiny: tuple[Any, Any]) -> None:
    lessons = build.prepare(SCENES, tiny[1], pairs=2, seed=0)
    end = tiny[1].tokenizer.eos_token_id
    for turns in lessons.turns:
        answers = [tiny[1].tokenizer.decode(turn.ids[turn.answer :]).strip() for turn in turns[1:]]
        assert all(turn.ids[-1] == end for turn in turns)
        assert answers.count("yes</s>") == answers.count("no</s>") == len(answers) // 2
        assert len(answers) in (4, 6)  # one thing alone has one true object question


def test_turns_that_share_a_sequence_see_nothing_of_each_other(tiny: tuple[Any, Any]) -> None:
    """The packed loss is that of every turn alone, to rounding."""
    model, processor = tiny
    lessons = build.prepare(SCENES[:3], processor, pairs=1, seed=0)
    packed = build.pack(lessons, [0, 1, 2], processor.tokenizer.pad_token_id)
    pixels = build.scaled(lessons.pixels)
    with torch.no_grad():
        together = build.lesson_loss(model, packed, pixels)
        total, count = 0.0, 0
        for index, turns in enumerate(lessons.turns):
            for turn in turns:
                ids = torch.tensor([[*lessons.prefix, *turn.ids]])
                logits = model(input_ids=ids, pixel_values=pixels[[index]]).logits[0]
                first = len(lessons.prefix) + turn.answer
                losses = functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")
                total, count = total + losses.item(), count + ids.shape[1] - first
    assert int((packed.target != -100).sum()) == count
    assert together.item() == pytest.approx(total / count, rel=1e-5)


def test_batches_hold_every_picture_once_and_are_of_about_one_length(tiny: tuple[Any, Any]) -> None:
    lessons = build.prepare(talk.draw(64, split="train", seed=3), tiny[1], pairs=1, seed=0)
    drawn = build.batches(lessons, 4, np.random.default_rng(0))
    epoch = [next(drawn) for _ in range(16)]
    assert sorted(picture for batch in epoch for picture in batch) == list(range(64))
    lengths = [[lessons.length(picture) for picture in batch] for batch in epoch]
    within = np.mean([max(some) - min(some) for some in lengths])
    everywhere = max(map(max, lengths)) - min(map(min, lengths))
    assert within < everywhere / 4
    assert [next(drawn) for _ in range(16)] != epoch


def test_answers_do_not_depend_on_what_is_asked_beside(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    pixels = build.pictures_of(SCENES[:3], split="train", seed=0)
    prompts = [talk.DESCRIBE, "is there a red circle?", "is the red circle left of the blue square?"]
    together = build.say(model, processor, pixels, prompts)
    alone = [build.say(model, processor, pixels[[i]], [prompts[i]])[0] for i in range(3)]
    assert together == alone
    assert len(together) == 3


def test_the_build_writes_a_folder_that_opens_with_the_auto_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out = tmp_path / "vlm"
    build.build_vlm(out, steps=2, batch=4, seed=0, size=TINY)
    checkpoint, final = map(json.loads, capsys.readouterr().out.splitlines())
    assert checkpoint["step"] == 1
    assert {"chair_s", "chair_i", "recall", "planted", "yes_no/accuracy", "yes_no/yes_ratio"} <= set(checkpoint)
    assert final["step"] == 2
    for name in ("chair_s", "yes_no/accuracy", "pope_adversarial/f1", "pope_popular/yes_ratio", "pope_random/recall"):
        assert set(final[name]) == {"value", "ci95", "n", "images"}
    assert final["yes_no/accuracy"]["images"] == 4
    for folder in (out / "step-1", out):
        model: Any = AutoModelForImageTextToText.from_pretrained(folder)
        processor: Any = AutoProcessor.from_pretrained(folder)
        assert type(model).__name__ == "LlavaForConditionalGeneration"
        assert model.dtype == torch.float16
    picture = Image.fromarray(render.render(Scene((Thing("red", "circle"),)), 0))
    prompt = processor.apply_chat_template(asked("is there a red circle?"), add_generation_prompt=True)
    inputs = processor(images=[picture], text=[prompt], return_tensors="pt")
    said = model.float().generate(**inputs, do_sample=False, max_new_tokens=3)
    assert said.shape[1] > inputs.input_ids.shape[1]
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) < 6e6
    with pytest.raises(UserError, match="not empty"):
        build.build_vlm(out, steps=2, batch=4, seed=0, size=TINY)


def test_training_lowers_the_loss(tiny: tuple[Any, Any]) -> None:
    model, processor = build.new_vlm(TINY, seed=1)
    lessons = build.prepare(SCENES, processor, pairs=1, seed=0)
    packed = build.pack(lessons, range(6), processor.tokenizer.pad_token_id)
    pixels = build.scaled(lessons.pixels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = build.lesson_loss(model, packed, pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
