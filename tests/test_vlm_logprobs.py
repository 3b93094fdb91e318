"""vlm.logprobs against loops over tokens, and how much of the logits ever exists."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm.logprobs import Distributions, TokenLogps, compared_at, token_logps

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 11, 5, 97
# right padding, left padding, and an answer in the middle of a row
SPANS = ((4, 9), (7, 11), (1, 2))


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, nn.Linear]:
    """(hidden, ids, completion, head)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator)
    completion = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    for row, (start, end) in enumerate(SPANS):
        completion[row, start:end] = True
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64))
    return hidden.to(dtype), ids, completion, head.to(dtype)


def by_hand(hidden: Tensor, ids: Tensor, head: nn.Linear) -> dict[tuple[int, int], float]:
    """log p of every completion token, one exponential at a time."""
    result = {}
    for row, (start, end) in enumerate(SPANS):
        for token in range(start, end):
            before = hidden[row, token - 1].tolist()
            logits = [sum(w * x for w, x in zip(line, before, strict=True)) for line in head.weight.tolist()]
            total = math.fsum(math.exp(logit) for logit in logits)
            result[row, token] = logits[int(ids[row, token])] - math.log(total)
    return result


@pytest.mark.parametrize("chunk", [1, 3, 10, 1000])
@pytest.mark.parametrize("graph", [True, False])
def test_every_token_by_hand(chunk: int, graph: bool) -> None:
    hidden, ids, completion, head = example()
    with torch.set_grad_enabled(graph):
        logps = token_logps(hidden, ids, completion, head, chunk=chunk)
    expected = by_hand(hidden, ids, head)
    assert len(expected) == int(completion.sum())
    for (row, token), value in expected.items():
        assert abs(float(logps.values[row, token].detach()) - value) < 1e-9
    assert not logps.values[~completion].any()
    assert logps.values.dtype == torch.float64 and logps.values.requires_grad == graph


def test_sums_counts_and_means() -> None:
    hidden, ids, completion, head = example()
    logps = token_logps(hidden, ids, completion, head, chunk=4)
    expected = by_hand(hidden, ids, head)
    sums = [sum(v for (r, _), v in expected.items() if r == row) for row in range(ROWS)]
    torch.testing.assert_close(logps.sums(), torch.tensor(sums, dtype=torch.float64))
    assert logps.counts().tolist() == [end - start for start, end in SPANS]
    torch.testing.assert_close(logps.means(), torch.tensor(sums, dtype=torch.float64) / logps.counts())


def full(hidden: Tensor, ids: Tensor, completion: Tensor, head: nn.Module) -> Tensor:
    """The plain way: logits of everything, then gather and mask."""
    logps: Tensor = head(hidden[:, :-1]).log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros_like(logps[:, :1]), logps * completion[:, 1:]], dim=1)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_gradients_are_those_of_the_full_logits(chunk: int) -> None:
    gradients = []
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)[:, None]

    def chunked(hidden: Tensor, ids: Tensor, completion: Tensor, head: nn.Linear) -> Tensor:
        return token_logps(hidden, ids, completion, head, chunk=chunk).values

    for method in (full, chunked):
        hidden, ids, completion, head = example()
        hidden.requires_grad_(True)
        (method(hidden, ids, completion, head) * weights).sum().backward()
        assert head.weight.grad is not None and hidden.grad is not None
        gradients.append((hidden.grad, head.weight.grad))
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most rows of vocabulary-wide tensors that any operation makes, the head's own weight aside."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                is_weight = tuple(tensor.shape) == (WIDTH, VOCABULARY)
                self.rows = max(self.rows, 0 if is_weight else tensor.numel() // VOCABULARY)
        return made


@pytest.mark.parametrize("chunk", [1, 3])
def test_no_more_logits_than_a_chunk_forwards_or_backwards(chunk: int) -> None:
    hidden, ids, completion, head = example(torch.float32)
    hidden.requires_grad_(True)
    seen: list[int] = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    with Largest() as largest:
        logps = token_logps(hidden, ids, completion, head, chunk=chunk)
        calls = len(seen)
        logps.values.sum().backward()
    assert largest.rows == chunk and max(seen) == chunk
    assert sum(seen[:calls]) == int(completion.sum())  # only positions that predict an answer's token
    assert sum(seen[calls:]) == int(completion.sum())  # and all of them anew in the backward: none was kept
    with Largest() as largest:
        full(hidden, ids, completion, head)
    assert largest.rows == ROWS * (TOKENS - 1)  # the plain way is seen for what it is


def test_other_positions_are_never_read() -> None:
    hidden, ids, completion, head = example()
    expected = token_logps(hidden, ids, completion, head, chunk=4).values
    needed = torch.roll(completion, -1, dims=1)
    poisoned = torch.where(needed[..., None], hidden, torch.nan)
    assert torch.equal(token_logps(poisoned, ids, completion, head, chunk=4).values, expected)


def test_half_precision_is_summed_in_fp32() -> None:
    _, ids, completion, head = example(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    # Whole numbers: bf16 logits are exact whatever the order of summation, so all that is left is the softmax.
    hidden = torch.randint(-3, 4, (ROWS, TOKENS, WIDTH), generator=generator).bfloat16()
    with torch.no_grad():
        head.weight.copy_(torch.randint(-2, 3, (VOCABULARY, WIDTH), generator=generator))
        logps = token_logps(hidden, ids, completion, head, chunk=4)
        logits = head(hidden[:, :-1])
        expected, coarse = (
            each.log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0][completion[:, 1:]]
            for each in (logits.double(), logits)
        )
    got = logps.values[completion]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert (coarse.double() - expected).abs().max() > 1e-3  # what a softmax in bf16 would have given


def test_rows_that_cannot_be_scored() -> None:
    hidden, ids, completion, head = example()
    with pytest.raises(ValueError, match="no completion token"):
        token_logps(hidden, ids, completion & torch.tensor([[True], [False], [True]]), head, chunk=4)
    completion[0, 0] = True
    with pytest.raises(ValueError, match="first token"):
        token_logps(hidden, ids, completion, head, chunk=4)


def test_shapes_are_checked() -> None:
    with pytest.raises(Exception, match="tokens"):
        TokenLogps(values=torch.zeros(2, 3), completion=torch.zeros(2, 4, dtype=torch.bool))


def two_models(dtype: torch.dtype = torch.float64) -> tuple[Distributions, Distributions, Tensor, nn.Linear]:
    """(policy, reference, targets, the policy's head): positions of `example`, the reference a little elsewhere."""
    hidden, ids, _, head = example(dtype)
    states = hidden.flatten(0, 1)
    generator = torch.Generator().manual_seed(2)
    other = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    other.weight.copy_(head.weight + 0.1 * torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype))
    moved = states + 0.1 * torch.randn(states.shape, generator=generator).to(dtype)
    policy = Distributions(states=states.requires_grad_(True), head=head)
    return policy, Distributions(states=moved, head=other), ids.flatten(), head


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_divergences_of_two_models_by_hand(chunk: int) -> None:
    policy, reference, targets, head = two_models()
    found = compared_at(policy, reference, targets, chunk=chunk)
    for position, (mine, theirs) in enumerate(zip(policy.states.tolist(), reference.states.tolist(), strict=True)):
        chances = []
        for weights, state in ((head.weight, mine), (reference.head.weight, theirs)):
            logits = [sum(w * x for w, x in zip(line, state, strict=True)) for line in weights.tolist()]
            total = math.log(math.fsum(math.exp(logit) for logit in logits))
            chances.append([logit - total for logit in logits])
        p, q = chances
        divergence = math.fsum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True))
        said = int(targets[position])
        expected = torch.tensor([p[said], q[said], divergence], dtype=torch.float64)
        torch.testing.assert_close(found[:, position].detach(), expected, rtol=0, atol=1e-9)
        assert divergence > 0
    with torch.no_grad():
        assert torch.equal(compared_at(policy, reference, targets, chunk=chunk), found)


