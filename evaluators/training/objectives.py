"""What a scorer of pictures is trained by: scores in, one loss per pair or per picture out.

A score is a logit: between two pictures of one prompt, sigmoid(s_i - s_j) is the modelled probability that i is picked.
The pairwise losses of the core (`mmalign.losses`) take the difference for a margin; here is what they do not have.

Sources: PickScore, Kirstain et al. 2305.01569 and its code (trainer/criterions/clip_criterion.py); rankings, Plackett
1975 and Luce 1959, as a loss Xia et al. 2008 (ListMLE); pairs of a ranking, ImageReward, Xu et al. 2304.05977.
"""

from __future__ import annotations

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


def among_texts(
    pictures: Float[Tensor, "pictures width"],
    texts: Float[Tensor, "texts width"],
    scale: Float[Tensor, ""],
    owner: Int[Tensor, " pictures"],
    same: Bool[Tensor, "texts texts"] | None = None,
) -> Float[Tensor, " pictures"]:
    """-log of the probability that a picture's own text is found among all texts of the batch (CLIP's loss, one way).

    Args:
        owner: which text is a picture's own.
        same: pairs of texts that say the same, which are no negatives of one another; None: all are.
    """
    logits = scale * pictures @ texts.T
    if same is not None:
        others = same.clone().fill_diagonal_(False)
        logits = logits.masked_fill(others[owner], -torch.inf)
    return functional.cross_entropy(logits, owner, reduction="none")


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row comes back from every process that used it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Shaped[Tensor, "rows width"]) -> Shaped[Tensor, "all width"]:
    """Rows of all processes, in order of processes, with their gradients; the rows themselves where there is one.

    A loss that every process computes of the gathered rows comes back summed over processes, and gradients of
    parameters are averaged over them: together the gradient of the loss of the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered
