"""Rewards: any scorer or the user's function, standardised sums, and one line for whatever goes wrong."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluators.rewards import Reward, RewardSettings, permutation, shuffled
from evaluators.scorer import load, main_scores
from mmalign.config import parse_section
from mmalign.errors import UserError
from mmalign.shapes.render import render
from mmalign.shapes.scenes import draw_scenes

SCENES = draw_scenes(12, split="heldout", seed=5)
PROMPTS = [scene.caption for scene in SCENES]
IMAGES = [Image.fromarray(render(scene, number)) for number, scene in enumerate(SCENES)]
STYLE = {"name": "style", "scorer": {"name": "shapes"}, "number": "style"}
FAITHFUL = {"name": "right", "scorer": {"name": "shapes"}, "number": "faithful"}


def settings(*terms: dict[str, Any], **others: Any) -> RewardSettings:
    return parse_section(RewardSettings, {"terms": list(terms), **others}, "reward")


Module = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Writes a module of the user's into the current folder; gives `module:function` of its `f`."""
    monkeypatch.chdir(tmp_path)
    before, names = list(sys.path), []

    def write(source: str) -> str:
        names.append(f"users_{tmp_path.name.replace('-', '_')}_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        importlib.invalidate_caches()
        return f"{names[-1]}:f"

    yield write
    sys.path[:] = before
    for name in names:
        sys.modules.pop(name, None)


def function(module: Module, source: str) -> Reward:
    return Reward(settings({"name": "mine", "function": module(source)}))


# ------------------------------------------------------------------------------------------------------ scoring


def test_one_raw_term_is_the_scorer_itself() -> None:
    reward = Reward(settings(STYLE))
    assert reward.fitted
    scores = reward.score(PROMPTS, IMAGES)
    assert scores.total == main_scores(load("shapes", {"main": "style"}), PROMPTS, IMAGES)
    assert scores.parts == {"style": scores.total}
    assert {"shapes/style", "shapes/faithful", "shapes/reward"} <= set(scores.numbers[0])
    assert Reward(settings({**STYLE, "weight": -2.0})).score(PROMPTS, IMAGES).total == [-2 * v for v in scores.total]


def test_the_main_number_is_the_default() -> None:
    assert Reward(settings({"name": "r", "scorer": {"name": "shapes"}})).score(PROMPTS, IMAGES).total == [1.0] * 12


def test_terms_are_standardised_by_the_first_round_and_weighted(module: Module) -> None:
    spec = module("def f(prompts, images):\n    return [float(len(prompt)) for prompt in prompts]\n")
    reward = Reward(settings({**STYLE, "weight": 2.0}, {"name": "long", "function": spec, "weight": -1.0}))
    measured = reward.measure(PROMPTS, IMAGES)
    assert not reward.fitted
    with pytest.raises(ValueError, match="fit comes first"):
        reward.combine(measured.parts)
    reward.fit(measured.parts)
    style, long = (np.array(measured.parts[name]) for name in ("style", "long"))
    expected = 2 * (style - style.mean()) / style.std() - (long - long.mean()) / long.std()
    assert reward.combine(measured.parts) == pytest.approx(expected.tolist(), abs=1e-12)
    assert measured.numbers[3]["long"] == len(PROMPTS[3])
    kept = reward.state_dict()
    reward.fit({name: [0.0, 5.0] for name in measured.parts})  # a later round changes nothing
    assert reward.state_dict() == kept


def test_given_mean_and_deviation_need_no_first_round() -> None:
    reward = Reward(settings({**STYLE, "mean": 0.5, "std": 0.1}, {**FAITHFUL, "mean": 0.0, "std": 1.0, "weight": 3.0}))
    assert reward.fitted
    scores = reward.score(PROMPTS, IMAGES)
    assert scores.total == pytest.approx([(v - 0.5) / 0.1 + 3 * 1.0 for v in scores.parts["style"]])


def test_a_mix_of_given_and_fitted_terms() -> None:
    reward = Reward(settings({**STYLE, "mean": 0.5, "std": 0.1}, {**STYLE, "name": "again"}))
    measured = reward.measure(PROMPTS, IMAGES)
    reward.fit(measured.parts)
    statistics = reward.state_dict()["statistics"]
    assert statistics["style"] == [0.5, 0.1]
    assert statistics["again"] == pytest.approx([np.mean(measured.parts["again"]), np.std(measured.parts["again"])])


@given(st.permutations(range(12)))
def test_the_order_of_what_was_gathered_changes_no_bit(order: Sequence[int]) -> None:
    values = {"style": [v / 7 for v in range(12)], "right": [math.sin(v) for v in range(12)]}
    fits = []
    for rows in (range(12), order):
        reward = Reward(settings(STYLE, FAITHFUL))
        reward.fit({name: [column[row] for row in rows] for name, column in values.items()})
        fits.append(reward.state_dict())
    assert fits[0] == fits[1]


def test_terms_share_the_forward_of_their_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluators.scorers.shapes import ShapesChecker

    calls: list[int] = []
    score = ShapesChecker.score_images

    def counted(self: ShapesChecker, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, float]]:
        calls.append(len(images))
        return score(self, prompts, images)

    monkeypatch.setattr(ShapesChecker, "score_images", counted)
    reward = Reward(settings(STYLE, FAITHFUL, batch_size=5))
    assert len(reward.measure(PROMPTS, IMAGES).parts["right"]) == 12
    assert calls == [5, 5, 2]


