"""Any vision-language model of transformers as a judge: asked about pictures, read at its next token or by its words.

    next_token     log-probabilities of the first token of the answer, fp32: no sampling, nothing to parse
    answers        the answer itself, greedy

Questions are written by the model's own chat template and padded on the left, so that a row's answer does not depend on
the rest of the batch. A model that thinks aloud first says nothing with its next token: give it a `prefix` that
closes the thought, such as "<think></think>".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from evaluators.preprocess import Preprocess, of_processor
from evaluators.towers import DTYPES, choose_device
from evaluators.weights import fingerprint, open_pretrained
from mmalign.errors import UserError, reason
from mmalign.precision import Precision

Pictures = Sequence[Image.Image]
BATCH = 16
# what a processor gives for one picture when it is one tensor of one size, which pixels can be put in place of
PLAIN = {"input_ids", "attention_mask", "pixel_values", "mm_token_type_ids", "token_type_ids"}


class ChatModel:
    """A model and its processor.

    Args:
        folder: of both.
        prefix: what the answer begins with, put there rather than generated.

    Attributes:
        fingerprint: of the weights, the template and the prefix.

    Raises:
        UserError: no such model, partial weights, no chat template.
    """

    def __init__(
        self, folder: Path, *, device: str | None = None, precision: Precision = "fp32", prefix: str = ""
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._place, self._prefix = str(folder), prefix
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise UserError(f"the processor cannot be loaded: {reason(error)}", place=self._place) from error
        self.tokenizer: Any = getattr(self._processor, "tokenizer", None)
        if self.tokenizer is None or getattr(self._processor, "image_processor", None) is None:
            raise UserError("the model has no image processor beside a tokenizer", place=self._place)
        if not getattr(self._processor, "chat_template", None):
            raise UserError("the model has no chat template", place=self._place, fix="Use an instruction-tuned one.")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._device = choose_device(device)
        model: Any = open_pretrained(AutoModelForImageTextToText, folder, dtype=DTYPES[precision])
        self.fingerprint = fingerprint(model, self._processor.chat_template, prefix)
        self._model = model.to(self._device)

    @torch.no_grad()
    def next_token(self, questions: Sequence[str], pictures: Sequence[Pictures]) -> Float[Tensor, "rows vocabulary"]:
        """Log-probabilities of what each answer begins with; each question comes with its pictures."""
        parts = [self._log_probs(self._inputs(some, theirs)) for some, theirs in _batches(questions, pictures)]
        return torch.cat(parts)

    def next_token_of_tensors(
        self, questions: Sequence[str], pixels: Float[Tensor, "rows 3 height width"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """The same for RGB in [0, 1], one picture for each question, differentiable.

        Raises:
            UserError: the processor makes tiles or patches of a picture, which pixels cannot be followed through.
        """
        preprocess = self.preprocess
        blank = Image.new("RGB", (preprocess.size, preprocess.size))
        inputs = self._inputs(questions, [[blank]] * len(questions))
        made = preprocess.tensors(pixels).to(self._device, self._model.dtype)
        if set(inputs) - PLAIN or inputs["pixel_values"].shape != made.shape:
            raise self._no_tensors()
        return self._log_probs({**inputs, "pixel_values": made})

    @property
    def preprocess(self) -> Preprocess:
        """How one picture becomes one tensor.

        Raises:
            UserError: it does not.
        """
        found = of_processor(self._processor.image_processor)
        if found is None:
            raise self._no_tensors()
        return found

    @torch.no_grad()
    def answers(self, questions: Sequence[str], pictures: Sequence[Pictures], *, max_new_tokens: int = 64) -> list[str]:
        """What the model says, greedily, without its special tokens."""
        said: list[str] = []
        for some, theirs in _batches(questions, pictures):
            inputs = self._inputs(some, theirs)
            out: Tensor = self._model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            new = out[:, inputs["input_ids"].shape[1] :]
            said += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return said

    def _log_probs(self, inputs: dict[str, Tensor]) -> Float[Tensor, "rows vocabulary"]:
        logits: Tensor = self._model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits.float().log_softmax(-1)

    def _inputs(self, questions: Sequence[str], pictures: Sequence[Pictures]) -> dict[str, Tensor]:
        texts = [self._render(question, len(own)) for question, own in zip(questions, pictures, strict=True)]
        start = self.tokenizer.bos_token
        images = [[image.convert("RGB") for image in own] for own in pictures]
        try:
            made = self._processor(
                text=texts,
                images=images if any(images) else None,
                padding=True,
                return_tensors="pt",
                # a template that writes the start token itself must not be given a second one
                add_special_tokens=not (start is not None and texts[0].startswith(start)),
            )
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise UserError(f"the processor refuses the question: {reason(error)}", place=self._place) from error
        dtype: torch.dtype = self._model.dtype
        tensors = {name: value.to(self._device) for name, value in made.items() if torch.is_tensor(value)}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def _render(self, question: str, pictures: int) -> str:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text: str = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + self._prefix

    def _no_tensors(self) -> UserError:
        return UserError(
            "the model's processor makes more of a picture than one tensor of one size, so no gradient reaches pixels",
            place=self._place,
            fix="Score pictures, or use a model that reads whole pictures, such as LLaVA-1.5.",
        )


def token_ids(tokenizer: Any, words: Sequence[str], *, place: str) -> Int[Tensor, " tokens"]:
    """All tokens that are one of the words, with or without a space before it.

    Raises:
        UserError: there is none.
    """
    found: set[int] = set()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for word in words:
        for text in (word, f" {word}"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            found |= set(ids) if len(ids) == 1 else set()
        # sentencepiece writes a space as a low line, byte-level BPE as a G with a dot
        found |= {vocabulary[token] for token in (word, f"\u2581{word}", f"\u0120{word}") if token in vocabulary}
    if not found:
        raise UserError(f"the tokenizer has no token for {' or '.join(map(repr, words))}", place=place)
    return torch.tensor(sorted(found))


def _batches(questions: Sequence[str], pictures: Sequence[Pictures]) -> list[tuple[list[str], list[Pictures]]]:
    if len(questions) != len(pictures):
        raise ValueError(f"{len(questions)} questions for {len(pictures)} rows of pictures")
    return [
        (list(questions[start : start + BATCH]), list(pictures[start : start + BATCH]))
        for start in range(0, len(questions), BATCH)
    ]
