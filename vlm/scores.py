"""Log-probabilities of a batch's views, by policy and reference, from one forward each.

    lp(view)    = sum over answer tokens of log p(token | images, prompt, tokens before it)        fp32
    ratio(view) = lp_policy(view) - lp_reference(view)

All views of all pairs are one forward: what they have in common (the picture, its question) is computed once, and
distinct pictures pass the vision tower once for policy and reference together, unless the tower is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mmalign.errors import UserError
from vlm.models import ImageFeatures
from vlm.parts import PairBatch, Parts


class Scores:
    """Some views of a batch.

    Attributes:
        counts: answer tokens, [views, pairs].
    """

    def __init__(self, parts: Parts, batch: PairBatch, views: Sequence[str]) -> None:
        rows = [row for view in views for row in batch.views[view]]
        self._parts, self._shape = parts, (len(views), len(batch))
        self._keys = [row.key for row in rows]
        self.answers = parts.model.answers(rows).to(batch.device)
        # a trained tower makes features of its own in every forward
        self.features: ImageFeatures | None = (
            None if parts.model.trains_vision else parts.model.encode_images(self.answers.images)
        )
        self.counts: Int64[Tensor, "views pairs"] = self.answers.completion.sum(1).view(self._shape)

    def policy(
        self, also: Tensor | Literal["strongest", "strongest other"] | None = None
    ) -> Float[Tensor, "kinds views pairs"]:
        """lp of every view; with `also` (see `Policy.forward`) those of the other tokens as a second kind."""
        return self._sums(self._parts.module, also)

    def reference(self) -> Float[Tensor, "views pairs"]:
        """The reference's lp, without a graph; from its cache where it has one."""
        rows = self._parts.reference.score(self._keys, lambda module: self._sums(module, None)[0].flatten())
        return rows.view(self._shape)

    def reference_also(
        self, also: Tensor | Literal["strongest", "strongest other"]
    ) -> Float[Tensor, "kinds views pairs"]:
        """The reference's lp and those of other tokens, computed now."""
        return self._parts.reference.run(lambda module: self._sums(module, also))

    def compared(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every answer token, [views, pairs, answer] each: the policy's log-prob, the reference's, and
        KL(reference || policy) over the vocabulary where it is predicted.

        The reference's distributions are made now, before any graph: no cache keeps them.
        """
        reference = self._parts.reference.run(lambda module: module(self.answers, self.features, distributions=True))
        tokens = self._parts.module(self.answers, self.features, reference)
        policy, theirs, divergence = tokens.view(3, *self._shape, -1)
        return policy, theirs.detach(), divergence

    def choices(self) -> Int64[Tensor, "rows answer"]:
        """The policy's likeliest token at every position of every view."""
        with torch.no_grad():
            found: Tensor = self._parts.module(self.answers, self.features, choose=True)
        return found

    def reference_choices(self) -> Int64[Tensor, "rows answer"]:
        """The reference's."""
        found: Tensor = self._parts.reference.run(lambda module: module(self.answers, self.features, choose=True))
        return found

    def _sums(self, module: nn.Module, also: Tensor | Literal["strongest", "strongest other"] | None) -> Tensor:
        tokens: Tensor = module(self.answers, self.features, also)
        return tokens.sum(2).view(-1, *self._shape)


def no_cache(parts: Parts) -> None:
    """Asked for by methods that need `Scores.compared`.

    Raises:
        UserError: the reference is to be read from a cache.
    """
    if not parts.exact_reference:
        raise UserError(
            "the method needs the reference's distributions over the vocabulary, which its cache does not keep",
            place="reference.cache",
            fix="Set reference.cache=null",
        )


def averaged(sums: Float[Tensor, "views pairs"], counts: Int64[Tensor, "views pairs"]) -> Float[Tensor, "views pairs"]:
    """Per answer token."""
    return sums / counts