def test_scorers_of_one_name_with_other_options_keep_their_numbers_apart() -> None:
    other = {"name": "other", "scorer": {"name": "shapes", "main": "style"}}
    reward = Reward(settings(FAITHFUL, other))
    numbers = reward.measure(PROMPTS[:2], IMAGES[:2]).numbers[0]
    assert {"shapes/style", "shapes-2/style"} <= set(numbers)


def test_clip_is_a_reward() -> None:
    reward = Reward(settings({"name": "clip", "scorer": {"name": "clip", "device": "cpu"}}))
    assert reward.score(PROMPTS[:3], IMAGES[:3]).total == main_scores(
        load("clip", {"device": "cpu"}), PROMPTS[:3], IMAGES[:3]
    )


def test_no_pictures_have_no_scores() -> None:
    assert Reward(settings(STYLE)).score([], []).total == []


# ----------------------------------------------------------------------------------------------------- function

KINDS = {
    "list": "[0.5, 1, True]",
    "tuple": "(0.5, 1, 1)",
    "numpy": "__import__('numpy').array([0.5, 1, 1], dtype='float32')",
    "numpy items": "[__import__('numpy').float32(0.5), __import__('numpy').int64(1), 1]",
    "torch": "__import__('torch').tensor([0.5, 1, 1], requires_grad=True)",
    "torch items": "list(__import__('torch').tensor([0.5, 1, 1]))",
}


@pytest.mark.parametrize("returned", KINDS.values(), ids=KINDS)
def test_whatever_is_a_number_per_picture_will_do(module: Module, returned: str) -> None:
    reward = function(module, f"def f(prompts, images):\n    return {returned}\n")
    assert reward.score(PROMPTS[:3], IMAGES[:3]).total == [0.5, 1.0, 1.0]


def test_a_function_is_given_lists_of_its_own_in_batches(module: Module) -> None:
    spec = module(
        "def f(prompts, images):\n    n = len(images)\n    images.clear(), prompts.clear()\n    return [n] * n\n"
    )
    reward = Reward(settings({"name": "mine", "function": spec}, batch_size=2))
    images = IMAGES[:3]
    assert reward.score(PROMPTS[:3], images).total == [2.0, 2.0, 1.0]
    assert len(images) == 3


