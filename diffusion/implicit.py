"""How a tuned model ranks pairs it never saw: implicit-reward accuracy.

    r(x0) = mean over draws j of (e_reference(x0, t_j, eps_j) - e_policy(x0, t_j, eps_j))
    accuracy = share of pairs with r(chosen) > r(rejected), exact ties half

Both sides share every draw; timesteps are stratified over the schedule; no prompt is dropped. The published estimate
(Wallace et al. 2023, S4.1) has the sign of r reversed and draws ten free timesteps; here low r means worse, and ten
equal bins have one draw each. The interval resamples groups (photographs, prompts), not pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion import cache
from diffusion.cache import PairData
from diffusion.models import DiffusionModel
from diffusion.settings import DataSettings
from diffusion.tuned import Tuned, find_tuned, open_base, open_tuned
from evaluators.agreement import Agreement, Effort, agreement, groups_of
from mmalign.errors import UserError
from mmalign.losses import accuracy
from mmalign.pairdata import read_pairs
from mmalign.progress import progress
from mmalign.records import Preference
from mmalign.statistics import bootstrap_interval


def implicit_rewards(
    reference: DiffusionModel,
    policy: DiffusionModel,
    data: PairData,
    *,
    draws: int,
    batch_size: int,
    seed: int,
) -> Float[Tensor, "pairs draws"]:
    """Reward of the chosen minus reward of the rejected side, for each pair and draw, in units of mean error."""
    device, schedule = policy.device, policy.schedule.to(policy.device)
    margins = torch.zeros(len(data), draws)
    groups = [
        group[start : start + batch_size]
        for group in data.buckets.values()
        for start in range(0, len(group), batch_size)
    ]
    for items in progress(groups, "implicit rewards", unit="batch"):
        batch = data.batch(list(items), [0] * len(items), seed=seed, device=device)
        random = batch.draws("accuracy")
        for draw in range(draws):
            t = ((draw + random.uniform()) / draws * len(schedule)).long().repeat(2)
            noise = random.normal(batch.latents.shape[1:]).repeat(2, 1, 1, 1)
            noisy = schedule.add_noise(batch.latents, noise, t)
            target = schedule.target(batch.latents, noise, t)
            with torch.no_grad():
                errors = [
                    schedule.errors(model.predict(model.unet, noisy, t, batch.conditioning), target, t)
                    for model in (reference, policy)
                ]
            chosen, rejected = (errors[0] - errors[1]).cpu().chunk(2)
            margins[list(items), draw] = chosen - rejected
    return margins


def agreements(run: Path, pairs: Sequence[Preference], effort: Effort) -> list[Agreement]:
    """Of a run's newest checkpoint with the labels of pairs of pictures.

    Raises:
        UserError: no run there, or pairs that its model cannot take.
    """
    tuned = find_tuned(run)
    margins = _margins(tuned, pairs, tuned.config.data or DataSettings(path=Path()), effort)
    return [agreement(f"{run} (implicit reward)", margins.tolist(), pairs)]


def _margins(
    tuned: Tuned, pairs: Sequence[Preference], settings: DataSettings, effort: Effort
) -> Float[Tensor, " pairs"]:
    """Mean over the draws."""
    reference, policy = open_base(tuned), open_tuned(tuned)
    data = cache.prepare(reference, pairs, settings.model_copy(update={"prompt_dropout": 0.0}))
    return implicit_rewards(
        reference, policy, data, draws=effort.draws, batch_size=effort.batch_size, seed=effort.seed
    ).mean(1)


def held_out_accuracy(run: Path, store: Path | None, split: str, effort: Effort) -> dict[str, Any]:
    """Accuracy of a run's newest checkpoint on a split, with the interval that resamples groups."""
    tuned = find_tuned(run)
    own = tuned.config.data
    if own is None and store is None:
        raise UserError("this run was not trained on pairs", place=str(run), fix="Give some with --store.")
    changed = {"split": split, "shuffle_labels": False} | ({"path": store} if store else {})
    settings = (own or DataSettings(path=Path())).model_copy(update=changed)
    pairs, _ = read_pairs(settings, effort.seed)
    margins = _margins(tuned, pairs, settings, effort)
    hits = accuracy(margins).tolist()
    groups = groups_of(pairs)
    low, high = bootstrap_interval(hits, groups)
    return {
        "accuracy": sum(hits) / len(hits),
        "ci95": [low, high],
        "pairs": len(hits),
        "groups": len(set(groups)),
        "margin_mean": margins.mean().item(),
        "draws": effort.draws,
        "split": split,
    }
