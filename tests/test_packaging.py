"""The distribution: what it is made of, that nothing hides it, and that nothing of one machine is in it."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.request
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from jaxtyping import TypeCheckError

import mmalign
from mmalign import doctor

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IN_GIT = shutil.which("git") is not None and (ROOT / ".git").exists()


def modules() -> list[str]:
    """Every module of the four packages, by its import name."""
    found = []
    for package in doctor.PACKAGES:
        found.append(package)
        walk = pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
        found += [module.name for module in walk if not module.name.endswith("__main__")]
    return found


def files() -> list[Path]:
    """The text files of the checkout: those git tracks, or all that are not built when there is no git."""
    if IN_GIT:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [ROOT / name for name in names if name]
    else:
        skipped = {".venv", "dist", "runs", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
        paths = [path for path in ROOT.rglob("*") if not skipped & set(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


# ---------------------------------------------------------------------------------------------- metadata


def test_the_distribution_cannot_be_uploaded_by_accident() -> None:
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]


def test_the_version_is_said_once_and_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert version == mmalign.__version__
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_packages_are_listed_for_every_tool() -> None:
    tools = PROJECT["tool"]
    expected = set(doctor.PACKAGES)
    assert set(tools["hatch"]["build"]["targets"]["wheel"]["packages"]) == expected
    assert set(tools["mypy"]["packages"]) == expected
    assert set(tools["importlinter"]["root_packages"]) == expected
    assert all((ROOT / package / "py.typed").is_file() for package in expected)


def test_constraints_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert pins == sorted(set(pins))


def test_every_direct_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines}
    project = PROJECT["project"]
    wanted = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {re.split(r"[<>=\[; ]", requirement)[0].lower() for requirement in wanted}
    assert names <= pinned


# ------------------------------------------------------------------------------------------------- names


def test_no_other_distribution_stands_where_ours_should() -> None:
    """`diffusion`, `vlm` and `evaluators` are other projects' names too: whose files would we import?"""
    assert doctor.shadows() == {}


def test_a_shadow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    claims = {"diffusion": ["mmalign", "diffusion-sdk"], "vlm": ["mmalign"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: claims)
    assert doctor.shadows() == {"diffusion": "another distribution provides 'diffusion': diffusion-sdk"}


def test_a_folder_first_on_the_path_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "diffusion" / "__init__.py"
    other.parent.mkdir()
    other.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "diffusion", raising=False)  # find_spec asks a loaded module first
    expected = f"'diffusion' is taken from '{other}', which stands before ours on the path"
    assert doctor.shadows() == {"diffusion": expected}


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, "say what the module is for"
    assert Path(str(module.__file__)).is_relative_to(ROOT)


def test_no_module_is_named_like_a_library() -> None:
    """`accelerate launch diffusion/train.py` puts `diffusion/` first on the path: a `datasets.py` would win.

    Nothing in `mmalign/` is launched by its path, so `mmalign/statistics.py` hides nothing.
    """
    libraries = "accelerate datasets diffusers evaluate peft tokenizers torch transformers"
    taken = {*sys.stdlib_module_names, *libraries.split()}
    leaves = {name for name in modules() if name.count(".") == 1 and not name.startswith("mmalign.")}
    assert not {name for name in leaves if name.partition(".")[2] in taken}


# ---------------------------------------------------------------------------------- nothing of one machine


def test_no_path_of_one_machine_and_no_registry_is_in_a_file() -> None:
    home = r"(?<![\w.~$}/])/(?:home|Users|root|work|mnt)/\w+"
    registry = r"--(?:extra-)?index-url|--find-links|\btrusted-host\b|https?://(?:localhost|10\.|192\.168\.)"
    pattern = re.compile(f"{home}|{registry}")
    allowed = Path(__file__)  # this file says what is looked for
    hits = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files()
        if path != allowed
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not hits


def test_no_code_is_loaded_from_data() -> None:
    """No pickle and no remote code, anywhere outside the tests that feed us some; torch's restricted reader may."""
    loads = r"\b(?:pickle\.loads?|torch\.load(?!\(.*weights_only=True)|yaml\.load)\("
    calls = rf"{loads}|(?:trust_remote_code|allow_pickle)\s*=\s*True"
    sources = [path for path in files() if path.suffix == ".py" and ROOT / "tests" not in path.parents]
    assert len(sources) >= len(doctor.PACKAGES)
    assert not [path for path in sources if re.search(calls, path.read_text(encoding="utf-8"))]


# ------------------------------------------------------------------------------------------ launch presets


