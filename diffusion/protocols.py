"""Evaluation protocols: everything that moves scores besides the model.

Named ones are what papers and their code say. Their prompts are lists that each user has or has not, so they are given
by `--prompts`; what the list should be is said here. Noise is this project's own in all of them: the seed of a picture
comes from its prompt and its number, so neither batch size nor the number of processes changes it; published code draws
noise in other ways (one generator that is advanced picture by picture, on as many GPUs as there were).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluators.scorefile import digest
from mmalign.errors import UserError, nearest
from mmalign.randomness import key_seed

Seeds = Literal["keyed", "consecutive"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How pictures are drawn.

    Attributes:
        steps, guidance_scale: of the sampler.
        scheduler: the sampler, as in `model.scheduler`; None is the model's own.
        per_prompt: pictures per prompt.
        seed: of the noise.
        seeds: keyed: from (seed, prompt, number), whatever list the prompt stands in; consecutive: from the place in
            the list, as `mmalign demo` has it.
        prompts: which list it is made for.
        source: who says so.
    """

    steps: int
    guidance_scale: float
    scheduler: str | None = None
    per_prompt: int = 1
    seed: int = 0
    seeds: Seeds = "keyed"
    prompts: str = ""
    source: str = ""

    def as_json(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What two evaluations must agree in, with the prompts."""
        return {
            "sampler": self.scheduler or "the model's own",
            "steps": self.steps,
            "guidance_scale": float(self.guidance_scale),
            "per_prompt": self.per_prompt,
            "seed": self.seed,
            "seeds": self.seeds,
            "prompts": digest(list(prompts)),
            "prompt_count": len(prompts),
        }


PROTOCOLS = {
    "diffusion-dpo-sd15": Protocol(
        steps=50,
        guidance_scale=7.5,
        prompts="Pick-a-Pic validation_unique (500, median PickScore); PartiPrompts (1632) and HPSv2 (3200) by people",
        source="Wallace et al. 2311.12908 and its notebook",
    ),
    "diffusion-dpo-sdxl": Protocol(
        steps=50,
        guidance_scale=5.0,
        prompts="as diffusion-dpo-sd15",
        source="Wallace et al. 2311.12908 and its notebook",
    ),
    "spo": Protocol(
        steps=20,
        guidance_scale=5.0,
        scheduler="ddim",
        prompts="Pick-a-Pic validation_unique (500, mean)",
        source="Liang et al. 2406.04314",
    ),
    "pso-4step": Protocol(
        steps=4,
        guidance_scale=0.0,
        scheduler="lcm",
        prompts="Pick-a-Pic test_unique (500, mean)",
        source="Miao et al. 2410.03190 and its code, whose noise depends on the number of GPUs",
    ),
    "geneval": Protocol(
        steps=50,
        guidance_scale=9.0,
        per_prompt=4,
        seed=42,
        prompts="GenEval (553)",
        source="Ghosh et al. 2310.11513 and its code",
    ),
}


def named(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        UserError: there is none.
    """
    if name not in PROTOCOLS:
        raise UserError(f"no protocol '{name}'", place="--protocol", fix=nearest(name, PROTOCOLS))
    return PROTOCOLS[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One picture to draw."""

    id: str
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        """Where it goes, below the model's folder."""
        return f"images/{self.id}.png"


def units(protocol: Protocol, prompts: Sequence[str]) -> list[Unit]:
    """All pictures of an evaluation, those of one prompt side by side."""
    found = []
    for index, prompt in enumerate(prompts):
        for k in range(protocol.per_prompt):
            if protocol.seeds == "keyed":
                seed = key_seed("eval t2i", protocol.seed, prompt, k)
            else:
                seed = (protocol.seed + 1) * 10**12 + index * protocol.per_prompt + k
            found.append(Unit(id=f"{index:05d}-{k}", prompt=prompt, seed=seed))
    return found
