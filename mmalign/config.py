"""Configuration: YAML plus `key.sub=value`, into typed, frozen, strict settings.

A recipe is a YAML file of sections. An entry module composes its own settings class from the sections here
(`OptimSettings`, `LoopSettings`) and those of the model, the data and the method:

    class TrainConfig(Settings):
        method: NamedSection  # its class is known only once its name is: see `parse_section`
        optim: OptimSettings
        loop: LoopSettings

    config = load(TrainConfig, "diffusion/dpo_shapes", ["optim.lr=1e-4", "method.beta=2000"])

Whatever is wrong with the file or an override is a `UserError` that names the place, the key and the nearest
valid key, across sections too: `lr` at the top level is answered with `optim.lr`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmalign import yamltext
from mmalign.errors import UserError
from mmalign.explain import explain, kind_of
from mmalign.precision import Precision
from mmalign.recipes import find

MAX_BYTES = 1_000_000  # a recipe is a page; what is larger is another file given by mistake

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of every section: unknown keys are refused, values keep their type, nothing changes later."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=True,
    )


class NamedSection(BaseModel):
    """A section whose class is chosen by its name at load time: `{name: dpo, beta: 2000}`.

    The other keys wait, unchecked, for `parse_section` with the class that the name stands for.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(description="which implementation: the name of its file")

    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


# ----------------------------------------------------------------------------------------------------
# The sections that the loop reads


class OptimSettings(Settings):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = Field("adamw", description="adamw8bit needs bitsandbytes")
    lr: float = Field(gt=0, description="peak learning rate, per optimizer update; never scaled behind your back")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="decay of Adam's first and second moment, per update; Adafactor has its own"
    )
    eps: float = Field(1e-8, gt=0, description="Adam's denominator offset")
    weight_decay: float = Field(0.0, ge=0, description="decoupled: weights shrink by lr * weight_decay per update")
    max_grad_norm: float | None = Field(1.0, gt=0, description="global L2 norm gradients are clipped to; null: never")
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant", description="linear and cosine fall to 0 at the last step and may warm up first"
    )
    warmup_steps: int = Field(0, ge=0, description="optimizer updates during which lr rises linearly from 0")
    warmup_fraction: float | None = Field(None, ge=0, lt=1, description="the same as a share of loop.steps")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="per-update decay of an average of the trained weights; null: no average",
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimSettings:
        if self.warmup_steps and self.warmup_fraction is not None:
            raise ValueError("warmup_steps and warmup_fraction are both set; keep one")
        warms_up = bool(self.warmup_steps or self.warmup_fraction)
        if warms_up and self.schedule == "constant":
            raise ValueError("schedule 'constant' has no warm-up; say constant_with_warmup, or drop the warm-up")
        if not warms_up and self.schedule == "constant_with_warmup":
            raise ValueError("schedule 'constant_with_warmup' needs warmup_steps or warmup_fraction above 0")
        return self

    def warmup(self, steps: int) -> int:
        """Warm-up in updates, of a run of `steps` updates."""
        return self.warmup_steps if self.warmup_fraction is None else round(self.warmup_fraction * steps)