PRESETS = {
    "one_gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def _preset(name: str) -> Path:
    return ROOT / "configs" / "accelerate" / f"{name}.yaml"


def test_every_preset_is_tested() -> None:
    assert {path.stem for path in (ROOT / "configs" / "accelerate").iterdir()} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_accelerate_accepts_the_preset(name: str) -> None:
    """Its loader refuses unknown keys; its launcher checks that the values go together."""
    assert load_config_from_file(str(_preset(name))).distributed_type == PRESETS[name]
    words = ["--config_file", str(_preset(name)), "-m", "diffusion.train", "recipe.yaml"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.use_fsdp is (name == "fsdp2")
    assert arguments.use_deepspeed is name.startswith("zero")
    assert arguments.mixed_precision == "no", "precision is the recipe's"


@pytest.mark.parametrize("name", PRESETS)
def test_the_preset_says_when_to_use_it_how_and_what_is_untested(name: str) -> None:
    header = "".join(line for line in _preset(name).read_text().splitlines(True) if line.startswith("#"))
    assert f"--accelerate {name}\n" in header
    assert f"accelerate launch --config_file configs/accelerate/{name}.yaml " in header
    assert "not yet run" in header


def test_fsdp2_builds_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config_file", str(_preset("fsdp2")), "-m", "diffusion.train", "recipe.yaml"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    for key, value in prepare_multi_gpu_env(arguments).items():
        if "FSDP" in key:
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.min_num_params == 10_000_000
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero_builds_its_plugin(name: str) -> None:
    config = load_config_from_file(str(_preset(name))).deepspeed_config
    wanted = {key: value for key, value in config.items() if key != "deepspeed_multinode_launcher"}
    plugin = DeepSpeedPlugin(**wanted)
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == int(name[-1])
    assert plugin.zero3_init_flag is False


# ------------------------------------------------------------------------------------ what tests run under


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of ours as far as the import hook can tell."""
    lines = [
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "from jaxtyping import Float",
        "from numpy import ndarray",
        "def add(x: Float[ndarray, ' pairs'], y: Float[ndarray, ' pairs']) -> Float[ndarray, ' pairs']:",
        "    return x + y",
        "def count(x: int) -> str:",
        "    return 'x' * x",
        "@dataclass(frozen=True, slots=True, kw_only=True)",
        "class Batch:",
        "    chosen: Float[ndarray, ' pairs']",
        "    rejected: Float[ndarray, ' pairs']",
    ]
    (tmp_path / "hook_probe.py").write_text("\n".join(lines))
    monkeypatch.setattr(mmalign, "__path__", [*mmalign.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mmalign.hook_probe", raising=False)
    return importlib.import_module("mmalign.hook_probe")


def test_a_wrong_shape_fails_in_tests(probe: ModuleType) -> None:
    assert probe.add(np.ones(3), np.ones(3)).tolist() == [2, 2, 2]
    with pytest.raises(TypeCheckError):
        probe.add(np.ones(3), np.ones(1))  # numpy alone would broadcast this
    with pytest.raises(TypeCheckError):
        probe.add(np.ones((3, 3)), np.ones((3, 3)))


def test_a_wrong_type_fails_in_tests(probe: ModuleType) -> None:
    assert probe.count(2) == "xx"
    with pytest.raises(TypeCheckError):
        probe.count(True and "2")


def test_a_batch_checks_its_shapes_in_tests(probe: ModuleType) -> None:
    assert probe.Batch(chosen=np.ones(2), rejected=np.ones(2)).chosen.shape == (2,)
    with pytest.raises(TypeCheckError):
        probe.Batch(chosen=np.ones(2), rejected=np.ones(3))


def test_tests_reach_no_other_machine() -> None:
    with pytest.raises(AssertionError, match="loopback only"):
        urllib.request.urlopen("http://example.org", timeout=1)
    with socket.socket() as outside, pytest.raises(AssertionError, match="loopback only"):
        outside.connect(("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass  # loopback is open: tests of several processes need it


# ---------------------------------------------------------------------------------------------- the wheel


@pytest.mark.slow
def test_the_wheel_holds_packages_and_configs_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), "."]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("mmalign-*.whl")
    information = f"mmalign-{mmalign.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{information}/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {*doctor.PACKAGES, information}
    paths = [path for package in doctor.PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in paths} <= names
    assert {f"mmalign/configs/accelerate/{name}.yaml" for name in PRESETS} <= names
    assert not {name for name in names if "__pycache__" in name or "/tests/" in name}
    assert "Private :: Do Not Upload" in metadata
