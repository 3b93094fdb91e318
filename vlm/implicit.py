"""How a tuned model ranks answers it never saw: implicit-reward accuracy.

    r(y)   = beta (lp_policy(y | m, x) - lp_base(y | m, x))        lp: summed over the answer's tokens
    margin = r(chosen) - r(rejected)

Every side is scored beside its own pictures. The second number takes the mean over the answer's tokens instead of the
sum, so that a long answer counts no more than a short one. beta is the run's own, 1 where its method has none; it
changes margins, not who is ahead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from evaluators.agreement import Agreement, Effort, agreement
from mmalign import config as configuration
from mmalign import method as methods
from mmalign.errors import UserError
from mmalign.progress import progress
from mmalign.records import Preference
from mmalign.reference import AdaptersOff, FrozenCopy, Reference
from vlm.adapters import adapters_disabled, lora_layers
from vlm.batch import Row
from vlm.conversations import conversations
from vlm.models import Policy, TooLongError, VisionLanguageModel
from vlm.recipe import TrainConfig
from vlm.scores import averaged
from vlm.tuned import Tuned, find_tuned, open_base, open_tuned


def agreements(run: Path, pairs: Sequence[Preference], effort: Effort) -> list[Agreement]:
    """Of a run's newest checkpoint with the labels of pairs of answers: by sums, and by means over tokens.

    Raises:
        UserError: no run there, a pair that is not of answers or cannot be read, or all are too long.
    """
    tuned = find_tuned(run)
    model, reference = opened(tuned, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    beta, found = beta_of(tuned.config), []
    starts = range(0, len(pairs), effort.batch_size)
    for start in progress(starts, "implicit rewards", unit="batch"):
        found += margins(model, reference, pairs[start : start + effort.batch_size])
    if all(both is None for both in found):
        raise UserError(
            f"all {len(pairs)} pairs are longer than the model's {model.max_tokens} tokens",
            place=str(run),
            fix="Judge shorter ones; the run's model.max_tokens is its limit",
        )
    return [
        agreement(
            f"{run} (implicit reward, {name})", [None if both is None else beta * both[kind] for both in found], pairs
        )
        for kind, name in enumerate(("sum over tokens", "mean per token"))
    ]


def opened(tuned: Tuned, device: torch.device) -> tuple[VisionLanguageModel, Reference]:
    """The tuned model, and its base: itself without its adapter, or a second model."""
    model = open_tuned(tuned).to(device)
    if lora_layers(model.network):
        return model, AdaptersOff(Policy(model), lambda: adapters_disabled(model.network))
    return model, FrozenCopy(Policy(open_base(tuned).to(device)), contextlib.nullcontext)


def beta_of(config: TrainConfig) -> float:
    """The strength that the run's rewards have."""
    module = methods.load("vlm", config.method.name)
    options = configuration.parse_section(module.Options, config.method, "method")
    return float(getattr(options, "beta", 1.0))


def margins(
    model: VisionLanguageModel, reference: Reference, pairs: Sequence[Preference]
) -> list[tuple[float, float] | None]:
    """Differences of log-ratios, chosen minus rejected, without beta: of sums, and of means over tokens.

    Images are encoded by policy and base each for itself, because what is tuned may be the projector too.

    Args:
        pairs: read and scored in one forward; None for those with a side that is too long.
    """
    rows = [_rows(model, pair) for pair in pairs]
    read = [side for both in rows if both is not None for side in both]
    if not read:
        return [None] * len(rows)
    answers = model.answers(read).to(model.device)

    def sums(module: nn.Module) -> Float[Tensor, "sides pairs"]:
        tokens: Tensor = module(answers)
        return tokens[0].sum(1).view(-1, 2).T

    with torch.no_grad():
        ratios = sums(Policy(model)) - reference.run(sums)
    counts = answers.completion.sum(1).view(-1, 2).T
    kinds = torch.stack([ratios, averaged(ratios, counts)])
    by_sum, by_mean = (kinds[:, 0] - kinds[:, 1]).tolist()
    found = zip(by_sum, by_mean, strict=True)
    return [None if both is None else next(found) for both in rows]


def _rows(model: VisionLanguageModel, pair: Preference) -> tuple[Row, Row] | None:
    """Both sides, the chosen one first; None where one is too long."""
    try:
        chosen, rejected = map(model.encode, conversations(pair))
    except TooLongError:
        return None
    return chosen, rejected