def test_three_tokens_on_paper() -> None:
    def head(chances: Tensor) -> Tensor:
        return chances.log() + 3.0  # logits may be off by a constant

    policy = Distributions(states=torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64), head=head)
    reference = Distributions(states=torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64), head=head)
    found = compared_at(policy, reference, torch.tensor([0]), chunk=8)[:, 0]
    expected = [-math.log(2), -math.log(4), 0.25 * math.log(2)]  # 1/4 log 1/2 + 1/2 log 2 + 1/4 log 1
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    lopsided = Distributions(states=torch.tensor([[0.8, 0.1, 0.1]], dtype=torch.float64), head=head)
    one, other = (
        float(compared_at(*both, torch.tensor([0]), chunk=8)[2]) for both in ((policy, lopsided), (lopsided, policy))
    )
    assert one == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))  # what is left out of p costs by q
    assert other == pytest.approx(0.5 * math.log(0.625) + 0.5 * math.log(2.5))


def test_divergence_pulls_the_policy_alone() -> None:
    policy, reference, targets, head = two_models()
    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)

    def total(states: Tensor) -> Tensor:
        moved = Distributions(states=states, head=head)
        return (compared_at(moved, reference, targets, chunk=7)[2] * weights).sum()

    states = policy.states.detach()[:, :2].clone().requires_grad_(True)
    rest = policy.states.detach()[:, 2:]
    assert torch.autograd.gradcheck(lambda some: total(torch.cat([some, rest], 1)), (states,))

    tracked = reference.states.clone().requires_grad_(True)
    own = Distributions(states=tracked, head=head)  # with adapters off, both have one head
    compared_at(policy, own, targets, chunk=7)[2].mul(weights).sum().backward()
    assert tracked.grad is None and policy.states.grad is not None and head.weight.grad is not None
    expected = torch.zeros_like(head.weight)
    with torch.no_grad():
        excess = head(policy.states).softmax(1) - head(tracked).softmax(1)  # of KL(q || p) by p's logits
        expected = (excess * weights[:, None]).T @ policy.states
    torch.testing.assert_close(head.weight.grad, expected)


def test_equal_models_do_not_diverge() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        policy, _, targets, head = two_models(dtype)
        same = Distributions(states=policy.states.detach().clone(), head=head)
        mine, theirs, divergence = compared_at(policy, same, targets, chunk=4)
        assert divergence.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(mine, theirs) and not divergence.any()
        divergence.sum().backward()
        assert policy.states.grad is not None
        assert policy.states.grad.abs().max() < (1e-12 if dtype == torch.float64 else 1e-4)


def test_a_token_that_cannot_be_said_leaves_a_number() -> None:
    policy, reference, targets, head = two_models(torch.float32)
    with torch.no_grad():
        for weight in (head.weight, reference.head.weight):
            weight.mul_(1e3)  # chances far below the smallest fp32 number
    assert torch.isfinite(compared_at(policy, reference, targets, chunk=4)).all()


@pytest.mark.parametrize("chunk", [1, 3])
def test_divergences_need_no_more_logits_than_a_chunk(chunk: int) -> None:
    policy, reference, targets, head = two_models(torch.float32)
    seen: list[int] = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    with Largest() as largest:
        found = compared_at(policy, reference, targets, chunk=chunk)
        calls = len(seen)
        found.sum().backward()
    assert largest.rows == chunk and max(seen) == chunk
    assert sum(seen[:calls]) == sum(seen[calls:]) == len(targets)  # anew in the backward: none was kept
