"""Preference losses: implicit rewards in, one loss per pair (or item) out. No model is known here.

Throughout, an *implicit reward* is a log-ratio between policy and reference that already carries its scale:

    diffusion   r = -k (error - reference error)      k: the logit scale; errors are fp32 means over C, H, W
    language    r = beta (log p - log p_reference)    k = beta; log-probs are sums over completion tokens

and the *margin* of a pair is h = r_chosen - r_rejected, a logit: sigmoid(h) is the modelled probability that
the chosen side wins. Swapping the sides negates h; policy = reference gives h = 0 exactly.

Losses return unreduced values in the dtype of their input; `weighted_mean` reduces. A pairwise loss takes
what it needs from `PairTerms` as positional parameters and its settings as keyword-only ones, so adding a
loss is adding a function and naming it in `PAIR_LOSSES`: `weighted_sum` reads the rest off the signature.

Sources: DPO Rafailov et al. 2305.18290; Diffusion-DPO Wallace et al. 2311.12908; cDPO Mitchell 2023, "A note
on DPO with noisy preferences"; robust DPO Chowdhury et al. 2403.00409; IPO Azar et al. 2310.12036; SLiC-HF
Zhao et al. 2305.10425; KTO Ethayarajh et al. 2402.01306, on images Li et al. 2404.04465; PRDP Deng et al.
2402.08714; D3PO Yang et al. 2311.13231; PSO Miao et al. 2410.03190; DDPO Black et al. 2305.13301.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.errors import UserError, nearest

# ---------------------------------------------------------------------------------------------- scale


def _scale_per_beta(elements: int) -> dict[str, float]:
    """What one unit of a published beta adds to the logit scale, by the convention it was published in."""
    return {"mean_half": 0.5, "mean": 1.0, "sum": float(elements)}


def logit_scale(beta: float, convention: str, elements: int | None = None) -> float:
    """The scale k of mean-reduced errors that a published beta stands for.

        mean_half   k = beta / 2        authors' Diffusion-DPO code, InPO, diffusers' SDXL script
        mean        k = beta            diffusers' SD1.5 script, align-anything, Diffusion-KTO
        sum         k = beta * D        papers: errors are sums over D = C*H*W elements, D times the mean

    Args:
        beta: as published, positive.
        convention: one of the three names.
        elements: D of the latents; only `sum` needs it.

    Raises:
        UserError: beta is not a positive number, or the convention is unknown.
    """
    per_beta = _scale_per_beta(elements or 0)
    if convention not in per_beta:
        raise UserError(f"Unknown beta convention '{convention}'", fix=nearest(convention, per_beta))
    _check_positive("beta", beta)
    if per_beta[convention] <= 0:
        raise ValueError("the convention 'sum' needs the number of latent elements")
    return beta * per_beta[convention]


def equivalents(scale: float, elements: int) -> dict[str, float]:
    """The beta that each convention would write for the logit scale `scale` at `elements` latent elements."""
    return {convention: scale / per_beta for convention, per_beta in _scale_per_beta(elements).items()}


def implicit_rewards(
    errors: Float[Tensor, "*items"], reference_errors: Float[Tensor, "*items"], scale: float
) -> Float[Tensor, "*items"]:
    """r = -k (e - e_ref), positive where the policy predicts better than the reference (2311.12908, Eq. 14).

    Args:
        errors, reference_errors: mean squared errors per image, fp32 or better. In bf16 their difference is
            mostly rounding, and k multiplies it.
        scale: the logit scale k.
    """
    return -scale * (errors - reference_errors)


# ----------------------------------------------------------------------------------- losses on a pair


def sigmoid(margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """DPO, -log sigmoid(h) (2305.18290, Eq. 7; 2311.12908, Eq. 14). log 2 at h = 0."""
    return -F.logsigmoid(margin)


def soft(margin: Float[Tensor, " pairs"], confidence: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Cross-entropy with a soft label, p DPO(h) + (1 - p) DPO(-h). Minimal where sigmoid(h) = p.

    Args:
        confidence: p, the probability in [0, 1] that the chosen side is the better one. 1 is DPO; 0.5 is a
            tie, which pulls the margin to 0.
    """
    return confidence * sigmoid(margin) + (1 - confidence) * sigmoid(-margin)


