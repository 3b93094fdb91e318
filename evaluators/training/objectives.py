"""What a scorer of pictures is trained by: scores in, one loss per pair or per picture out.

A score is a logit: between two pictures of one prompt, sigmoid(s_i - s_j) is the modelled probability that i is picked.
The pairwise losses of the core (`mmalign.losses`) take the difference for a margin; here is what they do not have.

Sources: PickScore, Kirstain et al. 2305.01569 and its code (trainer/criterions/clip_criterion.py); rankings, Plackett
1975 and Luce 1959, as a loss Xia et al. 2008 (ListMLE); pairs of a ranking, ImageReward, Xu et al. 2304.05977.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from mmalign.losses import soft


def picked(margin: Float[Tensor, " pairs"], confidence: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """KL(label || model) = p log(p / sigmoid(h)) + (1 - p) log((1 - p) / sigmoid(-h)).

    PickScore's loss: its labels are p = 1, and 1/2 for a tie, where it takes log 2 off so that a perfect tie costs
    nothing; as a divergence it does so at every p. log 2 at h = 0 with a sure label, 0 where sigmoid(h) = p.

    Args:
        margin: h, the score of the first picture minus that of the second.
        confidence: p, the probability that the first is preferred.
    """
    return soft(margin, confidence) + torch.xlogy(confidence, confidence) + torch.xlogy(1 - confidence, 1 - confidence)


def plackett_luce(
    scores: Float[Tensor, " pictures"], pairs: Int[Tensor, "pairs 2"], sure: Bool[Tensor, " pairs"]
) -> Float[Tensor, " pictures"]:
    """-log of the probability that each picture is taken first of itself and those it beat.

        l_i = log(e^{s_i} + sum over beaten j of e^{s_j}) - s_i          0 where a picture beat none

    The sum over a strict ranking is the negative log-likelihood of Plackett and Luce; of two pictures it is Bradley
    and Terry's. Tied pictures do not compete.

    Args:
        pairs: rows of `scores`: the preferred picture and the other.
        sure: which pairs count: those with a preferred side.
    """
    count = len(scores)
    competes = torch.eye(count, dtype=torch.bool, device=scores.device)
    kept = pairs[sure]
    competes[kept[:, 0], kept[:, 1]] = True
    logits = scores[None, :].expand(count, count).masked_fill(~competes, -torch.inf)
    return logits.logsumexp(-1) - scores


def among(
    queries: Float[Tensor, "queries width"],
    others: Float[Tensor, "others width"],
    scale: Float[Tensor, ""],
    own: Int[Tensor, " queries"],
    left_out: Bool[Tensor, "queries others"] | None = None,
) -> Float[Tensor, " queries"]:
    """-log of the probability that each query finds its own among all others, as in CLIP's loss.

    Args:
        own: which of the others is a query's own.
        left_out: others that are no negatives of a query, though they are not its own.
    """
    logits = scale * queries @ others.T
    if left_out is not None:
        logits = logits.masked_fill(left_out, -torch.inf)
    return functional.cross_entropy(logits, own, reduction="none")


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row comes back from every process that used it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)  # a gradient is not ours to add to
        dist.all_reduce(total)
        return total.split(ctx.sizes)[dist.get_rank()], None


def gather(rows: Shaped[Tensor, "rows ..."]) -> tuple[Shaped[Tensor, "all ..."], int]:
    """Rows of all processes, in order of processes and with their gradients, and where this process's begin.

    A loss that every process computes of the gathered rows comes back summed over processes, and gradients of
    parameters are averaged over them: together the gradient of the mean of the processes' losses. Processes may have
    different numbers of rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    gathered: Tensor = _Gather.apply(rows, sizes)
    return gathered, sum(sizes[: dist.get_rank()])
