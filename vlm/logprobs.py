"""Log-probabilities of completion tokens, without ever holding the logits of a whole batch.

A row of 600 tokens over a vocabulary of 150,000 has 360 MB of fp32 logits, and its softmax and gradients as much again.
Only positions that predict a completion token are taken, a chunk at a time: hidden states -> head -> fp32
log-softmax -> one number each. The backward computes each chunk's logits anew instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogps:
    """log p(token t | image, tokens before t) of every completion token; sums and means are a loss's business.

    Args:
        values: [rows, tokens], fp32 or more; 0 where `completion` is False.
        completion: [rows, tokens], which tokens were scored.
    """

    values: Float[Tensor, "rows tokens"]
    completion: Bool[Tensor, "rows tokens"]

    def sums(self) -> Float[Tensor, " rows"]:
        """log p(completion): what DPO and its kin compare."""
        return self.values.sum(dim=1)

    def counts(self) -> Int64[Tensor, " rows"]:
        """How many tokens each row's completion has, at least 1."""
        return self.completion.sum(dim=1)

    def means(self) -> Float[Tensor, " rows"]:
        """Per-token average: what ORPO, SimPO and IPO compare."""
        return self.sums() / self.counts()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distributions:
    """A model's next-token distributions at n positions, as what makes them: over the vocabulary they would be large.

    Args:
        states: last hidden states.
        head: makes logits of them.
    """

    states: Float[Tensor, "n width"]
    head: Head


def token_logps(
    hidden: Float[Tensor, "rows tokens width"],
    ids: Int64[Tensor, "rows tokens"],
    completion: Bool[Tensor, "rows tokens"],
    head: Head,
    *,
    chunk: int,
) -> TokenLogps:
    """log softmax(head(hidden[t - 1]))[ids[t]] for every completion token t.

    Args:
        hidden: last hidden states, of any padding.
        ids: unshifted: the shift is done here.
        completion: which tokens to score; never the first of a row, which nothing predicts.
        head: hidden states [n, width] -> logits [n, vocabulary], in any precision; the logits become fp32 here.
        chunk: positions whose logits exist at once.

    Raises:
        ValueError: a row has nothing to score, or its first token is to be scored.
    """
    if not completion.any(dim=1).all():
        raise ValueError("a row has no completion token")
    if completion[:, 0].any():
        raise ValueError("the first token of a row cannot be scored: no token comes before it")
    predicted = completion[:, 1:]
    # positions that predict a completion token, row by row
    flat = logps_at(hidden[:, :-1][predicted], ids[:, 1:][predicted][None], head, chunk=chunk)[0]
    values = flat.new_zeros(ids.shape).masked_scatter(completion, flat)
    return TokenLogps(values=values, completion=completion)


def logps_at(
    states: Float[Tensor, "n width"], targets: Int64[Tensor, "kinds n"], head: Head, *, chunk: int
) -> Float[Tensor, "kinds n"]:
    """log softmax(head(states[i]))[targets[k, i]]: what was said, and what else might have been, from one softmax."""
    parts = []
    for start in range(0, len(states), chunk):
        some, wanted = states[start : start + chunk], targets[:, start : start + chunk]
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_logps, some, wanted, head, use_reentrant=False))
        else:
            parts.append(_chunk_logps(some, wanted, head))
    return torch.cat(parts, dim=1)


def compared_at(
    policy: Distributions, reference: Distributions, targets: Int64[Tensor, " n"], *, chunk: int
) -> Float[Tensor, "3 n"]:
    """log p(targets[i]), log q(targets[i]) and KL(q || p) at every position, p the policy's distribution there, q the
    reference's.

        KL(q || p) = sum over the vocabulary of q (log q - log p), in nats

    Gradients flow into the policy alone. KL is exactly 0 where both have the same logits.
    """
    parts = []
    for start in range(0, len(targets), chunk):
        here = slice(start, start + chunk)
        given = policy.states[here], reference.states[here], targets[here], policy.head, reference.head
        if torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_compared, *given, use_reentrant=False))
        else:
            parts.append(_chunk_compared(*given))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def strongest(
    states: Float[Tensor, "n width"], head: Head, *, chunk: int, but: Int64[Tensor, " n"] | None = None
) -> Int64[Tensor, " n"]:
    """The likeliest token at each position; `but` this one."""
    parts = []
    for start in range(0, len(states), chunk):
        logits = head(states[start : start + chunk])
        if but is not None:
            logits = logits.scatter(1, but[start : start + chunk, None], float("-inf"))
        parts.append(logits.argmax(dim=1))
    return torch.cat(parts)


def _chunk_logps(
    states: Float[Tensor, "n width"], targets: Int64[Tensor, "kinds n"], head: Head
) -> Float[Tensor, "kinds n"]:
    logits = _wide(head(states))
    return logits.gather(1, targets.T).T - logits.logsumexp(dim=1)


def _chunk_compared(
    states: Float[Tensor, "n width"],
    reference_states: Float[Tensor, "n width"],
    targets: Int64[Tensor, " n"],
    head: Head,
    reference_head: Head,
) -> Float[Tensor, "3 n"]:
    logps = _wide(head(states)).log_softmax(dim=1)
    with torch.no_grad():
        reference = _wide(reference_head(reference_states)).log_softmax(dim=1)
    # of two log-probabilities: one that rounds to 0 counts 0, where its logarithm would make NaN of it
    divergence = F.kl_div(logps, reference, reduction="none", log_target=True).sum(dim=1)
    said = targets[:, None]
    return torch.stack([logps.gather(1, said)[:, 0], reference.gather(1, said)[:, 0], divergence])


def _wide(logits: Tensor) -> Tensor:
    """In fp32, or more where they came in more."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
