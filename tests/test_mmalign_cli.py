"""The command line: it answers at once, and every way a command can end has its message and its exit code."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from mmalign import __version__, cli, launch
from mmalign.errors import UserError
from mmalign.evaluation import KINDS

ROOT = Path(__file__).parent.parent
MMALIGN = [sys.executable, "-m", "mmalign"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MMALIGN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


# ------------------------------------------------------------------------------------------------- the help


def test_help_imports_nothing_heavy() -> None:
    """What the help imports is the standard library and three small modules of ours."""
    code = "import sys; from mmalign.cli import main; main(['--help']); print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split("\n"))
    ours = {name for name in loaded if name.startswith("mmalign")}
    assert ours == {"mmalign", "mmalign.cli", "mmalign.errors"}
    heavy = "torch numpy yaml pydantic pyarrow PIL accelerate datasets diffusers transformers diffusion vlm"
    assert not loaded & set(heavy.split())


def test_help_answers_in_less_than_0_3_seconds() -> None:
    """The best of five, because other work on the machine only ever adds."""

    def seconds() -> float:
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_help_names_every_verb() -> None:
    done = run("--help")
    for verb, (_, text) in cli.VERBS.items():
        assert f"  {verb} " in done.stdout
        assert text in done.stdout
    assert run().stdout == run("-h").stdout == done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_version() -> None:
    assert run("--version").stdout == f"mmalign {__version__}\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_help_page(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.resolve(cli.VERBS[verb].target)(["--help"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mmalign {verb}")


HEAVY = {"torch", "numpy", "pydantic", "yaml", "transformers", "diffusers", "PIL", "pyarrow", "gradio", "scipy"}


@pytest.mark.parametrize("words", [*([verb] for verb in cli.VERBS), *(["eval", kind] for kind in KINDS)], ids=" ".join)
def test_a_help_page_needs_nothing_that_takes_time(words: list[str]) -> None:
    """Under 0.3 s on an idle machine; what is imported is what takes it, and does not depend on the machine."""
    code = f"import sys; from mmalign.cli import main; sys.exit(main({[*words, '--help']!r}))"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: mmalign {words[0]}")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "mmalign" in imported and not imported & HEAVY


# ------------------------------------------------------------------------------------------ how it ends


def test_an_unknown_verb_names_the_nearest() -> None:
    done = run("dmeo")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "mmalign: error: unknown verb 'dmeo'. Did you mean 'demo'?\n"


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> NoReturn:
        raise UserError("no such\ncolumn", place=argv[0], fix="Add it.")

    assert cli.run_entry(main, ["data.parquet"]) == 2
    assert capsys.readouterr() == ("", "mmalign: error: no such column (data.parquet). Add it.\n")


def test_under_a_launcher_the_line_names_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> NoReturn:
        raise UserError("bad")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.run_entry(main, []) == 2
    monkeypatch.setenv("RANK", "0")
    assert cli.run_entry(main, []) == 2
    assert capsys.readouterr().err == "mmalign: error (rank 1): bad\nmmalign: error: bad\n"


def test_an_interrupt_is_one_line_and_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> NoReturn:
        raise KeyboardInterrupt

    assert cli.run_entry(main, []) == 130
    assert capsys.readouterr().err == "\nmmalign: interrupted\n"


def test_a_reader_that_leaves_early_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*MMALIGN, "--help"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert done.returncode == cli.BROKEN_PIPE
    assert done.stderr == b""


def test_a_bug_keeps_its_traceback() -> None:
    def main(argv: list[str]) -> int:
        return 1 // len(argv)

    with pytest.raises(ZeroDivisionError):
        cli.run_entry(main, [])


def test_exit_codes_of_the_entry_function_are_kept() -> None:
    assert cli.run_entry(lambda argv: None, []) == 0
    assert cli.run_entry(lambda argv: len(argv), ["a", "b", "c"]) == 3


def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == (
        "mmalign: error: mmalign train: the following arguments are required: RECIPE. See 'mmalign train --help'.\n"
    )


def test_a_wrong_choice_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "chek"]) == 2
    assert capsys.readouterr().err == "mmalign: error: mmalign data: unknown 'chek'. Did you mean 'check'?\n"


# --------------------------------------------------------------------------------- what may be missing


def test_a_missing_dependency_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import mmalign

    (tmp_path / "needs_gradio.py").write_text("import gradio\n")
    monkeypatch.setattr(mmalign, "__path__", [*mmalign.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "gradio", None)  # whether it is installed here or not
    with pytest.raises(UserError, match=r"'gradio' is not installed.*pip install -e '\.\[arena\]'"):
        cli.resolve("mmalign.needs_gradio:main")


def test_a_missing_module_of_ours_is_said_plainly() -> None:
    with pytest.raises(UserError, match=r"no module 'diffusion\.nowhere'"):
        cli.resolve("diffusion.nowhere:main")


def test_a_missing_module_behind_a_shadow_says_who_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.doctor.shadows", lambda: {"diffusion": "the SDK provides it"})
    with pytest.raises(UserError, match="'diffusion' is not ours here: the SDK provides it"):
        cli.resolve("diffusion.nowhere:main")


# ---------------------------------------------------------------------------------------------- train


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("package: diffusion\nmethod: dpo\n")
    return path


@pytest.mark.parametrize("preset", ["one_gpu", "ddp", "fsdp2", "zero2", "zero3"])
def test_a_preset_becomes_the_launchers_command(preset: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(recipe), "loop.steps=3", "--accelerate", preset, "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:2] == [sys.executable, "-m"]
    assert words[2:5] == ["accelerate.commands.launch", "--quiet", "--config_file"]
    assert Path(words[5]) == ROOT / "configs" / "accelerate" / f"{preset}.yaml"
    assert words[6:] == ["-m", "diffusion.train", str(recipe), "loop.steps=3"]


def test_without_a_preset_the_trainer_runs_in_this_process(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def resolve(target: str) -> cli.Main:
        calls.append(target)
        return lambda argv: calls.append(argv)

    monkeypatch.setattr(launch, "resolve", resolve)
    assert cli.main(["train", str(recipe), "a.b=1"]) == 0
    assert calls == ["diffusion.train:main", [str(recipe), "a.b=1"]]


def test_the_folder_says_which_trainer_when_the_recipe_does_not(tmp_path: Path) -> None:
    path = tmp_path / "vlm" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("method: rdpo\n")
    assert launch.package_of(path) == "vlm"
    path.write_text("package: diffusion\n")
    assert launch.package_of(path) == "diffusion"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"package: difusion\n", "unknown package 'difusion' ({path}:1). Did you mean 'diffusion'?"),
        (b"a: 1\nb: [\n", "not valid YAML: expected the node content, but found '<stream end>' ({path}:3)"),
        (b"- a\n- b\n", "a recipe is a mapping of keys to values ({path})"),
        (
            b"method: dpo\n",
            "cannot tell what this recipe trains ({path}). Add the key 'package', one of diffusion, vlm, ev",
        ),
        (b"\xff\xfe\x00", "cannot read the recipe: 'utf-8' codec can't decode"),
    ],
)
def test_a_wrong_recipe_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        launch.package_of(path)
    assert str(error.value).startswith(message.format(path=path))


def test_an_unknown_preset_names_the_nearest(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(recipe), "--accelerate", "fdsp2"]) == 2
    expected = "mmalign: error: no launch preset 'fdsp2' (--accelerate). Did you mean 'fsdp2'?\n"
    assert capsys.readouterr().err == expected


def test_a_missing_recipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "diffusion/nothing_like_it.yaml"]) == 2
    assert capsys.readouterr().err.startswith("mmalign: error: no recipe 'diffusion/nothing_like_it.yaml'. ")


# --------------------------------------------------------------------------------------------- doctor


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines}
    assert rows["mmalign"] == "ours"  # the last of its two rows
    assert rows["torch"][0].isdigit()
    assert "cores" in rows["device"] or "GiB" in rows["device"]
