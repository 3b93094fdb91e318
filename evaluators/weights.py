"""Where a scorer's weights are looked for, how they are read, and what tells one set of weights from another.

Looked for in this order, and taken from the first place that has them:

    1. the path that the scorer's options give
    2. $MMALIGN_WEIGHTS/NAME, below the folder of weights
    3. the local hub cache
    4. the hub, if MMALIGN_DOWNLOAD=1 or the scorer's `download` option allows it and HF_HUB_OFFLINE does not forbid it

Every tensor that a model has must be in the file with its shape, and every tensor of the file must be one of the
model's: a part that stayed random gives numbers that look like scores.

Several scorers are published as `.pt` files only. Those are read by torch's restricted unpickler
(`weights_only=True`), which makes tensors and plain containers and calls nothing else; all else is safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmalign import hub
from mmalign.errors import UserError, reason

FOLDER, ALLOW = "MMALIGN_WEIGHTS", "MMALIGN_DOWNLOAD"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
DIGITS = 8  # of the hash, in an identity
# of a model's folder, all that is ever fetched: no code, no pickles
PATTERNS = ["*.json", "*.txt", "*.jinja", "*.safetensors", "*.model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Weights as they are published.

    Attributes:
        name: of their folder below the folder of weights.
        repo: owner/name on the hub, or where `page` is.
        file: the one file of it that is meant; None: the folder of a model.
        page: where they are published when that is not the hub: they are never downloaded from here.
        gigabytes: about, of the download; None where the user named the repo.
        licence: as its publisher says.
    """

    name: str
    repo: str
    file: str | None = None
    page: str | None = None
    gigabytes: float | None = None
    licence: str = "see its page"

    @property
    def described(self) -> str:
        """Name, source, size and licence in a few words."""
        source = self.page or self.repo
        what = f"{self.file} of {source}" if self.file else source
        size = ""
        if self.gigabytes is not None:
            many, unit = (self.gigabytes, "GB") if self.gigabytes >= 0.1 else (self.gigabytes * 1000, "MB")
            size = f", about {many:g} {unit}"
        return f"{what}{size}, licence {self.licence}"


def folder_of_weights() -> Path | None:
    """$MMALIGN_WEIGHTS, where it is set."""
    said = os.environ.get(FOLDER)
    return Path(said).expanduser() if said else None


def may_download(said: bool = False) -> bool:
    """Whether the hub may be asked."""
    allowed = said or os.environ.get(ALLOW, "").lower() in ("1", "true", "yes")
    return allowed and not hub.is_offline()


def places(weights: Weights) -> list[Path]:
    """Where in the folder of weights they may be: under their name, or as the hub calls them."""
    root = folder_of_weights()
    if root is None:
        return []
    folders = [root / weights.name, root / weights.repo.partition("/")[2], root / weights.repo]
    return folders if weights.file is None else [*(folder / weights.file for folder in folders), root / weights.file]


def local(weights: Weights) -> Path | None:
    """Where they are on this machine; None: nowhere that is looked at."""
    for place in places(weights):
        if _is_there(place, weights):
            return place
    return _in_cache(weights)


def find(weights: Weights, given: str | None = None, *, download: bool = False) -> Path:
    """The file or folder of weights.

    Args:
        given: a path, or the id of another hub model of the same kind; None: as published.
        download: the hub may be asked.

    Raises:
        UserError: nowhere to be found, told with name, source, size, licence and where was looked.
    """
    if given is not None:
        path = Path(given).expanduser()
        inside = path / weights.file if weights.file is not None and path.is_dir() else path
        if _is_there(inside, weights):
            return inside
        if path.exists() or not hub.HUB_ID.fullmatch(given):
            what = f"no {weights.file}" if weights.file else "no folder with a config.json"
            fix = f"Give a path{'' if weights.page else ' or a hub id'}; as published it is {weights.described}."
            raise UserError(f"{what} for {weights.name}", place=given, fix=fix)
        weights = replace(weights, name=given.replace("/", "--"), repo=given, gigabytes=None, licence="see its page")
    found = local(weights)
    if found is not None:
        return found
    if weights.page is not None or not may_download(download):
        looked = [str(place) for place in places(weights)] + (["the hub cache"] if weights.page is None else [])
        allow = f", or allow the download: {ALLOW}=1" if weights.page is None else ""
        raise UserError(
            f"the weights of {weights.name} are not here: {weights.described}",
            place=f"looked for {', '.join(looked)}" if looked else f"${FOLDER} is not set",
            fix=f"Give their path, or put them into ${FOLDER}/{weights.name}{allow}.",
        )
    return _download(weights)


