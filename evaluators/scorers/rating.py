"""A vision-language model's rating of a picture, as the expectation over the digits that its answer could begin with.

    rating = sum over k of k P(k) / sum over k of P(k)        k = 1 .. digits

No answer is sampled and none parsed, so there is nothing that could fail to parse, and few ties.
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
from mmalign.errors import UserError
from mmalign.precision import Precision

QUESTION = (
    'This picture was made for the text "{prompt}". Rate from 1 to {digits} how well it shows the text and how good it '
    "looks, where {digits} is best. Answer with one number and nothing else."
)
WEIGHTS = Weights(name="rating", repo="Qwen/Qwen2.5-VL-7B-Instruct", gigabytes=16.6, licence="Apache-2.0")
CARD = Card(unit="expected digit, 1 to 5", licence="the model's", weights=(WEIGHTS,))


class Rating:
    """See the module's docstring."""

    main = "rating"
    numbers = ("rating",)

    def __init__(self, model: ChatModel, question: str, digits: int, version: str, place: str) -> None:
        if not 2 <= digits <= 9:
            raise UserError(f"a rating has 2 to 9 digits, not {digits}", fix="10 is two tokens.")
        if "{prompt}" not in question:
            raise UserError("the question does not say where the prompt goes", fix="Write {prompt} there.")
        self._model, self._question = model, question.replace("{digits}", str(digits))
        self._digits = [token_ids(model.tokenizer, [str(k)], place=place) for k in range(1, digits + 1)]
        self.identity = f"rating@{version}#{fingerprint(model.fingerprint, self._question)}"

    def score_images(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """See `Scorer`."""
        if not images:
            return []
        log_probs = self._model.next_token(self._asked(prompts), [[image] for image in images])
        return [{self.main: value} for value in self._expected(log_probs).tolist()]

    def score_tensors(
        self, prompts: Sequence[str], pixels: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, " images"]:
        """See `TensorScorer`; for models that read whole pictures."""
        return self._expected(self._model.next_token_of_tensors(self._asked(prompts), pixels))

    def _asked(self, prompts: Sequence[str]) -> list[str]:
        return [self._question.replace("{prompt}", prompt) for prompt in prompts]

    def _expected(self, log_probs: Float[Tensor, "images vocabulary"]) -> Float[Tensor, " images"]:
        each = torch.stack([log_probs[:, ids.to(log_probs.device)].logsumexp(-1) for ids in self._digits], dim=-1)
        values = torch.arange(1, len(self._digits) + 1, device=each.device, dtype=each.dtype)
        return (each.softmax(-1) * values).sum(-1)


def build(
    path: str | None = None,
    question: str = QUESTION,
    digits: int = 5,
    prefix: str = "",
    device: str | None = None,
    precision: Precision = "fp32",
    download: bool = False,
) -> Rating:
    """Ratings by the model in `path`; `question` has {prompt} and may have {digits}, `prefix` begins the answer."""
    folder = find(WEIGHTS, path, download=download)
    model = ChatModel(folder, device=device, precision=precision, prefix=prefix)
    return Rating(model, question, digits, "1" if precision == "fp32" else f"1-{precision}", str(folder))
