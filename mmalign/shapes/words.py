"""A small byte-pair vocabulary in CLIP's format: every word of the world is one token, anything else falls to bytes."""

from __future__ import annotations

from mmalign.shapes.scenes import COLOURS, NUMBERS, SHAPES

WORDS = (
    *(
        "a",
        "an",
        "the",
        "is",
        "are",
        "there",
        "exactly",
        "one",
        "object",
        "objects",
        "of",
        "and",
        "in",
        "with",
    ),
    *(
        "left",
        "right",
        "above",
        "below",
        "yes",
        "no",
        "picture",
        "what",
        "which",
        "how",
        "many",
        "colour",
        "shape",
    ),
    *NUMBERS.values(),
    *COLOURS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
)
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def byte_symbols() -> list[str]:
    """The printable stand-ins for the 256 bytes, in CLIP's (GPT-2's) order: printable bytes first, others shifted."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in order). The end token has the largest id, as some poolings need."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols)]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(WORDS):
        parts = [*word[:-1], word[-1] + WORD_END]
        while len(parts) > 1:  # from the right, so that no merge of one word can start inside another
            pair = (parts[-2], parts[-1])
            if pair not in merges:
                merges.append(pair)
            parts[-2:] = ["".join(pair)]
    tokens.extend(dict.fromkeys("".join(pair) for pair in merges))
    return {token: index for index, token in enumerate([*tokens, START, END])}, merges
