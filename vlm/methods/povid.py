"""POVID (Zhou et al. 2024, 2402.11411): against answers that were made to hallucinate, and against the model's own
choices when it sees badly.

Stage 1 is DPO on (true answer, answer with injected hallucinations): `stage: 1` here, or `dpo`.

Stage 2 adds a third answer ~y: at each position of the chosen answer, the token that the model finds likeliest beside
a noised picture m~ (`vlm.corruption.noised`). Nothing is sampled; where it is the chosen token the two cancel, so the
signal sits where noise changes the model's mind.

    paper     loss = -log sigmoid(r(y_w | m) - (r(y_l | m) + r(~y | m~)) / 2)
    authors   loss = 1/2 DPO(r(y_w | m) - r(y_l | m)) + 1/2 DPO(r(y_w | m) - r(~y | m))

In the paper's form ~y is what the model would say beside m~ and is scored there; the authors' code scores it beside the
clean picture. The paper's coefficients alpha = beta, beta_1 = beta_2 = beta / 2 are the ones that balance it.

`tokens: shared` scores the policy's ~y under the reference too. The authors' reference takes an argmax of its own
(`own`), and the ratio is then one of two different strings. They are the same at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmalign.errors import UserError
from mmalign.losses import sigmoid
from mmalign.method import Metrics, OneLoss
from vlm.comparison import Comparison, ComparisonOptions, metrics
from vlm.conversations import Conversation
from vlm.corruption import noised
from vlm.parts import Pair, PairBatch, Parts, under
from vlm.scores import Scores


class Options(ComparisonOptions):
    """Keys of the recipe's `method` section."""

    stage: Literal[1, 2] = Field(2, description="1: injected hallucinations alone; 2: the noised picture's too")
    form: Literal["paper", "authors"] = Field("paper", description="of stage 2; see the module")
    tokens: Literal["shared", "own"] = Field(
        "shared", description="the reference scores the policy's choices, or its own as in the authors' code"
    )
    noise_step: int = Field(500, ge=0, lt=1000, description="of the noise schedule; 500 keeps 0.86 of the picture")
    overflow: Literal["clamp", "wrap"] = Field(
        "clamp", description="noised values beyond black and white; the authors' conversion wraps them"
    )


class POVID(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        if options.stage == 2 and not parts.exact_reference:
            raise UserError(
                "in stage 2 the reference is asked about what the policy would choose, which changes as it learns",
                place="reference.cache",
                fix="Set reference.cache=null, or method.stage=1",
            )
        self._options, self._parts = options, parts
        self._comparison = Comparison(options)

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        stage = "injected hallucinations"
        if self._options.stage == 2:
            stage += f", and choices beside pictures with noise of step {self._options.noise_step}"
        return {**self._comparison.describe(), "stage": f"{self._options.stage}: {stage}"}

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        images = pair.chosen.images
        found = {"chosen": pair.chosen, "rejected": under(pair.rejected, images, "beside the chosen pictures")}
        if self._options.stage == 2:
            generator = pair.generator("noise")
            noisy = [
                noised(image, self._options.noise_step, generator, overflow=self._options.overflow) for image in images
            ]
            found["noised"] = under(pair.chosen, noisy, "beside a noised picture")
        return found

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        if self._options.stage == 1:
            scores = Scores(self._parts, batch, ("chosen", "rejected"))
            reference = scores.reference()
            policy = scores.policy()[0]
            rewards = self._comparison.rewards(policy, reference, scores.counts)
            losses = self._comparison.loss(batch, rewards[0], rewards[1], policy, scores.counts)
            yield losses.mean(), metrics(rewards, policy, reference)
            return
        scores, policy, reference = self.paper(batch) if self._options.form == "paper" else self.authors(batch)
        rewards = self._comparison.rewards(policy, reference, scores.counts[[0, 1, 0]])
        chosen, rejected, imagined = rewards
        answers, counts = policy[:2], scores.counts[:2]
        if self._options.form == "paper":
            losses = self._comparison.loss(batch, chosen, (rejected + imagined) / 2, answers, counts)
        else:
            losses = 0.5 * self._comparison.loss(batch, chosen, rejected, answers, counts)
            losses = losses + 0.5 * sigmoid(chosen - imagined)
        seen = (chosen - imagined).detach().mean()
        yield losses.mean(), {**metrics(rewards, policy, reference), "rewards/noise_margins": seen}

    def paper(self, batch: PairBatch) -> tuple[Scores, Tensor, Tensor]:
        """(scores, policy's and reference's log-probs of chosen, rejected and imagined answers), ~y beside m~."""
        scores = Scores(self._parts, batch, ("chosen", "rejected", "noised"))
        if self._options.tokens == "own":
            reference, policy = scores.reference_also("strongest"), scores.policy("strongest")
        else:
            choices = scores.choices()
            reference, policy = scores.reference_also(choices), scores.policy(choices)
        return scores, _imagined(policy, 2), _imagined(reference, 2)

    def authors(self, batch: PairBatch) -> tuple[Scores, Tensor, Tensor]:
        """The same, ~y beside m."""
        scores = Scores(self._parts, batch, ("chosen", "rejected"))
        noisy = Scores(self._parts, batch, ("noised",))
        mine = _below(noisy.choices(), scores)
        theirs = _below(noisy.reference_choices(), scores) if self._options.tokens == "own" else mine
        reference, policy = scores.reference_also(theirs), scores.policy(mine)
        return scores, _imagined(policy, 0), _imagined(reference, 0)


def _imagined(kinds: Tensor, view: int) -> Tensor:
    """[3, pairs] from [kinds, views, pairs]: answers as they are, and the other tokens of one view."""
    own, others = kinds
    return torch.stack([own[0], own[1], others[view]])


def _below(choices: Tensor, scores: Scores) -> Tensor:
    """[rows, answer] of two views: the choices for the chosen rows; the rejected rows keep their own tokens."""
    found = scores.answers.targets.clone()
    found[: len(choices), : choices.shape[1]] = choices
    return found


def build(options: Options, parts: Parts) -> POVID:
    """The method, from its options and the trainer's parts."""
    return POVID(options, parts)
