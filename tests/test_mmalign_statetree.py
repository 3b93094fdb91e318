"""State trees survive JSON and safetensors bit for bit, whatever is in them."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmalign import statetree


def through_files(tree: Any, folder: Path) -> Any:
    values, tensors = statetree.encode(tree)
    safetensors.torch.save_file(tensors, folder / "tensors.safetensors")
    text = json.dumps(values, allow_nan=False)
    return statetree.decode(json.loads(text), safetensors.torch.load_file(folder / "tensors.safetensors"))


def same(a: Any, b: Any) -> bool:
    """Equal in type, value and bits: 0.0 is not -0.0, 1 is not True, nan is nan, the order of keys counts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool,
    torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 2), (2, 0, 3)], ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    count = math.prod(shape)
    values = torch.arange(count * dtype.itemsize, dtype=torch.uint8) % 2 if dtype == torch.bool else None
    if values is None:
        values = torch.randint(0, 255, (count * dtype.itemsize,), dtype=torch.uint8)
    tensor = values.view(dtype).reshape(shape)
    assert same(through_files({"x": tensor}, tmp_path), {"x": tensor})


def test_plain_values_that_json_alone_would_change(tmp_path: Path) -> None:
    tree = {
        "floats": [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 0.1, 1.0],
        "integers": [0, 1, True, False, 2**63, -(2**64), 10**5000, 2**63 - 1, -(2**63)],
        "tuple": ((1,), (), [()]),
        "keys": {0: "a", "0": "b", 1.5: "c", True: "d", None: "e", (1, "x"): "f", -1: {}},
        "tagged": {"$": "tensor", "name": "keys"},
        "text": ["", "é\n\u2028\0", "\ud800", '{"$": "int"}'],
        "bytes": b"\x00\xff",
        "none": None,
        "empty": {},
    }
    assert same(through_files(tree, tmp_path), tree)
    assert same(through_files(3, tmp_path), 3)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(
        [
            torch.tensor(2.0),
            torch.zeros(0),
            torch.arange(6).reshape(2, 3),
            torch.ones(2, dtype=torch.bfloat16),
        ]
    )
    | st.sampled_from([np.arange(3, dtype=np.uint32), np.full((1, 1), 1.5, dtype="float32"), np.zeros((0, 2))])
)
scalars = st.text("$a/", max_size=3) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
trees = st.recursive(
    leaves,
    lambda below: (
        st.lists(below, max_size=3)
        | st.lists(below, max_size=3).map(tuple)
        | st.dictionaries(scalars | st.tuples(scalars, scalars), below, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_any_tree(tree: Any, tmp_path: Path) -> None:
    assert same(through_files(tree, tmp_path), tree)


def test_tensors_that_are_views_shared_or_need_a_gradient(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    twice = torch.randn(2)
    tree: dict[str, Any] = {
        "transposed": base.T,
        "row": base[1],
        "overlap": base[:2],
        "whole": base,
        "expanded": torch.ones(1, 1).expand(4, 4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "a": twice,
        "b": [twice],
        "wide": (wide := torch.zeros(2, dtype=torch.complex128)),
        "wide again": wide,
        "x": {"y": torch.tensor(1)},
        "x/y": torch.tensor(2),  # the same name
    }
    back = through_files(tree, tmp_path)
    assert back.keys() == tree.keys()
    for key in ("transposed", "row", "overlap", "whole", "expanded", "a", "wide", "wide again", "x/y"):
        assert same(back[key], tree[key]), key
    assert torch.equal(back["conjugate"], tree["conjugate"])
    assert same(back["parameter"], torch.ones(2))  # a plain tensor, without gradient
    assert back["a"] is back["b"][0]
    assert (back["x"]["y"].item(), back["x/y"].item()) == (1, 2)
    back["row"].zero_()
    assert same(back["whole"], base)


def test_a_large_base_is_not_stored_for_a_small_view(tmp_path: Path) -> None:
    through_files({"x": torch.zeros(1_000_000)[:3]}, tmp_path)
    assert (tmp_path / "tensors.safetensors").stat().st_size < 1000


def test_mappings_come_back_as_dicts_and_numpy_floats_as_floats(tmp_path: Path) -> None:
    assert same(through_files(OrderedDict(b=1, a=np.float64(0.1)), tmp_path), {"b": 1, "a": 0.1})


class Opaque:
    pass


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Opaque(), "Opaque"),
        ({1, 2}, "set"),
        (np.int64(1), "int64"),
        (np.array([None]), "numpy array of object"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.float32, "dtype"),
    ],
)
def test_anything_else_is_refused_with_its_place(value: object, said: str) -> None:
    with pytest.raises(TypeError, match=rf"optimizer/0: .*{said}"):
        statetree.encode({"optimizer": [value]})


@pytest.mark.parametrize(
    "node",
    [
        {"$": "tensor", "name": "not there"},
        {"$": "tensor", "name": "x", "dtype": "load", "shape": [1]},
        {"$": "tensor", "name": "x", "dtype": "float64", "shape": [7]},
        {"$": "numpy", "name": "x", "dtype": "O", "shape": [1]},
        {"$": "tuple"},
        {"$": "dict", "items": [1]},
        {"$": "dict", "items": [[[1], 2]]},
        {"$": "int", "hex": 3},
        {"$": "object"},
        {"$": []},
    ],
    ids=str,
)
def test_what_encode_did_not_write_is_a_value_error(node: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"node|dtype|memory|object|buffer"):
        statetree.decode({"a": [node]}, {"x": torch.zeros(8, dtype=torch.uint8)})
