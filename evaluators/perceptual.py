"""LPIPS: how different two pictures look, by a network's layers weighted as people judge.

    d(x, y) = sum over layers of mean over places of sum over channels of w_c (u(x)_c - u(y)_c)^2

u is a layer's output brought to length 1 across its channels, w >= 0 the published weights of that layer, the network
torchvision's AlexNet behind each of its five rectifiers. Pictures keep their size, which is the same for all.

    0 for equal pictures; 0.3 to 0.7 between different photographs

Source: Zhang et al. 1801.03924, version 0.1, "alex".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from evaluators.towers import choose_device
from evaluators.weights import Weights, find, fingerprint, load_strictly, read_tensors, refuse_unless_whole
from mmalign.errors import UserError

TRUNK = Weights(
    name="lpips",
    repo="pytorch/vision",
    file="alexnet-owt-7be5be79.pth",
    page="https://download.pytorch.org/models",
    gigabytes=0.244,
    licence="BSD-3-Clause (torchvision)",
)
HEADS = Weights(
    name="lpips",
    repo="richzhang/PerceptualSimilarity",
    file="alex.pth",
    page="https://github.com/richzhang/PerceptualSimilarity (lpips/weights/v0.1)",
    gigabytes=0.000006,
    licence="BSD-2-Clause",
)
RECTIFIERS = (1, 4, 7, 9, 11)  # of AlexNet's features: where a layer is read
CHANNELS = (64, 192, 384, 256, 256)
# ImageNet's normalisation for pixels in [-1, 1], in the digits that the weights were fitted with
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST = 32  # pixels: below, the last layers have no place left


class Lpips:
    """See the module's docstring.

    Args:
        trunk: AlexNet's weights: the file or its folder; None: from the folder of weights.
        heads: the layers' weights, likewise.

    Attributes:
        identity: `lpips-alex@0.1#fingerprint`.

    Raises:
        UserError: weights are missing, or another network's.
    """

    def __init__(self, trunk: str | None = None, heads: str | None = None, device: str | None = None) -> None:
        files = find(TRUNK, trunk), find(HEADS, heads)
        state = {name: value for name, value in read_tensors(files[0]).items() if not name.startswith("classifier.")}
        features = _alexnet()
        named = {name.removeprefix("features."): value for name, value in state.items()}
        load_strictly(features, named, place=str(files[0]))
        self._device = choose_device(device)
        self._features = features.eval().requires_grad_(False).to(self._device)
        self._weights = [weight.to(self._device) for weight in _heads(read_tensors(files[1]), place=str(files[1]))]
        self.identity = f"lpips-alex@0.1#{fingerprint(features, *self._weights)}"

    def between(
        self, x: Float[Tensor, "pairs 3 height width"], y: Float[Tensor, "pairs 3 height width"]
    ) -> Float[Tensor, " pairs"]:
        """Distance of each pair, RGB in [0, 1], differentiable.

        Raises:
            UserError: the pictures are too small.
        """
        if min(x.shape[-2:]) < SMALLEST:
            raise UserError(f"LPIPS needs pictures of {SMALLEST} pixels or more, not {x.shape[-1]} x {x.shape[-2]}")
        layers = zip(self._units(x), self._units(y), self._weights, strict=True)
        each = [((a - b).square() * weight[:, None, None]).sum(1).mean((1, 2)) for a, b, weight in layers]
        return torch.stack(each).sum(0)

    @torch.no_grad()
    def distances(self, images: Sequence[Image.Image]) -> Float[Tensor, "images images"]:
        """Distance of every two pictures, in float64 on the CPU, as `evaluators.diversity` takes them.

        Raises:
            UserError: pictures of different sizes.
        """
        sizes = {image.size for image in images}
        if len(sizes) > 1:
            raise UserError(f"LPIPS compares pictures of one size, here are {len(sizes)}", fix="Resize them first.")
        found = torch.zeros(len(images), len(images), dtype=torch.float64)
        pixels = [_pixels(image) for image in images]
        for row in range(len(images) - 1):
            others = torch.stack(pixels[row + 1 :])
            values = self.between(pixels[row].expand_as(others), others).double().cpu()
            found[row, row + 1 :] = found[row + 1 :, row] = values
        return found

    def _units(self, pixels: Float[Tensor, "pairs 3 height width"]) -> list[Tensor]:
        pixels = pixels.to(self._device)
        shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x, read = (2 * pixels - 1 - shift) / scale, []
        for index, layer in enumerate(self._features.children()):
            x = layer(x)
            if index in RECTIFIERS:
                read.append(functional.normalize(x, dim=1, eps=1e-10))
        return read


def _alexnet() -> nn.Sequential:
    """The convolutions of torchvision's AlexNet, in its order, so that they have its names."""
    layers: list[nn.Module] = []
    # kernel, stride and padding of each; what is pooled is pooled behind the rectifier
    kinds = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
    for number, (kernel, stride, padding) in enumerate(kinds):
        into = 3 if number == 0 else CHANNELS[number - 1]
        layers += [nn.Conv2d(into, CHANNELS[number], kernel, stride, padding), nn.ReLU()]
        if number < 2:
            layers.append(nn.MaxPool2d(3, 2))
    return nn.Sequential(*layers)


def _heads(state: dict[str, Tensor], *, place: str) -> list[Tensor]:
    expected = {f"lin{number}.model.1.weight": (1, width, 1, 1) for number, width in enumerate(CHANNELS)}
    shapes = {name for name, shape in expected.items() if name in state and tuple(state[name].shape) != shape}
    refuse_unless_whole(expected.keys() - state.keys(), state.keys() - expected.keys(), shapes, place=place)
    return [state[name].flatten().float() for name in expected]


def _pixels(image: Image.Image) -> Float[Tensor, "3 height width"]:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
