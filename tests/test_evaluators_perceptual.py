"""LPIPS on random weights in the published containers, against the formula written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_scorers import photo, pixels
from torch import Tensor
from torch.nn import functional

from evaluators.diversity import across
from evaluators.perceptual import CHANNELS, Lpips
from mmalign.errors import UserError

PICTURES = [photo(seed, 64, 48) for seed in range(3)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "lpips"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    kernels = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    for number, (out, into, side) in kernels.items():
        scale = (2 / (into * side * side)) ** 0.5
        state[f"{number}.weight"] = torch.randn(out, into, side, side, generator=generator) * scale
        state[f"{number}.bias"] = torch.randn(out, generator=generator) * 0.1
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for i, width in enumerate(CHANNELS)
    }
    # the published file has the classifier too, which is of no use here
    trunk = {f"features.{name}": value for name, value in state.items()} | {"classifier.1.bias": torch.zeros(3)}
    torch.save(trunk, folder / "alexnet-owt-7be5be79.pth")
    torch.save(heads, folder / "alex.pth")
    return folder.parent


@pytest.fixture(autouse=True)
def _weights(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(root))


@pytest.fixture(scope="module")
def lpips(root: Path) -> Lpips:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMALIGN_WEIGHTS", str(root))
        return Lpips(device="cpu")


def written_out(root: Path, x: Tensor, y: Tensor) -> float:
    """The formula, with convolutions by their names in the file."""
    state = torch.load(root / "lpips" / "alexnet-owt-7be5be79.pth", weights_only=True)
    heads = torch.load(root / "lpips" / "alex.pth", weights_only=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    sides, total = [(x - mean) / std, (y - mean) / std], 0.0
    for layer, (number, stride, pad) in enumerate([(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]):
        if layer in (1, 2):
            sides = [functional.max_pool2d(side, 3, 2) for side in sides]
        weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
        sides = [functional.conv2d(side, weight, bias, stride=stride, padding=pad).relu() for side in sides]
        a, b = (side / (side.square().sum(1, keepdim=True).sqrt() + 1e-10) for side in sides)
        total += float(functional.conv2d((a - b).square(), heads[f"lin{layer}.model.1.weight"]).mean())
    return total


def test_lpips_is_the_formula(root: Path, lpips: Lpips) -> None:
    x, y = pixels(PICTURES[0]), pixels(PICTURES[1])
    expected = written_out(root, x, y)
    # the published shift and scale are ImageNet's, rounded to three digits
    assert float(lpips.between(x, y)) == pytest.approx(expected, rel=0.02)
    assert expected > 0.01
    assert float(lpips.between(x, x)) == 0


def test_distances_are_symmetric_and_of_each_pair_alone(lpips: Lpips) -> None:
    found = lpips.distances(PICTURES)
    assert found.dtype == torch.float64 and bool((found.diagonal() == 0).all()) and torch.equal(found, found.T)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        alone = float(lpips.between(pixels(PICTURES[i]), pixels(PICTURES[j])))
        assert float(found[i, j]) == pytest.approx(alone, rel=1e-5)
    assert across(found) == pytest.approx(float(found.sum()) / 6)
    assert lpips.distances(PICTURES[:1]).shape == (1, 1)


def test_it_reloads_bit_by_bit_and_differentiates(lpips: Lpips) -> None:
    again = Lpips(device="cpu")
    assert again.identity == lpips.identity and torch.equal(again.distances(PICTURES), lpips.distances(PICTURES))
    x = pixels(PICTURES[0]).requires_grad_()
    lpips.between(x, pixels(PICTURES[1])).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and float(x.grad.abs().sum()) > 0


def test_wrong_weights_and_pictures_are_a_line(
    root: Path, lpips: Lpips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = torch.load(root / "lpips" / "alex.pth", weights_only=True)
    torch.save({**heads, "lin2.model.1.weight": torch.rand(1, 7, 1, 1)}, tmp_path / "alex.pth")
    with pytest.raises(UserError, match=r"1 tensors of another shape, the first 'lin2\.model\.1\.weight'"):
        Lpips(heads=str(tmp_path))
    torch.save({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "alexnet-owt-7be5be79.pth")
    with pytest.raises(UserError, match="9 tensors missing"):
        Lpips(trunk=str(tmp_path))
    with pytest.raises(UserError, match="pictures of one size, here are 2"):
        lpips.distances([PICTURES[0], Image.new("RGB", (40, 40))])
    with pytest.raises(UserError, match="LPIPS needs pictures of 32 pixels or more, not 64 x 16"):
        lpips.distances([photo(0, 64, 16)] * 2)
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"of lpips are not here: alexnet\S+ of https://\S+, about 0\.244 GB"):
        Lpips()
