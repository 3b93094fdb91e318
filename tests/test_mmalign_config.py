"""Configs: what is accepted, what is refused, and that every refusal names place, key and nearest key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from mmalign import recipes, yamltext
from mmalign.config import (
    LoopSettings,
    NamedSection,
    OptimSettings,
    Settings,
    digest,
    dump,
    load,
    parse_section,
)
from mmalign.errors import UserError
from mmalign.explain import suggest

RECIPE = """\
method: {name: dpo, beta: 5000}
optim:
  lr: 1e-4
loop:
  steps: 10
  output_dir: runs/x
"""


class TrainConfig(Settings):
    method: NamedSection
    optim: OptimSettings
    loop: LoopSettings


class DpoSettings(Settings):
    beta: float = Field(gt=0)
    label_smoothing: float = 0.0


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "dpo.yaml"
    path.write_text(RECIPE)
    return path


def message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(TrainConfig, recipe, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_number_like_1e_minus_4_is_a_number_in_the_file_and_in_an_override(recipe: Path) -> None:
    assert yaml.safe_load("lr: 1e-4") == {"lr": "1e-4"}  # the trap: YAML 1.1 reads text
    assert load(TrainConfig, recipe).optim.lr == 1e-4
    for text, value in [
        ("5e-5", 5e-5),
        ("1E3", 1000.0),
        ("2", 2.0),
        ("1.5e-3", 1.5e-3),
        (".5", 0.5),
        ("1_000", 1000.0),
    ]:
        assert load(TrainConfig, recipe, [f"optim.lr={text}"]).optim.lr == value


def test_overrides_win_in_order_and_may_set_lists_and_whole_sections(recipe: Path) -> None:
    loaded = load(
        TrainConfig,
        str(recipe),
        [
            "loop.seed=3",
            "loop.seed=0",
            "loop.trackers=[jsonl]",
            "method={name: sft}",
            "optim.max_grad_norm=null",
        ],
    )
    assert loaded.loop.seed == 0
    assert loaded.loop.trackers == ("jsonl",)
    assert (loaded.method.name, loaded.method.options()) == ("sft", {})
    assert loaded.optim.max_grad_norm is None
    assert loaded.loop.output_dir == Path("runs/x")


def test_settings_are_frozen(recipe: Path) -> None:
    loaded = load(TrainConfig, recipe)
    with pytest.raises(ValidationError, match="frozen"):
        loaded.optim.lr = 1.0


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("lr=1e-3", ["unknown key 'lr'", "override 'lr=1e-3'", "Did you mean 'optim.lr'?"]),
        ("optim.shedule=cosine", ["unknown key 'optim.shedule'", "Did you mean 'optim.schedule'?"]),
        ("optim.batch_size=3", ["unknown key 'optim.batch_size'", "Did you mean 'loop.batch_size'?"]),
        ("learning_rate=3", ["unknown key 'learning_rate'", "Did you mean 'optim.lr'?"]),
        ("gradient_accumulation_steps=3", ["Did you mean 'loop.accumulation'?"]),
        ("zzz=1", ["unknown key 'zzz'", "Known: loop, method, optim."]),
        ("optim.lr=abc", ["optim.lr: expected a number, got 'abc' (text)"]),
        ('optim.lr="1e-4"', ["optim.lr: expected a number, got '1e-4' (text)"]),
        ("optim.lr=true", ["optim.lr: expected a number, got true"]),
        ("optim.lr=.nan", ["optim.lr: expected a finite number"]),
        ("optim.lr=.inf", ["optim.lr: expected a finite number"]),
        ("optim.lr=0", ["optim.lr: should be greater than 0, got 0"]),
        ("optim.lr=", ["optim.lr: expected a number, got nothing (null)"]),
        ("loop.steps=1.5", ["loop.steps: expected a whole number, got 1.5"]),
        ('loop.steps="3"', ["loop.steps: expected a whole number, got '3' (text)"]),
        ("loop.steps=true", ["loop.steps: expected a whole number, got true"]),
        ("loop.compile=1", ["loop.compile: expected true or false, got 1"]),
        ("loop.output_dir=3", ["loop.output_dir: expected", "got 3"]),
        (
            "optim.schedule=cosin",
            ["expected 'constant', 'constant_with_warmup', 'linear' or 'cosine', got 'cosin'"],
        ),
        ("loop.trackers=[jsonl,wandbb]", ["loop.trackers[1]: expected", "Did you mean 'wandb'?"]),
        ("optim.betas=[0.9]", ["optim.betas: expected 2 values"]),
        ("optim.betas=[0.9,0.99,0.999]", ["optim.betas: expected 2 values"]),
        ("optim.betas=[0.9,2]", ["optim.betas[1]: should be less than 1, got 2"]),
        ("optim=3", ["optim: expected a section, got 3"]),
        ("optim.lr.x=1", ["'optim.lr' is a value, not a section", "Set optim.lr=... itself."]),
        ("loop={steps: 3}", ["missing key 'loop.output_dir'", "override 'loop={steps: 3}'"]),
        ("method={beta: 1}", ["missing key 'method.name'"]),
        ("loop.steps", ["not of the form key=value", "override 'loop.steps'"]),
        ("=3", ["not of the form key=value"]),
        ("loop..steps=3", ["not of the form key=value"]),
        ("optim.lr=[1", ["not valid YAML"]),
        ("optim.lr=*a", ["not valid YAML", "undefined alias"]),
        ("optim.lr=!!python/object/apply:os.getcwd []", ["YAML tag", "is not supported"]),
    ],
)
def test_a_wrong_override_is_one_line_with_place_key_and_hint(recipe: Path, override: str, parts: list[str]) -> None:
    said = message(recipe, override)
    for part in [*parts, f"override '{override}'"]:
        assert part in said


def test_several_mistakes_are_named_together_unknown_keys_first(recipe: Path) -> None:
    said = message(recipe, "optim.eps=a", "loop.bath_size=1")
    assert said.startswith("unknown key 'loop.bath_size'; also wrong: optim.eps (override 'loop.bath_size=1').")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            RECIPE.replace("lr: 1e-4", "lrr: 1e-4"),
            ["unknown key 'optim.lrr'; also wrong: optim.lr", "dpo.yaml:3"],
        ),
        (RECIPE.replace("  steps: 10\n", ""), ["missing key 'loop.steps'", "dpo.yaml:4"]),
        (RECIPE.replace("lr: 1e-4", "lr: [1]"), ["optim.lr: expected a number, got a list", "dpo.yaml:3"]),
        (
            "optim:\n  lr: 1\n  lr: 2\n",
            ["key 'optim.lr' is given twice, first at", "dpo.yaml:2", "(", "dpo.yaml:3"],
        ),
        ("a: &x [1]\nb: *x\n", ["anchors and aliases are not supported"]),
        ("a: &a [*a]\n", ["anchors and aliases are not supported"]),
        ("- 1\n", ["expected sections, got a list"]),
        ("", ["missing key 'method'"]),
        ("a:\n\tb: 1\n", ["not valid YAML", "dpo.yaml:2"]),
        ("1: 2\n", ["key 1 is not text", "Put the key in quotes."]),
        ("a: " + "[" * 5000, ["nested too deeply"]),
        ("a: !!set {x}\n", ["YAML tag", "not supported"]),
        ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
        ("a: \x00\n", ["not valid YAML"]),
        ("#" * 1_000_001, ["too large for a config"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_wrong_file_is_one_line_with_file_and_line(recipe: Path, text: str, parts: list[str]) -> None:
    recipe.write_text(text)
    said = message(recipe)
    for part in parts:
        assert part in said


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\x80\x02\xff")
    with pytest.raises(UserError, match=r"not a text file \(.*weights\.yaml\)"):
        load(TrainConfig, binary)
    with pytest.raises(UserError, match="is a folder, not a recipe"):
        load(TrainConfig, tmp_path)


def test_yaml_keeps_times_ratios_dates_and_leading_zeros_as_text() -> None:
    value, _ = yamltext.parse("{a: 16:9, b: 010, c: 2024-01-01, d: 1e, e: -3, f: 0x1F, g: 1.}", "here")
    assert value == {"a": "16:9", "b": "010", "c": "2024-01-01", "d": "1e", "e": -3, "f": 31, "g": 1.0}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["optim.warmup_steps=5"], "schedule 'constant' has no warm-up"),
        (["optim.schedule=constant_with_warmup"], "needs warmup_steps or warmup_fraction above 0"),
        (
            ["optim.schedule=cosine", "optim.warmup_steps=5", "optim.warmup_fraction=0.1"],
            "warmup_steps and warmup_fraction are both set",
        ),
        (["loop.resume=a", "loop.init_from=b"], "resume and init_from both name a checkpoint"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(recipe: Path, overrides: list[str], part: str) -> None:
    assert part in message(recipe, *overrides)


def test_warmup_is_a_number_of_updates(recipe: Path) -> None:
    def warmup(*overrides: str) -> int:
        return load(TrainConfig, recipe, ["optim.schedule=linear", *overrides]).optim.warmup(200)

    assert (warmup(), warmup("optim.warmup_steps=7"), warmup("optim.warmup_fraction=0.1")) == (0, 7, 20)


def test_a_section_is_checked_against_the_class_its_name_stands_for(recipe: Path) -> None:
    section = load(TrainConfig, recipe, ["method.beta=2e3"]).method
    assert section.name == "dpo"
    assert parse_section(DpoSettings, section, "method") == DpoSettings(beta=2000.0)
    assert parse_section(DpoSettings, {"name": "dpo", "beta": 1}, "method").beta == 1.0
    with pytest.raises(UserError, match=r"unknown key 'method\.bta'.*Did you mean 'method\.beta'\?"):
        parse_section(DpoSettings, {"name": "dpo", "bta": 1}, "method")
    with pytest.raises(UserError, match=r"missing key 'method\.beta'"):
        parse_section(DpoSettings, {}, "method")


def test_dump_reads_back_to_the_same_settings_and_digest(recipe: Path, tmp_path: Path) -> None:
    first = load(TrainConfig, recipe, ["optim.lr=3e-5", "loop.resume='1e-4'", "method.note=16:9", "method.on='yes'"])
    (tmp_path / "effective.yaml").write_text(dump(first))
    second = load(TrainConfig, tmp_path / "effective.yaml")
    assert second == first
    assert second.loop.resume == "1e-4"
    assert digest(second) == digest(first)
    assert digest(load(TrainConfig, recipe, ["optim.lr=3.00001e-5"])) != digest(first)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
        lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("abe1.-:", min_size=1), below, max_size=3),
        max_leaves=8,
    )
)
@example("\x85")
@example("a \u2028\u2029 b\n")
def test_any_value_survives_being_written_and_read(value: object) -> None:
    assert yamltext.parse(yamltext.write({"value": value}), "here")[0] == {"value": value}


def test_a_recipe_is_found_by_path_or_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "mmalign"
    (installed / "configs" / "diffusion").mkdir(parents=True)
    (installed / "configs" / "diffusion" / "dpo_shapes.yaml").write_text(RECIPE)
    monkeypatch.setattr(recipes, "__file__", str(installed / "recipes.py"))
    monkeypatch.chdir(tmp_path)  # in a checkout, configs/... is a path as well
    for name in ("diffusion/dpo_shapes", "diffusion/dpo_shapes.yaml", "configs/diffusion/dpo_shapes.yaml"):
        assert recipes.find(name) == installed / "configs" / "diffusion" / "dpo_shapes.yaml"
    for name in ("dpo_shapes", "diffusion/dpo_shape", "vlm/dpo_shapes"):
        with pytest.raises(UserError, match=r"no recipe '.*'\. Did you mean 'diffusion/dpo_shapes'\?"):
            recipes.find(name)
    with pytest.raises(UserError, match="no recipe"):
        recipes.find("../config")


def test_a_checkout_finds_the_recipes_beside_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "vlm").mkdir(parents=True)
    (tmp_path / "configs" / "vlm" / "povid.yaml").write_text(RECIPE)
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "mmalign" / "recipes.py"))
    assert recipes.shipped() == {}  # some other project's folder, unless our pyproject.toml stands there
    (tmp_path / "pyproject.toml").touch()
    assert recipes.shipped() == {"vlm/povid": tmp_path / "configs" / "vlm" / "povid.yaml"}


def test_suggestions_prefer_the_same_section() -> None:
    valid = ["a", "a.rate", "b", "b.rate", "b.size"]
    assert suggest("b.rat", valid) == "Did you mean 'b.rate'?"
    assert suggest("rate", valid) == "Did you mean 'a.rate'?"
    assert suggest("a.size", valid) == "Did you mean 'b.size'?"


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys, mmalign.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
