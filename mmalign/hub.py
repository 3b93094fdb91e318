"""What a recipe names by a word, here or on the hub: a folder, a model, a file. What is not there is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmalign.errors import UserError, reason

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/([\w./-]+\.safetensors)")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONVERT = "Where you trust it, load it by torch with weights_only=True and write it by safetensors.torch.save_file"

# what the libraries raise over files that are missing, damaged or of something else; the hub's are OSErrors
LOADING = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


def is_offline(said: bool = False) -> bool:
    """Whether the hub must not be reached, by a recipe's word or by HF_HUB_OFFLINE=1."""
    import huggingface_hub

    return said or bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def download(name: str, file: str, *, revision: str | None = None, offline: bool, place: str, missing: str) -> Path:
    """A file of a hub model, from the local cache if it is there.

    Args:
        name: owner/name.
        missing: the cause to give when the model has no such file.

    Raises:
        UserError: no such model, revision or file, no permission, not in the cache while offline, or no connection.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(name, file, revision=revision, local_files_only=offline))
    except errors.GatedRepoError as error:
        cause, fix = "the hub asks for a login and an accepted licence", "Accept it there, then run `hf auth login`"
        raise UserError(cause, place=place, fix=fix) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"the model has no revision '{revision}'", place=place) from error
    except errors.RepositoryNotFoundError as error:
        cause = "neither a folder here nor a model on the hub that you may read"
        raise UserError(cause, place=place, fix="Check the spelling, or log in for a private one") from error
    except errors.LocalEntryNotFoundError as error:
        cause = "no folder here, and not in the local hub cache" + (" (offline)" if offline else "")
        raise UserError(cause, place=place, fix="Download it once while online, or give a folder") from error
    except errors.EntryNotFoundError as error:
        raise UserError(missing, place=place) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot ask the hub: {reason(error)}", place=place) from error


def read_json(
    source: str, file: str, *, revision: str | None = None, offline: bool, place: str, missing: str
) -> dict[str, Any]:
    """The object in a JSON file of a folder or a hub model.

    Raises:
        UserError: it is not there or cannot be read; see also `download`.
    """
    path = Path(source) / file
    if not Path(source).is_dir():
        path = download(source, file, revision=revision, offline=offline, place=place, missing=missing)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(missing, place=place) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}", place=place) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not an object", place=place)
    return content


def has_file(name: str, file: str, *, offline: bool) -> bool:
    """Whether a hub model has a file; offline, whether the cache has it."""
    import huggingface_hub

    try:
        huggingface_hub.hf_hub_download(name, file, local_files_only=offline)
    except (OSError, ValueError):
        return False
    return True


def single_file(source: str, *, offline: bool, place: str) -> Path | None:
    """The safetensors file that `source` names: a path, or owner/name/FILE.safetensors. None: a folder or a hub model.

    Raises:
        UserError: a pickled file, whether it is there or not; or nothing that could be meant.
    """
    path = Path(source)
    if path.is_dir():
        return None
    if path.suffix in PICKLED:
        cause = f"pickled weights ({path.suffix}) can run code when they are read"
        raise UserError(cause, place=place, fix=CONVERT)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError("not a .safetensors file", place=place, fix="Weights are read from .safetensors only")
        return path
    there = HUB_FILE.fullmatch(source)
    if there is not None and ".." not in source.split("/"):
        name, file = there.groups()
        return download(name, file, offline=offline, place=place, missing=f"the model {name} has no {file}")
    if HUB_ID.fullmatch(source) and path.suffix != ".safetensors":
        return None
    raise UserError(
        "there is no such file or folder",
        place=place,
        fix="Give a folder, a .safetensors file, a hub id owner/name, or owner/name/FILE.safetensors",
    )
