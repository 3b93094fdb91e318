"""Optimizers by name, the learning rate as a function of the update, and the average of the weights."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from mmalign.config import OptimSettings
from mmalign.errors import UserError
from mmalign.optimizers import Average, full, make_optimizer, rate


def rates(steps: int, **options: Any) -> list[float]:
    return [rate(step, steps, OptimSettings(lr=1.0, **options)) for step in range(steps)]


def test_learning_rates_of_every_schedule() -> None:
    assert rates(3) == [1, 1, 1]
    assert rates(4, schedule="constant_with_warmup", warmup_steps=2) == [0.5, 1, 1, 1]
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(6, schedule="linear", warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="cosine") == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert rates(10, schedule="cosine", warmup_fraction=0.2)[:3] == [0.5, 1, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_rate_never_reaches_zero_before_the_run_ends(schedule: Any) -> None:
    values = rates(100, schedule=schedule)
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < 0.02
    assert rate(100, 100, OptimSettings(lr=1.0, schedule=schedule)) == pytest.approx(0)


def test_a_warm_up_longer_than_the_run_is_the_run() -> None:
    assert rates(2, schedule="cosine", warmup_steps=4) == [0.25, 0.5]


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0]))


def test_adamw_takes_its_settings() -> None:
    options = {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.01}
    optimizer = make_optimizer([parameter()], OptimSettings(**options))  # type: ignore[arg-type]  # one dict, many types
    assert isinstance(optimizer, torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in options} == options
    assert group["fused"]


def test_adamw_step_by_hand() -> None:
    weights = parameter()
    optimizer = make_optimizer([weights], OptimSettings(lr=0.1, weight_decay=0.5))
    weights.grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    # the first bias-corrected step is lr * sign(gradient); decay shrinks by lr * weight_decay first
    torch.testing.assert_close(weights.detach(), torch.tensor([0.95 - 0.1, -1.9 + 0.1]))


def test_adafactor_and_the_8_bit_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    adafactor = make_optimizer([parameter()], OptimSettings(name="adafactor", lr=0.1))
    assert isinstance(adafactor, torch.optim.Adafactor)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    with pytest.raises(UserError) as caught:
        make_optimizer([parameter()], OptimSettings(name="adamw8bit", lr=0.1))
    assert str(caught.value) == (
        "8-bit AdamW needs bitsandbytes (optim.name). pip install 'mmalign[bitsandbytes]', or use adamw."
    )


def test_the_average_follows_its_formula_and_swaps_bit_for_bit() -> None:
    weights = nn.Parameter(torch.tensor([0.1]))
    average = Average([weights], decay=0.9)
    expected = 0.1
    for step, value in enumerate([1.0, 2.0, 3.0]):
        weights.data.fill_(value)
        average.update([weights], step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with pytest.raises(RuntimeError, match="inside"), average.swapped_in([weights]):
        assert weights.item() == pytest.approx(expected)
        raise RuntimeError("inside")
    assert weights.item() == 3.0


def test_an_average_of_half_precision_weights_is_kept_in_fp32_and_restored_exactly() -> None:
    weights = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = Average([weights], decay=0.999)
    for step in range(5):
        weights.data.mul_(1.01)
        average.update([weights], step)
    state = average.state_dict()
    assert [value.dtype for value in state["values"]] == [torch.float32]
    other = Average([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], decay=0.999)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["values"][0], state["values"][0])
    with pytest.raises(ValueError, match=r"argument \d is (shorter|longer)"):
        other.load_state_dict({"values": []})


def test_a_tensor_that_is_not_sharded_is_whole() -> None:
    value = torch.ones(2)
    assert full(value) is value