def conservative(margin: Float[Tensor, " pairs"], *, flip_rate: float) -> Float[Tensor, " pairs"]:
    """cDPO, (1 - f) DPO(h) + f DPO(-h): labels are assumed flipped with probability f (Mitchell 2023).

    Bounded; minimal where sigmoid(h) = 1 - f, so the margin of a pair never needs to grow without end.

    Args:
        flip_rate: f in [0, 0.5). 0 is DPO.
    """
    _check_flip_rate(flip_rate)
    return (1 - flip_rate) * sigmoid(margin) + flip_rate * sigmoid(-margin)


def robust(margin: Float[Tensor, " pairs"], *, flip_rate: float) -> Float[Tensor, " pairs"]:
    """Provably robust DPO, [(1 - f) DPO(h) - f DPO(-h)] / (1 - 2f) (2403.00409).

    Unbiased: averaged over labels flipped with probability f it is the DPO loss of the clean labels. It falls
    without bound, as -h f / (1 - 2f), so it wants early stopping.

    Args:
        flip_rate: f in [0, 0.5). 0 is DPO.
    """
    _check_flip_rate(flip_rate)
    return ((1 - flip_rate) * sigmoid(margin) - flip_rate * sigmoid(-margin)) / (1 - 2 * flip_rate)


def smoothed(
    margin: Float[Tensor, " pairs"], confidence: Float[Tensor, " pairs"], *, strength: float = 10.0
) -> Float[Tensor, " pairs"]:
    """SmPO, -log sigmoid(c (2 p - 1) h): an unsure label scales the margin instead of pulling it back.

    Unlike `soft` it has no minimum: at p > 1/2 the margin may grow without end, only more slowly. A tie teaches
    nothing. With c = 1 and p = 1 it is DPO.

    Args:
        confidence: p, the probability in [0, 1] that the chosen side is the better one.
        strength: c; 10 in the authors' code, beside the beta that they say.
    """
    _check_positive("strength", strength)
    return sigmoid(strength * (2 * confidence - 1) * margin)


def exo(margin: Float[Tensor, " pairs"], *, flip_rate: float = 1e-3) -> Float[Tensor, " pairs"]:
    """EXO on pairs, KL(p || q) of p = sigmoid(h) from the label q = 1 - f (Ji et al. 2402.00856).

    The reverse of what DPO minimises: it seeks the label's mode. Minimal, 0, where sigmoid(h) = 1 - f.

    Args:
        flip_rate: f in (0, 0.5): at 0 the divergence is infinite.
    """
    if not 0 < flip_rate < 0.5:
        raise UserError(f"flip_rate is {flip_rate:g}", fix="Give a number above 0 and below 0.5.")
    p, q = torch.sigmoid(margin), torch.sigmoid(-margin)
    return p * (F.logsigmoid(margin) - math.log1p(-flip_rate)) + q * (F.logsigmoid(-margin) - math.log(flip_rate))


def offset(
    margin: Float[Tensor, " pairs"], gap: Float[Tensor, " pairs"], *, strength: float = 1.0
) -> Float[Tensor, " pairs"]:
    """ODPO, -log sigmoid(h - s gap): better by more must be ahead by more (Amini et al. 2402.10571)."""
    _check_positive("strength", strength)
    return sigmoid(margin - strength * gap)


def length(
    margin: Float[Tensor, " pairs"], longer: Float[Tensor, " pairs"], *, alpha: float
) -> Float[Tensor, " pairs"]:
    """R-DPO, -log sigmoid(h + a (N_chosen - N_rejected)): being longer explains part of being chosen
    (Park et al. 2403.19159).

    Args:
        longer: N_chosen - N_rejected, tokens.
        alpha: a, per token, positive.
    """
    _check_positive("alpha", alpha)
    return sigmoid(margin + alpha * longer)