WRONG = {
    "None": ("None", "returned None"),
    "dict": ("{'a': 1}", "returned a value of type dict"),
    "text": ("'abc'", "returned a value of type str"),
    "number": ("0.5", "returned a value of type float"),
    "few": ("[0.5, 1]", "returned 2 values for 3 pictures"),
    "many": ("[0.5] * 4", "returned 4 values for 3 pictures"),
    "columns": ("__import__('numpy').zeros((3, 1))", r"returned an array of shape \(3, 1\) for 3 pictures"),
    "scalar": ("__import__('torch').tensor(1.0)", r"returned an array of shape \(\) for 3 pictures"),
    "texts": ("[0.5, '1', 1]", "returned a value of type str as value 1"),
    "nones": ("[0.5, 1, None]", "returned None as value 2"),
    "complex": ("[1j, 1, 1]", "returned a value of type complex as value 0"),
    "lists": ("[[1], [2], [3]]", "returned a value of type list as value 0"),
    "rows": ("list(__import__('numpy').zeros((3, 2)))", r"returned an array of shape \(2,\) as value 0"),
    "strings": ("__import__('numpy').array(['a', 'b', 'c'])", "returned a value of type str as value 0"),
}


@pytest.mark.parametrize(("returned", "said"), WRONG.values(), ids=WRONG)
def test_anything_else_is_refused_in_a_line(module: Module, returned: str, said: str) -> None:
    reward = function(module, f"def f(prompts, images):\n    return {returned}\n")
    with pytest.raises(UserError, match=f"{said} .*pictures 0 to 2, the first .*a number for each picture") as caught:
        reward.score(PROMPTS[:3], IMAGES[:3])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-float('inf')", "10 ** 400", "1e200"])
def test_what_is_not_finite_is_refused_with_its_picture(module: Module, value: str) -> None:
    reward = function(module, f"def f(prompts, images):\n    return [0.5, {value}, 1.0]\n")
    with pytest.raises(
        UserError, match=rf"term 'mine': \S+ returned (-?(nan|inf)|1e\+200) \(picture 1: '{PROMPTS[1]}'\)"
    ):
        reward.score(PROMPTS[:3], IMAGES[:3])


def test_what_a_function_raises_is_told_with_its_line_and_pictures(module: Module) -> None:
    source = "def f(prompts, images):\n    if len(images) < 5:\n        return g(images)\n    return [0.0] * 5\n\n\n"
    spec = module(source + "def g(images):\n    raise RuntimeError('no memory\\nleft')\n")
    reward = Reward(settings({"name": "mine", "function": spec}, batch_size=5))
    said = rf"'{spec}' failed: RuntimeError: no memory left \(\S+\.py:8, pictures 10 to 11, the first '{PROMPTS[10]}'\)"
    with pytest.raises(UserError, match=said):
        reward.score(PROMPTS, IMAGES)


def test_a_failure_in_a_library_is_told_with_the_line_that_called_it(module: Module) -> None:
    reward = function(module, "import json\n\n\ndef f(prompts, images):\n    return json.loads('{')\n")
    with pytest.raises(UserError, match=r"JSONDecodeError: .* \(\S+\.py:5, pictures"):
        reward.score(PROMPTS, IMAGES)


@pytest.mark.parametrize("code", ["exit", "raise"])
def test_a_function_may_not_end_the_run(module: Module, code: str) -> None:
    how = {"exit": "import sys\n    sys.exit(0)", "raise": "raise SystemExit"}[code]
    reward = function(module, f"def f(prompts, images):\n    {how}\n")
    with pytest.raises(UserError, match="failed: SystemExit"):
        reward.score(PROMPTS, IMAGES)


IMPORTS = {
    "no module": ("nowhere_to_be_found:f", None, r"no module 'nowhere_to_be_found' .*'mine'\). Install it, or start"),
    "no submodule": ("json.nowhere:f", None, r"no module 'json\.nowhere'"),
    "mistyped": ("", "def ff(prompts, images):\n    return []\n", "there is no 'f' in .*Did you mean 'ff'"),
    "not callable": ("", "f = 3\n", "is a value of type int, not a function"),
    "raises": ("", "\n1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero \(.*'mine', \S+\.py:2\)"),
    "exits": ("", "raise SystemExit(3)\n", "cannot be imported: SystemExit: 3"),
    "syntax": ("", "def f(:\n", r"cannot be imported: SyntaxError: .*\.py:1"),
    "needs more": ("", "import nothing_like_it\n", "cannot be imported: ModuleNotFoundError: .*nothing_like_it"),
}


