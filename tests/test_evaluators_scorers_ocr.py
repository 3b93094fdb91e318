"""Rendered text: the formula, prompts that quote nothing, and the reader itself where it is installed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from evaluators.scorer import load, main_scores, score_each
from evaluators.scorers import ocr
from evaluators.scorers.ocr import OcrScorer, edits, rendered, target
from mmalign.errors import UserError

BLANK = Image.new("RGB", (256, 96), "white")

RENDERED = {
    ("helloworld", "Hello World"): 1.0,
    ("hello", "say HELLO again"): 1.0,
    ("hello", "hallo"): 0.8,
    ("hello", ""): 0.0,
    ("ab", "completely different"): 0.0,
}


@pytest.mark.parametrize(("pair", "expected"), RENDERED.items(), ids=range(len(RENDERED)))
def test_the_score_is_the_formula(pair: tuple[str, str], expected: float) -> None:
    assert rendered(*pair) == pytest.approx(expected)


def test_edits_are_counted() -> None:
    assert [edits("kitten", "sitting"), edits("", "abc"), edits("abc", ""), edits("abc", "abc")] == [3, 3, 0 + 3, 0]


@given(st.text("ab", max_size=6), st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edits_are_a_distance(a: str, b: str, c: str) -> None:
    assert edits(a, b) == edits(b, a) and (edits(a, b) == 0) == (a == b)
    assert edits(a, c) <= edits(a, b) + edits(b, c)
    assert abs(len(a) - len(b)) <= edits(a, b) <= max(len(a), len(b))


def test_a_target_is_what_is_quoted_first() -> None:
    assert target('a sign that reads "Hello World" and "more"') == "helloworld"
    assert target("a sign, \u201cGood day\u201d") == "goodday"
    for prompt in ("a sign", 'a sign that reads ""', 'a sign that reads " "', 'half a "quotation'):
        with pytest.raises(UserError, match="the prompt quotes no text"):
            target(prompt)


def test_a_prompt_without_a_quotation_is_a_row_with_an_error() -> None:
    scorer = OcrScorer(lambda image: "hello", "ocr@test")
    rows = score_each(scorer, ['"hello"', "hello"], [BLANK, BLANK])
    assert rows[0].numbers == {"ocr": 1.0} and "quotes no text" in str(rows[1].error)


def test_a_reader_that_is_not_installed_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, ocr.PACKAGE, None)
    with pytest.raises(UserError, match=r"'rapidocr_onnxruntime' is not installed\. pip install"):
        load("ocr")


@pytest.mark.slow
def test_the_reader_reads() -> None:
    pytest.importorskip(ocr.PACKAGE, reason="the extra 'ocr' is not installed")
    image = BLANK.copy()
    ImageDraw.Draw(image).text((20, 25), "Hello World", fill="black", font=ImageFont.load_default(36))
    values = main_scores(load("ocr"), ['a sign: "hello world"', 'a sign: "hello world"'], [image, BLANK])
    assert values == [1.0, 0.0]
