"""A tree of plain values and tensors, as JSON plus a safetensors file, and back, bit for bit; no pickle.

What an optimizer, a schedule, a generator or a method calls its state is such a tree: dicts (with any plain
keys), lists, tuples, None, booleans, whole numbers of any size, floats (-0.0, inf and nan too), text, bytes,
tensors and numpy arrays. JSON alone would turn integer keys into text, tuples into lists and nan into what no
other reader takes, so what it cannot say is written as an object with the key "$":

    {"lr": 1e-4, "betas": (0.9, 0.999)}  ->  {"lr": 0.0001, "betas": {"$": "tuple", "items": [0.9, 0.999]}}

Tensors are named by their place in the tree. One that occurs twice is stored once and is one tensor again
after reading; views of a common storage come back as tensors of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What safetensors stores under its own name; any other dtype travels as bytes.
_NATIVE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
_SMALL = 2**63  # JSON readers other than Python's are exact up to here at most


def encode(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Splits a tree into a JSON value and tensors, which are contiguous, on the CPU and share no memory.

    Raises:
        TypeError: something in the tree is of another kind; its place is named.
    """
    tensors: dict[str, Tensor] = {}
    named: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no id is used again
    storages: set[int] = set()

    def store(tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise TypeError(f"{path}: cannot store a {tensor.layout} tensor on {tensor.device}")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{path}: a sharded tensor; gather it on every rank before saving")
        tag: dict[str, Any] = {"$": "tensor"}
        if tensor.dtype not in _NATIVE:
            tag |= {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        if id(tensor) in named:
            return {**tag, "name": named[id(tensor)][0]}
        name = path or "tensor"
        while name in tensors or name == "__metadata__":  # a key may contain the separator
            name += "'"
        named[id(tensor)] = name, tensor
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if flat.dtype not in _NATIVE:
            flat = flat.reshape(-1).view(torch.uint8)
        storage = flat.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != flat.nbytes:
            flat = flat.clone()
        storages.add(flat.untyped_storage().data_ptr())
        tensors[name] = flat
        return {**tag, "name": name}

    def visit(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return value if -_SMALL <= value < _SMALL else {"$": "int", "hex": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$": "float", "value": str(float(value))}
        if isinstance(value, bytes):
            return {"$": "bytes", "hex": value.hex()}
        if isinstance(value, Tensor):
            return store(value, path)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biuf" or not value.dtype.isnative:
                raise TypeError(f"{path}: cannot store a numpy array of {value.dtype}")
            raw = torch.from_numpy(np.frombuffer(bytearray(value.tobytes()), dtype=np.uint8))
            return store(raw, path) | {"$": "numpy", "dtype": value.dtype.str, "shape": list(value.shape)}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value) and "$" not in value:
                return {key: visit(item, f"{path}/{key}" if path else key) for key, item in value.items()}
            pairs = [
                [visit(key, f"{path}/<key>"), visit(item, f"{path}/{key}" if path else str(key))]
                for key, item in value.items()
            ]
            return {"$": "dict", "items": pairs}
        if isinstance(value, (list, tuple)):
            items = [visit(item, f"{path}/{index}" if path else str(index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$": "tuple", "items": items}
        raise TypeError(f"{path or 'the state'}: cannot store a {type(value).__module__}.{type(value).__qualname__}")

    return visit(tree, ""), tensors


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` took apart.

    Raises:
        ValueError: the JSON value was not written by `encode`, or a tensor is missing or of the wrong size.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: decode(item, tensors) for key, item in value.items()}
    try:
        return _decode_tagged(value, tensors)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"malformed {value['$']!r} node: {error}") from error


def _decode_tagged(node: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    kind = node["$"]
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in node["items"])
    if kind == "dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in node["items"]}
    if kind == "int":
        return int(node["hex"], 16)
    if kind == "float":
        return float(node["value"])
    if kind == "bytes":
        return bytes.fromhex(node["hex"])
    if kind == "tensor":
        tensor = tensors[node["name"]]
        if "dtype" not in node:
            return tensor
        dtype = getattr(torch, node["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {node['dtype']!r}")
        return tensor.view(dtype).reshape(node["shape"])
    if kind == "numpy":
        raw = tensors[node["name"]].numpy().tobytes()
        return np.frombuffer(raw, dtype=np.dtype(node["dtype"])).reshape(node["shape"]).copy()
    raise ValueError(f"unknown node {kind!r}")
