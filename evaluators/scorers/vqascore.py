"""VQAScore by any vision-language model: how sure it is that the picture shows what the prompt says.

    vqa_norm   P(yes) / (P(yes) + P(no))        0 to 1: holds for models that spread their mass over other words
    vqa_full   P(yes)                           0 to 1
    log_odds   log P(yes) - log P(no)           unbounded; for win rates, where vqa_norm ties at 1

P(yes) is the probability that the answer begins with a token for "yes", in any case and with or without a space. It is
not the published CLIP-FlanT5 number, which also has the end token in it.

Source: Lin et al. 2404.01291.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from evaluators.chat import ChatModel, token_ids
from evaluators.scorer import Card
from evaluators.weights import Weights, find, fingerprint
from mmalign.errors import UserError, nearest
from mmalign.precision import Precision

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'
YES, NO = ("Yes", "yes", "YES"), ("No", "no", "NO")
NUMBERS = ("vqa_norm", "vqa_full", "log_odds")
WEIGHTS = Weights(name="vqascore", repo="Qwen/Qwen2.5-VL-7B-Instruct", gigabytes=16.6, licence="Apache-2.0")
CARD = Card(unit="P(yes) of P(yes) + P(no), 0 to 1", licence="the model's", weights=(WEIGHTS,))


class VqaScore:
    """See the module's docstring."""

    numbers = NUMBERS

    def __init__(self, model: ChatModel, question: str, main: str, version: str, place: str) -> None:
        if main not in NUMBERS:
            raise UserError(f"VQAScore has no number '{main}'", fix=nearest(main, NUMBERS))
        if "{prompt}" not in question:
            raise UserError("the question does not say where the prompt goes", fix="Write {prompt} there.")
        self.main, self._model, self._question = main, model, question
        self._yes, self._no = (token_ids(model.tokenizer, words, place=place) for words in (YES, NO))
        self.identity = f"vqascore@{version}#{fingerprint(model.fingerprint, question)}"

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See `Scorer`."""
        if not images:
            return []
        columns = self._numbers(self._model.next_token(self._asked(prompts), [[image] for image in images]))
        rows = zip(*(columns[name].tolist() for name in NUMBERS), strict=True)
        return [dict(zip(NUMBERS, row, strict=True)) for row in rows]

    def score_tensors(
        self, prompts: Sequence[str], pixels: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, " images"]:
        """See `TensorScorer`; for models that read whole pictures."""
        return self._numbers(self._model.next_token_of_tensors(self._asked(prompts), pixels))[self.main]

    def _asked(self, prompts: Sequence[str]) -> list[str]:
        return [self._question.replace("{prompt}", prompt) for prompt in prompts]

    def _numbers(self, log_probs: Float[Tensor, "images vocabulary"]) -> dict[str, Tensor]:
        yes, no = (log_probs[:, ids.to(log_probs.device)].logsumexp(-1) for ids in (self._yes, self._no))
        return {"vqa_norm": torch.sigmoid(yes - no), "vqa_full": yes.exp(), "log_odds": yes - no}


def build(
    path: str | None = None,
    main: str = "vqa_norm",
    question: str = QUESTION,
    prefix: str = "",
    device: str | None = None,
    precision: Precision = "fp32",
    download: bool = False,
) -> VqaScore:
    """VQAScore by the model in `path`; `question` has {prompt} where the prompt goes, `prefix` begins the answer."""
    folder = find(WEIGHTS, path, download=download)
    model = ChatModel(folder, device=device, precision=precision, prefix=prefix)
    return VqaScore(model, question, main, "1" if precision == "fp32" else f"1-{precision}", str(folder))