class LoopSettings(Settings):
    """How long, how much at once, in which precision, and what is written when."""

    steps: int = Field(gt=0, description="optimizer updates in all, not counting micro-batches")
    batch_size: int = Field(1, gt=0, description="pairs per device per forward")
    accumulation: int = Field(
        1, gt=0, description="forwards per update; pairs per update = batch_size * accumulation * devices"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every draw; 0 is a seed like any other")
    precision: Precision = Field("fp32", description="of the forwards; losses are fp32 always")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward: less memory, slower"
    )
    compile: bool = Field(False, description="torch.compile the trained model")
    attention: Literal["sdpa", "xformers"] = Field("sdpa", description="xformers is an extra and needs a GPU")
    checkpoint_every: int = Field(0, ge=0, description="updates between checkpoints; 0: only the last update")
    keep_checkpoints: int = Field(2, gt=0, description="newest good checkpoints that stay on disk")
    skip_spikes: float | None = Field(
        None, gt=1, description="leave out updates whose gradient norm is this many times the recent median"
    )
    sample_every: int = Field(0, ge=0, description="updates between validation samples; 0: none")
    log_every: int = Field(1, gt=0, description="updates between logged lines")
    resume: str = Field("auto", min_length=1, description="auto: go on from output_dir's newest; none; or a path")
    init_from: str | None = Field(
        None, min_length=1, description="a run or a checkpoint whose weights a new run starts from, at step 0"
    )
    output_dir: Annotated[Path, Field(strict=False)] = Field(description="folder of the run")
    trackers: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = Field(
        ("jsonl", "tensorboard"),
        description="metrics.jsonl is written whatever is listed; wandb needs a login",
    )

    @model_validator(mode="after")
    def _one_start(self) -> LoopSettings:
        if self.init_from is not None and self.resume not in ("auto", "none"):
            raise ValueError(
                "resume and init_from both name a checkpoint; resume goes on with the same run, "
                "init_from starts another from its weights: keep one"
            )
        return self


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError("too large for a config (over 1 MB)", place=str(path), fix="Give a YAML recipe.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("not a text file", place=str(path), fix="Give a YAML recipe in UTF-8.") from error
    except OSError as error:
        raise UserError(f"cannot read the config: {error.strerror}", place=str(path)) from error


def _apply(data: dict[str, Any], override: str, places: dict[str, str]) -> None:
    """Sets one `key.sub=value` in place."""
    key, equals, text = override.partition("=")
    key, source = key.strip(), f"override '{override}'"
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError("not of the form key=value", place=source, fix="Write for example optim.lr=1e-4.")
    value, inner = yamltext.parse(text, source, lines=False)
    section = data
    for depth, part in enumerate(parts[:-1], start=1):
        below = section.setdefault(part, {})
        if not isinstance(below, dict):
            above = ".".join(parts[:depth])
            raise UserError(f"'{above}' is a value, not a section", place=source, fix=f"Set {above}=... itself.")
        section = below
    section[parts[-1]] = value
    for below_key in [place for place in places if place.startswith((f"{key}.", f"{key}["))]:
        del places[below_key]
    places[key] = source
    places.update({f"{key}.{sub}": source for sub in inner})


def load(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Reads a recipe, applies the overrides in order, and checks the result.

    Args:
        cls: the settings class to fill.
        path: a YAML file, or the short name of a shipped recipe (`find`).
        overrides: `key.sub=value`, the value in YAML: `optim.lr=1e-4`, `loop.trackers=[jsonl]`.

    Raises:
        UserError: an unreadable or malformed file or override, an unknown or missing key, a wrong value.
    """
    file = find(path)
    data, places = yamltext.parse(_read(file), str(file))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(
            f"expected sections, got {kind_of(data)}", place=str(file), fix="Start with a key such as optim:."
        )
    for override in overrides:
        _apply(data, override, places)
    return _validate(cls, data, default_place=str(file), places=places, prefix="")


def parse_section(cls: type[S], section: Mapping[str, Any] | NamedSection, place: str) -> S:
    """Checks a section against the class that its name stands for.

    Args:
        cls: the settings class, for instance the `Settings` of the method's file.
        section: its keys; `name` is left out where `cls` has no such field.
        place: the section's key, for messages: "method".

    Raises:
        UserError: an unknown or missing key, a wrong type or value.
    """
    data = {"name": section.name, **section.options()} if isinstance(section, NamedSection) else dict(section)
    if "name" not in cls.model_fields:
        data.pop("name", None)
    return _validate(cls, data, default_place=None, places={}, prefix=place)


def _validate(
    cls: type[S],
    data: Mapping[str, Any],
    *,
    default_place: str | None,
    places: Mapping[str, str],
    prefix: str,
) -> S:
    # Through JSON: its strict mode takes what YAML can say (a list for a tuple, text for a path), no more.
    try:
        return cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as failure:
        raise explain(failure, cls, prefix=prefix, places=places, default_place=default_place) from failure


def dump(settings: BaseModel) -> str:
    """The settings as YAML that `load` reads back to equal settings."""
    return yamltext.write(settings.model_dump(mode="json"))


def digest(settings: BaseModel | Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the values, whatever order the keys are in."""
    values = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else settings
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