def _is_there(place: Path, weights: Weights) -> bool:
    return place.is_file() if weights.file is not None else (place / "config.json").is_file()


def _in_cache(weights: Weights) -> Path | None:
    if weights.page is not None:
        return None
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(weights.repo, weights.file or "config.json")
    if not isinstance(found, str):
        return None
    if weights.file is not None:
        return Path(found)
    folder = Path(found).parent  # a config alone is what somebody looked at, not a model
    return folder if any(folder.glob("*.safetensors")) else None


def _download(weights: Weights) -> Path:
    import huggingface_hub

    try:
        if weights.file is not None:
            return Path(huggingface_hub.hf_hub_download(weights.repo, weights.file))
        return Path(huggingface_hub.snapshot_download(weights.repo, allow_patterns=PATTERNS))
    except (OSError, ValueError) as error:
        raise UserError(f"{weights.name} cannot be downloaded: {reason(error)}", place=weights.described) from error


# --------------------------------------------------------------------------------------------------- reading


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file, by name: .safetensors, or what torch.save made of a state dict.

    A dict under "state_dict" is taken out, and the prefix "module." that wrappers of several processes leave is too.

    Raises:
        UserError: the file is damaged, or holds something else than tensors.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix not in PICKLED:
            raise UserError("not a file of weights", place=str(path), fix=f"Known: .safetensors, {', '.join(PICKLED)}.")
        state = torch.load(path, map_location="cpu", weights_only=True)  # makes tensors and containers, runs nothing
    except pickle.UnpicklingError as error:
        cause = "the file holds more than tensors, which could run code and is not read"
        raise UserError(cause, place=str(path)) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"the weights cannot be read: {reason(error)}", place=str(path)) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(torch.is_tensor(value) for value in state.values()) or not state:
        raise UserError("the file is not a state dict of tensors", place=str(path))
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def refuse_unless_whole(
    missing: Collection[str], unexpected: Collection[str], other_shape: Collection[str] = (), *, place: str
) -> None:
    """Weights are all of the model's and nothing else.

    Raises:
        UserError: one line that counts and names the first of each kind.
    """
    kinds = (("missing", missing), ("of nothing in the model", unexpected), ("of another shape", other_shape))
    said = [f"{len(names)} tensors {what}, the first '{min(names)}'" for what, names in kinds if names]
    if said:
        raise UserError(
            f"wrong or partial weights: {'; '.join(said)}", place=place, fix="Give the file that the scorer names."
        )


def load_strictly(module: Any, state: Mapping[str, Any], *, place: str, ignored: Collection[str] = ()) -> None:
    """Fills a module; a tensor too few, too many or of another shape is refused.

    Args:
        ignored: names in the file that are known to be of no use.

    Raises:
        UserError: see `refuse_unless_whole`.
    """
    own = module.state_dict()
    given = {name: value for name, value in state.items() if name not in ignored}
    both = own.keys() & given.keys()
    shapes = {name for name in both if own[name].shape != given[name].shape}
    refuse_unless_whole(own.keys() - given.keys(), given.keys() - own.keys(), shapes, place=place)
    module.load_state_dict(given)


def open_pretrained(loader: Any, folder: Path, **options: Any) -> Any:
    """A transformers model from a folder, strictly: nothing in it stays random.

    Args:
        loader: the class with `from_pretrained`.

    Raises:
        UserError: no such model there, damaged, or partial.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    was = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is refused below
    logging.disable_progress_bar()
    try:
        model, told = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the model cannot be loaded: {reason(error)}", place=str(folder)) from error
    finally:
        logging.set_verbosity(was)
    # older transformers saved position_ids, which are 0, 1, 2, ... and no weights
    unexpected = {name for name in told["unexpected_keys"] if not name.endswith("position_ids")}
    shapes = {entry[0] if isinstance(entry, tuple) else entry for entry in told["mismatched_keys"]}
    refuse_unless_whole(set(told["missing_keys"]), unexpected, shapes, place=str(folder))
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------- identity


def fingerprint(*parts: Any) -> str:
    """The first digits of a SHA-256 over modules, tensors and settings: what the numbers are made by.

    A module counts with its configuration and with names, shapes, types and all bytes of its tensors; where it was
    loaded from does not.
    """
    import torch

    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            config: Any = getattr(part, "config", {})
            entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            kept = {key: value for key, value in entries.items() if not str(key).startswith("_")}
            kept.pop("transformers_version", None)
            digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
            tensors = dict(sorted(part.state_dict().items()))
        elif torch.is_tensor(part):
            tensors = {"": part}
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
            continue
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]
