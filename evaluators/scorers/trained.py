"""A scorer that was trained here: `mmalign train evaluators/...`, from preferences of your own.

    trained = exp(logit_scale) * cosine(prompt, picture) + head        in nats

Between pictures of one prompt, sigmoid of a difference is the probability of being preferred; between prompts numbers
cannot be compared. `held_out.json` of the run says how often it is right and how sure it may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from evaluators.scorer import Card
from evaluators.towers import ClipTower, TowerScorer
from evaluators.weights import fingerprint
from mmalign.errors import UserError
from mmalign.precision import Precision

CARD = Card(
    unit="nats: a difference is the log odds of being preferred",
    licence="the base's and the preferences'",
    asks=("path=RUN, the folder of a run of `mmalign train evaluators/...`",),
)


class TrainedScorer(TowerScorer):
    """See the module's docstring."""

    def __init__(self, folder: Path, device: str | None, precision: Precision) -> None:
        from evaluators.training.model import open_head

        tower = ClipTower(folder, device, precision)
        self._head = open_head(folder, tower.width)
        if self._head is not None:
            self._head.to(tower.device)
        super().__init__("trained", "1", tower, precision)

    def values(self, prompts: Sequence[str], features: Float[Tensor, "images width"]) -> Float[Tensor, " images"]:
        texts = self.tower.texts(list(prompts))
        scores = self.tower.scale * (texts * features).sum(-1)
        return scores if self._head is None else scores + self._head(texts, features)

    def _fingerprint(self) -> str:
        return fingerprint(self.tower.fingerprint, *([] if self._head is None else [self._head]))


def build(path: str | None = None, device: str | None = None, precision: Precision = "fp32") -> TrainedScorer:
    """The scorer of the run at `path`: its newest good checkpoint, or the checkpoint itself."""
    if path is None:
        raise UserError("no run is named", place="scorer 'trained'", fix="Give the folder of one: trained,path=RUN.")
    from evaluators.recipe import TrainConfig
    from mmalign import runs

    if Path(path).is_dir() and (package := runs.package(Path(path))) != "evaluators":
        raise UserError(
            f"a run of {package} is no scorer", place=path, fix="Give one of `mmalign train evaluators/...`."
        )
    return TrainedScorer(runs.find(TrainConfig, Path(path)).weights, device, precision)
