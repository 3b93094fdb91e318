"""Strategic masking (Re-Align): what an answer takes from the picture becomes [MASK].

    "there is a red circle and a blue square."  ->  "there is a [MASK] and a [MASK]."

By segments, which the authors found better than whole sentences: a thing with its colour and number, a relation, a yes
or no. By rules, or by a model that is asked: its reply counts only if it is the answer itself with masks in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm import words
from vlm.wording import Mention, Span, Vocabulary

MASK = "[MASK]"

_SHORT = re.compile(r"\s*([^\W\d_]+)\s*[.!]?\s*")
_BEGINS = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """An answer and the segments of it that are masked, in order.

    Args:
        answer: whole.
        segments: `answer[start:end]` is masked.
    """

    answer: str
    segments: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The answer with its masks."""
        return self.filled([MASK] * len(self.segments))

    def filled(self, texts: Sequence[str]) -> str:
        """The answer with a text in each mask's place; "a" becomes "an" where the text wants it.

        Raises:
            ValueError: another number of texts than masks.
        """
        parts, end = [], 0
        for (start, stop), text in zip(self.segments, texts, strict=True):
            before = self.answer[end:start]
            if text != MASK:
                before = re.sub(r"\b([Aa])n?(\s+)$", rf"\1{'n' if text[:1] in tuple('aeiou') else ''}\2", before)
            parts += [before, text]
            end = stop
        return "".join([*parts, self.answer[end:]])


def mask(answer: str, vocabulary: Vocabulary) -> Masked | None:
    """The answer with its things, relations and its yes or no masked; None where there is nothing to mask."""
    short = _SHORT.fullmatch(answer)
    if short is not None and short[1].lower() in {"yes", "no", *vocabulary.colours, *vocabulary.numbers}:
        return Masked(answer=answer, segments=(short.span(1),))
    reading = vocabulary.read(answer)
    spans = [_segment(mention) for mention in reading.mentions]
    spans += [one.colour for one in reading.mentions if one.colour is not None and one.colour > one.noun]
    spans += [relation.span for relation in reading.relations]
    begins = _BEGINS.match(answer)
    if begins is not None:
        spans.append(begins.span(1))
    segments: list[Span] = []
    for span in sorted(spans):
        if not segments or span[0] >= segments[-1][1]:  # "no dog": its yes or no may begin a thing
            segments.append(span)
    return Masked(answer=answer, segments=tuple(segments)) if segments else None


def _segment(mention: Mention) -> Span:
    """A mention without its "a" or "the"; with its number, which is the picture's."""
    if mention.lead is None or mention.lead_word in words.NUMBERS:
        return mention.span
    start = min(mention.span[1], mention.lead[1] + 1)
    return (start, mention.span[1])


def masking_prompt(question: str, answer: str) -> str:
    """What a model is asked that shall place the masks."""
    return (
        "Here are a question about a picture and its answer. Copy the answer word for word, but write [MASK] for every "
        "stretch of words that can only be known from the picture: objects together with their attributes and numbers, "
        "what they do, and how they stand to one another. Leave everything else exactly as it is, punctuation too. "
        "Reply with the copy and nothing else.\n\n"
        f"Question: {question}\nAnswer: {answer}\nCopy:"
    )


def read_masked(reply: str, answer: str) -> Masked | None:
    """A model's masks; None where its reply is not the answer with masks in it, or masks nothing or everything."""
    pieces = reply.strip().split(MASK)
    if len(pieces) < 2 or any(not piece for piece in pieces[1:-1]):
        return None
    segments: list[Span] = []
    whole = answer.strip()
    offset = answer.index(whole) if whole else 0
    if not whole.startswith(pieces[0]) or not "".join(pieces).strip():
        return None
    end = len(pieces[0])
    for index, piece in enumerate(pieces[1:], start=1):
        last = index == len(pieces) - 1
        at = len(whole) - len(piece) if last else whole.find(piece, end + 1)
        if at <= end or whole[at : at + len(piece)] != piece:
            return None
        segments.append((offset + end, offset + at))
        end = at + len(piece)
    return Masked(answer=answer, segments=tuple(segments))


def refill_prompt(question: str, masked: str) -> str:
    """What a model is asked that shall fill the masks, looking at a picture."""
    return (
        f"Here are a question about this picture and an answer in which words were replaced by {MASK}. Write the "
        f"answer out with every {MASK} filled by what this picture shows. Leave all other words as they are. Reply "
        "with the answer and nothing else.\n\n"
        f"Question: {question}\nAnswer: {masked}\nFilled:"
    )
