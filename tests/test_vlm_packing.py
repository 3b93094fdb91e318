"""Rows that share their beginnings against rows apart, for every family: values, gradients, and what is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_vlms import FAMILIES, picture, write
from vlm.adapters import add_lora
from vlm.attention import Group, grouped_attention
from vlm.batch import Row
from vlm.conversations import Conversation
from vlm.models import Policy, VisionLanguageModel, open_model
from vlm.packing import apart, shared
from vlm.settings import VlmLoraSettings, VlmModelSettings


def asked(text: str, answer: str, *pictures: int) -> Conversation:
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text}]
    return Conversation(
        messages=({"role": "user", "content": content},),
        images=tuple(picture(seed, 40 + 8 * seed, 56) for seed in pictures),
        answer=answer,
        place="row",
    )


ROWS = (
    asked("what is it?", "a red circle", 0),
    asked("what is it?", "two of them and one more", 0),
    asked("what is it?", "a red circle", 1),
    asked("what else?", "no", 0, 1),
    asked("what is it?", "none", 0),
    asked("hello", "yes"),
)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> VisionLanguageModel:
    return open_model(VlmModelSettings(path=str(write(request.param, tmp_path / "model"))))


def one_by_one(model: VisionLanguageModel, rows: Sequence[Row]) -> Tensor:
    """Sums of plain forwards of a row each, by the path that shares nothing."""
    return torch.cat([model.logps(model.collate([row])).sums() for row in rows])


def test_equal_to_separate_forwards(model: VisionLanguageModel) -> None:
    rows = [model.encode(row) for row in ROWS]
    assert model.unshared is None
    answers = model.answers(rows)
    assert answers.groups is not None and len(answers.groups) == 4 and len(answers.ids) == 1
    beginnings = sum(len(row) for row in rows) - answers.ids.shape[1]
    assert beginnings == 2 * (len(rows[0]) - int(rows[0].completion.sum()))
    policy = Policy(model)
    with torch.no_grad():
        found = policy(answers)[0]
        expected = one_by_one(model, rows)
    torch.testing.assert_close(found.sum(1), expected, rtol=1e-5, atol=1e-5)
    assert (answers.completion.sum(1) == torch.tensor([int(row.completion.sum()) for row in rows])).all()
    assert not found[~answers.completion].any()


def test_apart_is_equal_too(model: VisionLanguageModel) -> None:
    rows = [model.encode(row) for row in ROWS]
    model.unshared = "a test"
    answers = model.answers(rows)
    assert answers.groups is None and len(answers.ids) == len(rows)
    with torch.no_grad():
        torch.testing.assert_close(Policy(model)(answers)[0].sum(1), one_by_one(model, rows), rtol=1e-5, atol=1e-5)


def test_gradients_are_equal(model: VisionLanguageModel) -> None:
    add_lora(model.network, model.family, VlmLoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
    rows = [model.encode(row) for row in ROWS]
    weights = torch.linspace(-1, 2, len(rows))
    gradients = []
    for way in ("shared", "apart"):
        model.unshared = None if way == "shared" else "a test"
        model.network.zero_grad()
        (Policy(model)(model.answers(rows))[0].sum(1) * weights).sum().backward()
        gradients.append([p.grad.clone() for p in model.network.parameters() if p.grad is not None])
    assert gradients[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_attention_is_that_of_the_block_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 12, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(1, 2, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    # group one: tokens 0-3 begin, answers 4-5 and 6-8; group two: one row, 9-11
    owner = torch.tensor([0, 0, 1, 1, 1])
    mask = torch.cat([torch.ones(5, 4), ((owner[:, None] == owner) & torch.ones(5, 5).tril().bool()).float()], 1)
    groups = (
        Group(start=0, answers=4, stop=9, mask=mask.bool()),
        Group(start=9, answers=10, stop=12, mask=None),
    )
    found = grouped_attention(q, k, v, groups)
    sees = {t: list(range(t + 1)) for t in range(6)} | {t: [0, 1, 2, 3, *range(6, t + 1)] for t in range(6, 9)}
    sees |= {t: list(range(9, t + 1)) for t in range(9, 12)}
    for token, seen in sees.items():
        for head in range(4):
            weights = torch.softmax(k[0, head // 2, seen] @ q[0, head, token] / 8**0.5, 0)
            torch.testing.assert_close(found[0, head, token], weights @ v[0, head // 2, seen])


def test_rows_without_answer_or_beginning_are_a_bug() -> None:
    row = Row(ids=torch.arange(3), completion=torch.zeros(3, dtype=torch.bool), images=(), place="r")
    with pytest.raises(ValueError, match="an answer"):
        shared([row], [torch.arange(3)])
    with pytest.raises(ValueError, match="a beginning"):
        apart(
            [Row(ids=torch.arange(3), completion=torch.ones(3, dtype=torch.bool), images=(), place="r")],
            [torch.arange(3)],
            pad_id=0,
        )


def test_what_else_might_have_been_said(tmp_path: Path) -> None:
    model = open_model(VlmModelSettings(path=str(write("llava", tmp_path / "model")), logits_chunk=3))
    rows = [model.encode(row) for row in ROWS[:3]]
    answers, policy = model.answers(rows), Policy(model)
    with torch.no_grad():
        batch = model.collate(rows)
        logits = model.network.get_output_embeddings()(model.hidden_states(batch)).log_softmax(-1)
        best = policy(answers, choose=True)
        kinds = policy(answers, also="strongest")
        others = policy(answers, also="strongest other")
        given = policy(answers, also=best)
    for number, row in enumerate(rows):
        start = len(row) - int(row.completion.sum())
        for step in range(int(row.completion.sum())):
            here, label = logits[number, start + step - 1], int(row.ids[start + step])
            assert int(best[number, step]) == int(here.argmax())
            torch.testing.assert_close(kinds[:, number, step], torch.stack([here[label], here.max()]))
            rest = torch.cat([here[:label], here[label + 1 :]]).max()
            torch.testing.assert_close(others[1, number, step], rest)
    assert torch.equal(given, kinds)


def test_two_models_side_by_side(tmp_path: Path) -> None:
    settings = [
        VlmModelSettings(path=str(write("llava", tmp_path / str(seed), seed=seed)), logits_chunk=3) for seed in (0, 1)
    ]
    policy, reference = (open_model(one) for one in settings)
    rows = [policy.encode(row) for row in ROWS[:4]]
    with torch.no_grad():
        whole = []
        for model in (policy, reference):
            logits = model.network.get_output_embeddings()(model.hidden_states(model.collate(rows)))
            whole.append(logits.double().log_softmax(-1))
        for unshared in (None, "a test"):
            policy.unshared = reference.unshared = unshared
            answers = policy.answers(rows)
            theirs = Policy(reference)(answers, distributions=True)
            mine, other, divergence = Policy(policy)(answers, also=theirs)
            for number, row in enumerate(rows):
                start = len(row) - int(row.completion.sum())
                for step, token in enumerate(row.ids[start:].tolist()):
                    p, q = (logps[number, start + step - 1] for logps in whole)
                    found = torch.stack([each[number, step] for each in (mine, other, divergence)]).double()
                    expected = torch.stack([p[token], q[token], (q.exp() * (q - p)).sum()])
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert divergence.max() > 0.1 and not divergence[~answers.completion].any()