def ipo(margin: Float[Tensor, " pairs"], scale: float, *, tau: float) -> Float[Tensor, " pairs"]:
    """IPO, (h / k - 1 / (2 tau))^2 (2310.12036, Eq. 17).

    The margin goes back to its raw unit, mean error or log-prob: h / k; so is 1 / (2 tau). With tau = k the
    loss is (h - 1/2)^2 / k^2: give it the weight k^2 beside losses that live on the logit. For the
    length-normalised form of language models divide each log-ratio by its length before the margin is made.

    Args:
        scale: k, the scale the margin carries.
        tau: regularisation strength, in the unit of k; larger stays closer to the reference.
    """
    _check_positive("tau", tau)
    return (margin / scale - 1 / (2 * tau)).square()


def odds_ratio(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """ORPO's term, -log sigmoid(log odds(p_chosen) - log odds(p_rejected)), odds(p) = p / (1 - p) (2403.07691).

    Args:
        chosen, rejected: log p per token, below 0. log(1 - p) is taken by whichever of log1p(-e^x) and
            log(-expm1(x)) keeps its digits.
    """
    return sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Float[Tensor, " items"]) -> Float[Tensor, " items"]:
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)  # p = 1 in this precision has no odds
    near = torch.log(-torch.expm1(logp.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(logp.clamp(max=-math.log(2))))
    return logp - torch.where(logp > -math.log(2), near, far)


def tdpo1(
    margin: Float[Tensor, " pairs"],
    chosen_kl: Float[Tensor, " pairs"],
    rejected_kl: Float[Tensor, " pairs"],
    scale: float,
) -> Float[Tensor, " pairs"]:
    """TDPO1, -log sigmoid(h - k (K_rejected - K_chosen)) (Zeng et al. 2404.11999).

    What Bradley-Terry over tokens adds to DPO: an answer's value is its reward and how far the policy has moved along
    it, so that both rise together.

    Args:
        chosen_kl, rejected_kl: K, KL(reference || policy) of the next token, summed over an answer's positions.
        scale: k, the scale the margin carries.
    """
    return sigmoid(margin - scale * (rejected_kl - chosen_kl))


def tdpo2(
    margin: Float[Tensor, " pairs"],
    chosen_kl: Float[Tensor, " pairs"],
    rejected_kl: Float[Tensor, " pairs"],
    scale: float,
    *,
    alpha: float,
) -> Float[Tensor, " pairs"]:
    """TDPO2, -log sigmoid(h - alpha k (K_rejected - K_chosen)) with K_chosen a constant (2404.11999).

    TDPO1 gains from drifting along the chosen answer; here only holding still along the rejected one is learnt.

    Args:
        chosen_kl, rejected_kl, scale: as for `tdpo1`.
        alpha: weight of the difference, 0 or more; 0 is DPO.
    """
    return sigmoid(margin - alpha * scale * (rejected_kl - chosen_kl.detach()))


def rrpo(
    margin: Float[Tensor, " pairs"], chosen_kl: Float[Tensor, " pairs"], *, alpha: float
) -> Float[Tensor, " pairs"]:
    """RRPO, -log sigmoid(h) + alpha K_chosen (Sarkar & Etemad 2504.12083).

    Args:
        margin: of rewards that count the differing phrases alone.
        chosen_kl: K, KL(reference || policy) of the next token, summed over all positions of the chosen answer.
        alpha: weight of it, per nat, 0 or more.
    """
    return sigmoid(margin) + alpha * chosen_kl


def hinge(margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """SLiC, max(0, 1 - h) (2305.10425): nothing more to gain once the margin is 1."""
    return F.relu(1 - margin)


def reward_difference(
    margin: Float[Tensor, " pairs"], gap: Float[Tensor, " pairs"], *, temperature: float = 1.0
) -> Float[Tensor, " pairs"]:
    """Reward-difference regression, (h - gap / temperature)^2 (2402.08714). Zero iff the policy is optimal.

    Args:
        gap: reward of the chosen minus reward of the rejected, in reward units.
        temperature: the beta of KL-regularised RL, reward units per unit of margin; 1 takes `gap` as the
            target itself.
    """
    _check_positive("temperature", temperature)
    return (margin - gap / temperature).square()


def sft(chosen_errors: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """The anchor: the policy's own loss on the chosen side (mean squared error, -log p per token)."""
    return chosen_errors


PAIR_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (sigmoid, soft, smoothed, conservative, robust, exo, offset, length, ipo, hinge, reward_difference, sft)
}


# ---------------------------------------------------------------------------- losses on items and groups


def kto(
    rewards: Float[Tensor, " items"],
    desirable: Bool[Tensor, " items"],
    baseline: Float[Tensor, ""],
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    utility: Literal["kto", "loss_averse", "risk_seeking"] = "kto",
) -> Float[Tensor, " items"]:
    """KTO on unpaired items, w (1 - U(s (r - z))) with s = 1 if desirable, else -1 (2402.01306).

        kto            U(x) = sigmoid(x)            gains and losses both saturate
        loss_averse    U(x) = log sigmoid(x)        1 - U is DPO's loss of one item, plus 1
        risk_seeking   U(x) = -log sigmoid(-x)      gains grow without end

    Args:
        rewards: implicit rewards r, scaled.
        baseline: z in the same unit, from `kto_baseline`.
        desirable_weight, undesirable_weight: w by label, to even out how many there are of each.
        utility: U; the last two are Diffusion-KTO's comparisons (2404.04465).
    """
    good = desirable.to(rewards.dtype)
    sign = 2 * good - 1
    weight = desirable_weight * good + undesirable_weight * (1 - good)
    gain = sign * (rewards - baseline)
    if utility == "loss_averse":
        return weight * (1 - F.logsigmoid(gain))
    if utility == "risk_seeking":
        return weight * (1 + F.logsigmoid(-gain))
    return weight * torch.sigmoid(-gain)  # 1 - sigmoid(x), without the cancellation


def mean_across_ranks(
    values: Float[Tensor, " items"], weights: Float[Tensor, " items"] | None = None
) -> Float[Tensor, ""]:
    """The mean over the items of all ranks, each counting by its weight; detached. 0 if nothing counts at all."""
    dtype = torch.promote_types(values.dtype, torch.float32)  # a count does not fit into half precision
    weights = torch.ones_like(values, dtype=dtype) if weights is None else weights.to(dtype)
    total = torch.stack([(weights * values.detach().to(dtype)).sum(), weights.sum()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return (total[0] / torch.where(total[1] > 0, total[1], 1)).to(values.dtype)


def kto_baseline(
    rewards: Float[Tensor, " items"], reduce_mean: Callable[[Tensor], Tensor] = mean_across_ranks
) -> Float[Tensor, ""]:
    """KTO's reference point z = max(0, mean r), an estimate of the KL to the reference; no gradient.

    Args:
        rewards: scaled implicit rewards of this rank: of mismatched prompts as in the KTO paper, or of the
            batch itself as in Diffusion-KTO's code, which pulls z towards the batch's own mean.
        reduce_mean: the mean over all ranks; collective, so every rank must come here.
    """
    return reduce_mean(rewards.detach()).clamp(min=0)


def proximal_reward_difference(
    log_ratios: Float[Tensor, "*prompts images steps"],
    old_log_ratios: Float[Tensor, "*prompts images steps"],
    rewards: Float[Tensor, "*prompts images"],
    *,
    temperature: float,
    clip: float = math.inf,
    over_steps: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, "*prompts"]:
    """PRDP, reward-difference regression with a proximal clip (2402.08714, Eq. 19-21 and appendix G).

        a_i  = mean_t rho_it
        c_i  = mean_t clip(rho_it, old_it - clip, old_it + clip)
        g_ij = (r_i - r_j) / temperature
        loss = mean over pairs with r_i > r_j of max((a_i - a_j - g_ij)^2, (c_i - c_j - g_ij)^2)

    The maximum is pessimistic as in PPO: clipping stops the gradient only where it would lower the loss.
    Equally rewarded pairs do not count; a prompt whose images all tie has loss 0 and gradient 0.

    Args:
        log_ratios: rho, log pi(x_t-1 | x_t) - log pi_ref(x_t-1 | x_t) per denoising step, the Gaussian
            log-densities taken as means over C, H, W.
        old_log_ratios: the same under the policy that drew the images; a constant.
        rewards: one per image of the prompt.
        temperature: beta, reward units per unit of the reduced log-ratio. The 3e-5 and 3e-6 of Table 4 belong
            to `over_steps="mean"`.
        clip: half-width of the trust region per step, in log-ratio units; inf switches it off.
        over_steps: appendix G takes the mean over steps, the paper's equations the sum.
    """
    _check_positive("temperature", temperature)
    if not clip > 0:
        raise UserError(f"clip is {clip:g}", fix="Give a positive number, or .inf for no clipping.")
    reduce = {"mean": torch.mean, "sum": torch.sum}[over_steps]
    old = old_log_ratios.detach()
    free = _differences(reduce(log_ratios, -1))
    clipped = _differences(reduce(log_ratios.clamp(old - clip, old + clip), -1))
    gap = _differences(rewards)
    target = gap / temperature
    loss = torch.maximum((free - target).square(), (clipped - target).square())
    ranked = ~(gap <= 0)  # rather than gap > 0: a NaN reward must surface as a NaN loss, not pass for a tie
    return torch.where(ranked, loss, 0).sum((-2, -1)) / ranked.sum((-2, -1)).clamp(min=1)


def _differences(values: Tensor) -> Tensor:  # [..., images] -> [..., images, images], row minus column
    return values[..., :, None] - values[..., None, :]


# ------------------------------------------------------------------------------ losses on sampling steps


def clipped_log_ratio(log_ratio: Float[Tensor, "*items"], clip: float) -> Float[Tensor, "*items"]:
    """log clip(exp(l), 1 - c, 1 + c): outside the band the gradient is 0, whichever way it was left.

    Args:
        log_ratio: l, log pi - log pi_ref of a sampling step, the log-densities taken as means over C, H, W.
        clip: c in (0, 1).
    """
    _check_clip(clip)
    return log_ratio.clamp(math.log1p(-clip), math.log1p(clip))


def step_preference(
    chosen: Float[Tensor, "*items"], rejected: Float[Tensor, "*items"], *, beta: float, clip: float
) -> Float[Tensor, "*items"]:
    """D3PO and online PSO: DPO on one sampling step of each of two trajectories (2311.13231, 2410.03190).

        loss = -log sigmoid(beta (log clip(r_chosen) - log clip(r_rejected)))         r = pi / pi_ref of the step

    With the published clip of 0.1 the margin is at most 0.201 beta: at D3PO's beta of 0.1 the loss stays within
    0.011 of log 2, and progress shows in the reward alone.

    Args:
        chosen, rejected: log-ratios of the step to the reference, means over C, H, W.
        beta: 50 in PSO, 0.1 in D3PO.
        clip: half-width of the band, 0.1 in both.
    """
    _check_positive("beta", beta)
    return -F.logsigmoid(beta * (clipped_log_ratio(chosen, clip) - clipped_log_ratio(rejected, clip)))


def policy_gradient(
    log_ratio: Float[Tensor, "*items"],
    advantages: Float[Tensor, "*items"],
    *,
    clip: float,
    advantage_clip: float = 5.0,
) -> Float[Tensor, "*items"]:
    """DDPO, the clipped surrogate of PPO per sampling step: max(-A r, -A clip(r, 1 - c, 1 + c)) (2305.13301).

    Pessimistic: the gradient stops where the step has already moved the way its advantage wants, by more than c.

    Args:
        log_ratio: log r, log pi - log pi_old to the policy that drew the step, a mean over C, H, W.
        advantages: A, see `advantages`; a constant.
        clip: c in (0, 1); the authors' code has 1e-4.
        advantage_clip: A is kept within plus and minus it.
    """
    _check_clip(clip)
    _check_positive("advantage_clip", advantage_clip)
    bounded = advantages.detach().clamp(-advantage_clip, advantage_clip)
    ratio = log_ratio.exp()
    return torch.maximum(-bounded * ratio, -bounded * ratio.clamp(1 - clip, 1 + clip))


def advantages(rewards: Float[Tensor, "*groups images"]) -> Float[Tensor, "*groups images"]:
    """(r - mean) / (std + 1e-6) within each group, std that of the population (2305.13301, authors' code).

    In float64, and exactly 0 for a group that ties: there a rounded mean over 1e-6 would be an advantage of its own.

    Args:
        rewards: the last axis is the group: images of one prompt, or of the whole round.
    """
    exact = rewards.double()
    shifted = exact - exact[..., :1]
    centred = shifted - shifted.mean(-1, keepdim=True)
    return (centred / (shifted.std(-1, correction=0, keepdim=True) + 1e-6)).to(rewards.dtype)


def dominance(
    rewards: Float[Tensor, "pairs rewards"], others: Float[Tensor, "pairs rewards"]
) -> Float[Tensor, " pairs"]:
    """Which side of a pair wins by several rewards: 1 the first, -1 the other, 0 neither (2410.03190, DMD2 code).

    A side wins if it is at least as good in every reward and better in one. A NaN among a pair's rewards gives NaN
    rather than pass for a tie.
    """
    first = (rewards >= others).all(-1) & (rewards > others).any(-1)
    other = (others >= rewards).all(-1) & (others > rewards).any(-1)
    sign = first.to(rewards.dtype) - other.to(rewards.dtype)
    return torch.where((rewards.isnan() | others.isnan()).any(-1), math.nan, sign)


# ------------------------------------------------------------------------------------------ reductions


def accuracy(margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """1 where the chosen side leads, 0 where it trails, 0.5 for an exact tie, as when policy = reference."""
    return torch.heaviside(margin.detach(), torch.tensor(0.5, dtype=margin.dtype, device=margin.device))


def weighted_mean(loss: Float[Tensor, " items"], weights: Float[Tensor, " items"] | None = None) -> Float[Tensor, ""]:
    """sum(w loss) / sum(w), the plain mean without weights. 0, with gradient 0, where every weight is 0.

    Args:
        weights: non-negative; only their ratios matter.
    """
    if weights is None:
        return loss.mean()
    total = weights.sum()
    return (weights * loss).sum() / torch.where(total > 0, total, 1)


def mean_over_pairs(loss: Float[Tensor, " pairs"], weights: Float[Tensor, " pairs"] | None) -> Float[Tensor, ""]:
    """Mean of w * loss. The weights have mean 1 over the data set, not over the batch: so accumulating over eight
    batches of one equals one batch of eight."""
    return (loss if weights is None else loss * weights).mean()


# ------------------------------------------------------------------------------- weighted sums of losses


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTerms:
    """What a pairwise loss may ask for: its positional parameters are among these names.

    Attributes:
        margin: h, the scaled implicit-reward margin.
        scale: k, the scale that the margin carries.
        confidence: probability that the chosen side is better, in [0, 1].
        gap: reward of the chosen minus reward of the rejected.
        chosen_errors: the policy's error (or negative log-likelihood per token) on the chosen side.
        longer: tokens of the chosen answer minus those of the rejected.
    """

    margin: Float[Tensor, " pairs"]
    scale: float
    confidence: Float[Tensor, " pairs"] | None = None
    gap: Float[Tensor, " pairs"] | None = None
    chosen_errors: Float[Tensor, " pairs"] | None = None
    longer: Float[Tensor, " pairs"] | None = None


_REMEDIES = {
    "confidence": "Label the pairs with a confidence, or choose another loss.",
    "gap": "Pair scored candidates, whose rewards give the gap, or choose another loss.",
    "longer": "Pictures have no length: choose another loss.",
    "chosen_errors": "This method offers no error of the chosen side: choose another loss.",
}

PairLoss = Callable[[PairTerms], Tensor]


def weighted_sum(spec: Mapping[str, object], *, place: str = "loss") -> PairLoss:
    """A weighted sum of pairwise losses from its configuration.

        weighted_sum({"sigmoid": 1.0, "sft": 0.1})
        weighted_sum({"conservative": {"weight": 1.0, "flip_rate": 0.1}})

    A loss with weight 0 is left out entirely, so {"sigmoid": 1, "sft": 0} is DPO bit for bit.

    Args:
        spec: for each loss its weight, or a mapping of its settings with an optional `weight` (1 if absent).
        place: configuration key of the spec, for messages.

    Raises:
        UserError: an unknown loss or setting, a missing or impossible value, nothing left to minimise; and
            once the sum is evaluated, a term that the pairs do not have.
    """
    parts = [part for name, given in spec.items() if (part := _part(name, given, place)) is not None]
    if not parts:
        raise UserError("No loss to minimise", place=place, fix="Give at least one loss a weight above 0.")
    return lambda terms: torch.stack([part(terms) for part in parts]).sum(0)


def fair_to_ties(loss: PairLoss) -> bool:
    """Whether a tie, whose gap is 0 and whose confidence 1/2, costs the same whichever of its sides is named first.

    Other losses would take it for a win of that side.
    """

    def cost(side: int) -> Tensor:
        values = {"margin": side, "confidence": 0.5, "gap": 0, "chosen_errors": 2 + side, "longer": side}
        return loss(PairTerms(scale=1.0, **{name: torch.full((1,), float(value)) for name, value in values.items()}))

    return torch.allclose(cost(1), cost(-1))


def require_fairness_to_ties(spec: Mapping[str, object] | None) -> None:
    """Refuse a method for pairs that contain ties; see `fair_to_ties`.

    Args:
        spec: of its pairwise losses; None where it has none, and looks at no confidence.

    Raises:
        UserError: it would train a tie as a win of the side that happens to be named first.
    """
    if spec is None or not fair_to_ties(weighted_sum(spec, place="method.loss")):
        raise UserError(
            "a tie would be trained as a win of the side that is named first",
            place="data.pairing.ties",
            fix="Use method.loss={soft: 1}, which knows soft labels, or drop the ties.",
        )


def _part(name: str, given: object, place: str) -> PairLoss | None:
    """One summand with its weight and settings filled in; None if its weight is 0."""
    if name not in PAIR_LOSSES:
        raise UserError(f"Unknown loss '{name}'", place=place, fix=nearest(name, PAIR_LOSSES))
    function, place = PAIR_LOSSES[name], f"{place}.{name}"
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    needs = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]

    settings: dict[str, float] = {}
    for key, value in (given if isinstance(given, Mapping) else {"weight": given}).items():
        if key != "weight" and key not in options:
            raise UserError(f"Unknown setting '{key}'", place=place, fix=nearest(str(key), [*options, "weight"]))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{key} is {value!r}", place=place, fix="Give a finite number.")
        settings[key] = float(value)
    for key, option in options.items():
        if option.default is option.empty and key not in settings:
            raise UserError(f"{key} is missing", place=place, fix=f"Write {name}: {{weight: 1.0, {key}: ...}}.")
    weight = settings.pop("weight", 1.0)
    if weight < 0:
        raise UserError(f"weight is {weight:g}", place=place, fix="Give 0 or more.")

    def part(terms: PairTerms) -> Tensor:
        found: list[Any] = [getattr(terms, need) for need in needs]
        for need, value in zip(needs, found, strict=True):
            if value is None:
                raise UserError(f"These pairs have no {need}", place=place, fix=_REMEDIES[need])
        return weight * function(*found, **settings)

    one = torch.zeros(1)  # evaluated once on a blank pair, so that an impossible setting fails here and now
    try:
        part(PairTerms(margin=one, scale=1.0, confidence=one, gap=one, chosen_errors=one, longer=one))
    except UserError as error:
        raise UserError(error.cause, place=place, fix=error.fix) from error
    return part if weight else None


def _check_flip_rate(value: float) -> None:
    if not 0 <= value < 0.5:
        raise UserError(f"flip_rate is {value:g}", fix="Give a probability from 0 up to, not including, 0.5.")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} is {value:g}", fix="Give a positive number.")


def _check_clip(value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"clip is {value:g}", fix="Give a number between 0 and 1.")
