"""mDPO (Wang et al., EMNLP 2024, 2406.11839): DPO on words, DPO on pictures, and an anchor.

    loss = -log sigmoid(r(y_w | m) - r(y_l | m))              words: the rejected answer
         - log sigmoid(r(y_w | m) - r(y_w | m_c))             pictures: the chosen answer beside a crop m_c
         - log sigmoid(r(y_w | m) - anchor)                   the chosen answer must not get less likely

m_c keeps 1 to 20 % of the picture's area and is enlarged to its size.

Where this differs from the authors' code (luka-group/mDPO): theirs crops the normalised tensor, and anew in the
policy's and the reference's forward, so that the ratio compares two different pictures; here one crop of the picture
itself serves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import Field
from torch import Tensor

from mmalign.losses import sigmoid
from mmalign.method import Metrics, OneLoss
from vlm.comparison import Comparison, ComparisonOptions, metrics
from vlm.conversations import Conversation
from vlm.corruption import crop
from vlm.parts import Pair, PairBatch, Parts, under
from vlm.scores import Scores


class Options(ComparisonOptions):
    """Keys of the recipe's `method` section."""

    picture_weight: float = Field(1.0, ge=0, description="of the term on pictures")
    anchor_weight: float = Field(1.0, ge=0, description="of the anchor")
    anchor: float = Field(0.0, description="what the chosen answer's reward is compared with")
    area: tuple[float, float] = Field((0.01, 0.2), description="share of the picture that a crop keeps, from and to")


class MDPO(OneLoss):
    """See the module's docstring."""

    def __init__(self, options: Options, parts: Parts) -> None:
        self._options, self._parts = options, parts
        self._comparison = Comparison(options)

    def describe(self) -> dict[str, str]:
        """Lines for the block printed at the start."""
        return self._comparison.describe()

    def views(self, pair: Pair) -> Mapping[str, Conversation]:
        generator = pair.generator("crop")
        crops = [crop(image, generator, self._options.area) for image in pair.chosen.images]
        return {
            "chosen": pair.chosen,
            "rejected": under(pair.rejected, pair.chosen.images, "beside the chosen pictures"),
            "cropped": under(pair.chosen, crops, "beside a crop"),
        }

    def losses(self, batch: PairBatch) -> Iterator[tuple[Tensor, Metrics]]:
        options, comparison = self._options, self._comparison
        scores = Scores(self._parts, batch, ("chosen", "rejected", "cropped"))
        reference = scores.reference()
        policy = scores.policy()[0]
        rewards = comparison.rewards(policy, reference, scores.counts)
        words = comparison.loss(batch, rewards[0], rewards[1], policy, scores.counts)
        pictures = sigmoid(rewards[0] - rewards[2])
        anchored = sigmoid(rewards[0] - options.anchor)
        losses = words + options.picture_weight * pictures + options.anchor_weight * anchored
        seen = (rewards[0] - rewards[2]).detach().mean()
        yield losses.mean(), {**metrics(rewards, policy, reference), "rewards/picture_margins": seen}


def build(options: Options, parts: Parts) -> MDPO:
    """The method, from its options and the trainer's parts."""
    return MDPO(options, parts)