@pytest.mark.parametrize(("spec", "source", "said"), IMPORTS.values(), ids=IMPORTS)
def test_what_cannot_be_imported_is_told_in_a_line(module: Module, spec: str, source: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Reward(settings({"name": "mine", "function": spec if source is None else module(source)}))
    assert "reward.terms[0]" in str(caught.value)


def test_the_current_folder_replaces_nothing_installed(module: Module, tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("def f(prompts, images):\n    return [0.0]\n")
    with pytest.raises(UserError, match="there is no 'f' in 'colorsys'"):
        Reward(settings({"name": "mine", "function": "colorsys:f"}))


def test_another_version_of_a_function_is_another_reward(module: Module) -> None:
    source = "def f(prompts, images):\n    return [0.0 for _ in images]\n"
    one, same, other = (function(module, text).identity.split("@")[1] for text in (source, source, source + "#"))
    assert one == same != other
    assert Reward(settings({"name": "m", "function": "math:fsum"})).identity.startswith("m: 1.0 math:fsum@")


# ----------------------------------------------------------------------------------------------------- settings


SETTINGS = {
    "neither": ({"name": "a"}, "reward.terms.*: a term needs a scorer or a function, and not both"),
    "both": ({**STYLE, "number": None, "function": "a:b"}, "and not both"),
    "no colon": ({"name": "a", "function": "module.f"}, "should be module:function, got 'module.f'"),
    "path": ({"name": "a", "function": "../a.py:f"}, "should be module:function"),
    "number": ({"name": "a", "function": "a:b", "number": "x"}, "number chooses among those of a scorer"),
    "half": ({**STYLE, "mean": 0.5}, "mean and std belong together"),
    "std": ({**STYLE, "mean": 0.5, "std": 0.0}, "std: should be greater than 0"),
    "weight": ({**STYLE, "weight": 0.0}, "weight 0 rewards nothing"),
    "typo": ({**STYLE, "wieght": 1.0}, "unknown key .*wieght"),
    "nothing": (None, "terms"),
}


@pytest.mark.parametrize(("term", "said"), SETTINGS.values(), ids=SETTINGS)
def test_a_term_that_says_nothing_sensible_is_refused(term: dict[str, Any] | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings(*([] if term is None else [term]))


def test_terms_have_names_of_their_own() -> None:
    with pytest.raises(UserError, match="two terms are called 'style'"):
        settings(STYLE, STYLE)


SCORERS = {
    "scorer": ({"name": "a", "scorer": {"name": "shape"}}, r"no scorer 'shape' \(reward.terms\[0\], 'a'\)"),
    "option": ({"name": "a", "scorer": {"name": "shapes", "colour": 1}}, r"not take these options.*reward.terms\[0\]"),
    "number": ({**STYLE, "number": "stile"}, r"shapes@1 has no 'stile' .*Did you mean 'style'"),
}


@pytest.mark.parametrize(("term", "said"), SCORERS.values(), ids=SCORERS)
def test_an_unknown_scorer_or_number_is_named(term: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Reward(settings(term))


def test_a_number_that_some_prompts_lack_is_named_with_its_picture() -> None:
    reward = Reward(settings({**STYLE, "number": "relation"}))
    with pytest.raises(UserError, match=r"shapes@1 gave no 'relation' for this prompt \(picture 0: 'a red circle'\)"):
        reward.score(["a red circle"], IMAGES[:1])


def test_a_scorers_own_refusal_names_the_pictures() -> None:
    with pytest.raises(UserError, match=r"not a caption .*pictures 0 to 0, the first 'an oil painting'"):
        Reward(settings(STYLE)).score(["an oil painting"], IMAGES[:1])


# ------------------------------------------------------------------------------------------------------- rounds


def test_a_term_with_one_value_cannot_be_standardised() -> None:
    reward = Reward(settings(STYLE, FAITHFUL))
    measured = reward.measure(PROMPTS, IMAGES)  # drawn by the renderer, so all are faithful
    with pytest.raises(UserError, match=r"term 'right' is 1 for all 12 pictures .* give the term's mean and std"):
        reward.fit(measured.parts)
    with pytest.raises(UserError, match=r"term 'style' is 0\.3 for all 3 pictures"):  # the same but for rounding
        reward.fit({"style": [0.1 + 0.2, 0.3, 0.3], "right": [0.0, 1.0, 1.0]})
    with pytest.raises(UserError, match=r"term 'style' is 0 for all 0 pictures"):
        reward.fit({"style": [], "right": []})


def test_rounds_without_a_preference_warn_and_then_stop() -> None:
    reward = Reward(settings(STYLE, tied_rounds=2))
    groups = ["a", "a", "b", "b"]
    assert reward.note_round([1.0, 2.0, 0.5, 0.5], groups) is None  # a tie inside one prompt is normal
    warning = reward.note_round([0.5] * 4, groups)
    assert warning is not None and "all 4 rewards are 0.5" in warning and "1 of 2" in warning
    assert reward.note_round([1.0, 2.0, 0.5, 0.5], groups) is None  # and the count begins anew
    warning = reward.note_round([1.0, 1.0, 0.5, 0.5], groups)
    assert warning is not None and "tie within every prompt" in warning
    resumed = Reward(settings(STYLE, tied_rounds=2))
    resumed.load_state_dict(json.loads(json.dumps(reward.state_dict())))
    with pytest.raises(UserError, match=r"all 4 rewards are 0\.5, in round 2 in a row: there is nothing to learn"):
        resumed.note_round([0.5] * 4, groups)


def test_single_pictures_of_prompts_are_compared_with_one_another() -> None:
    reward = Reward(settings(STYLE))
    assert reward.note_round([1.0, 2.0], ["a", "b"]) is None
    assert reward.note_round([1.0, 1.0], ["a", "b"]) is not None
    assert reward.note_round([], []) is None


def test_a_resumed_reward_gives_the_same_numbers() -> None:
    values = {"style": [0.1, 0.7, 0.3], "right": [0.0, 1.0, 1.0]}
    first = Reward(settings(STYLE, FAITHFUL))
    first.fit(values)
    second = Reward(settings(STYLE, FAITHFUL))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.combine(values) == first.combine(values)


def test_a_state_of_another_reward_is_refused() -> None:
    with pytest.raises(UserError, match=r"rewarded by 'style: 1\.0 shapes@1 style', the recipe says 'style: 2\.0"):
        Reward(settings({**STYLE, "weight": 2.0})).load_state_dict(Reward(settings(STYLE)).state_dict())


def test_the_identity_says_every_term() -> None:
    reward = Reward(settings({**STYLE, "mean": 0.5, "std": 0.1}, {**FAITHFUL, "weight": -0.5}))
    assert reward.identity == "style: 1.0 shapes@1 style less 0.5 over 0.1 + right: -0.5 shapes@1 faithful"


# ------------------------------------------------------------------------------------------------------ control

groups_of = st.lists(st.sampled_from(["a", "b", 3]), max_size=20)


@given(groups_of, st.integers(0, 5))
def test_shuffling_deals_the_rewards_of_each_prompt_anew(groups: list[int | str], round_: int) -> None:
    values = [float(index) for index in range(len(groups))]
    dealt = shuffled(values, groups, (0, "reward", round_))
    assert dealt == shuffled(values, groups, (0, "reward", round_))
    for group in set(groups):
        mine = [index for index, other in enumerate(groups) if other == group]
        assert Counter(dealt[index] for index in mine) == Counter(values[index] for index in mine)


def test_a_prompts_deal_does_not_depend_on_the_other_prompts() -> None:
    alone = shuffled([1.0, 2.0, 3.0, 4.0], ["a"] * 4, (7, 0))
    among = shuffled([1.0, 9.0, 2.0, 3.0, 8.0, 4.0], ["a", "b", "a", "a", "b", "a"], (7, 0))
    assert [value for value in among if value < 5] == alone


def test_every_deal_is_as_likely() -> None:
    seen = Counter(tuple(permutation(["a"] * 3, (0, draw))) for draw in range(1200))
    assert len(seen) == 6
    assert all(140 < count < 260 for count in seen.values())  # 200 expected; 60 is 4.6 deviations
    assert permutation(["a"] * 8, (0, 1)) != permutation(["b"] * 8, (0, 1))
