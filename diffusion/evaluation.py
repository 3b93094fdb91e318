"""`mmalign eval t2i`: base against tuned models on the same prompts and noise, with pictures, scores and a comparison.

    mmalign eval t2i runs/demo/dpo runs/demo/sft --out eval          prompts, sampler and scorers of the runs' demo
    mmalign eval t2i RUN --prompts prompts.txt --protocol spo --scorer pickscore --scorer hpsv2 --out eval
    mmalign eval t2i --replay eval/manifest.json --out again         the same pictures, and whether they are
    torchrun --nproc_per_node 8 -m mmalign eval t2i RUN --prompts prompts.txt --scorer pickscore --out eval

A model is a run's folder, a checkpoint, or a pipeline; the base is that of the first run unless --base names one. Of
each the folder has images/ and scores.jsonl. Pictures that are there are not drawn again, so an interrupted evaluation
goes on; processes share pictures in pieces that are the same however many there are.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli import Parser
from mmalign.errors import UserError

if TYPE_CHECKING:
    from diffusion.models import DiffusionModel
    from diffusion.protocols import Protocol, Unit
    from diffusion.recipe import EvaluationSettings
    from evaluators.score import Place
    from evaluators.scorefile import Header
    from evaluators.scorer import Scorer

FORMAT, MANIFEST = "mmalign-eval-t2i", "manifest.json"
DECIDING = ("protocol", "prompts", "models", "scorers", "batch_size")  # of a manifest: all that pictures depend on
BASE = "base"
PIECE = 64  # pictures that a process takes at a time, or one batch


# ----------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A model that takes part.

    Attributes:
        path: as it was given.
        kind: run, base (of the run at `path`) or pipeline.
        base: where the base of a run is now, where that was said.
        identity: of the base and of the weights on it, by content.
    """

    path: str
    kind: str
    base: str | None
    identity: str
    open: Callable[[], DiffusionModel]


def contestant(path: str, kind: str, scheduler: str | None, base: str | None = None) -> Contestant:
    """A model of a kind at a path.

    Raises:
        UserError: nothing there, or not what `kind` says.
    """
    from diffusion import models
    from diffusion.settings import ModelSettings
    from diffusion.tuned import find_tuned, open_base, open_tuned
    from evaluators.scorefile import digest

    if kind == "pipeline":
        settings = ModelSettings.model_validate({"path": path, "scheduler": scheduler})
        model = models.load_model(settings)  # opened now: only the model knows its identity
        return Contestant(path=path, kind=kind, base=base, identity=model.identity, open=lambda: model)
    tuned = find_tuned(Path(path), base=base)
    if scheduler is not None:
        changed = tuned.config.model.model_copy(update={"scheduler": scheduler})
        tuned = replace(tuned, config=tuned.config.model_copy(update={"model": changed}))
    identity = str(tuned.manifest.summary.get("base", "")).rpartition("@")[2]
    if kind == BASE:
        return Contestant(path=path, kind=kind, base=base, identity=identity, open=lambda: open_base(tuned))
    inside = f"{tuned.weights.name}/"
    files = {name: entry["sha256"] for name, entry in tuned.manifest.files.items() if name.startswith(inside)}
    name = f"{identity}+{digest(files)}"
    return Contestant(path=path, kind=kind, base=base, identity=name, open=lambda: open_tuned(tuned))


def kind_of(path: str) -> str:
    """run for what training left behind, else pipeline."""
    place = Path(path)
    trained = any((folder / "config.yaml").is_file() for folder in (place, place.parent, place.parent.parent))
    return "run" if place.exists() and trained and not (place / "model_index.json").is_file() else "pipeline"


def require_base(paths: Sequence[str], base: str | None) -> None:
    """Refuse models without anything to compare them with.

    Raises:
        UserError: no base is named, and none of the models is a run, which has one.
    """
    if base is None and "run" not in map(kind_of, paths):
        raise UserError("there is nothing to compare with", fix="Give --base PATH, or the folder of a run.")


def line_up(
    paths: Sequence[str], base: str | None, names: Sequence[str] | None, scheduler: str | None
) -> dict[str, Contestant]:
    """The base first, then every model, by name.

    Args:
        base: a pipeline; None for the base of the first run (`require_base`).

    Raises:
        UserError: two models have one name, or one that cannot name a folder.
    """
    kinds = [kind_of(path) for path in paths]
    names = list(names) if names else _names(paths)
    if len(names) != len(paths):
        raise UserError(f"{len(names)} names for {len(paths)} models", place="--names")
    if len({BASE, *names}) <= len(names):
        raise UserError("two models have the same name", place=", ".join([BASE, *names]), fix="Give --names.")
    for name in names:
        if not name or Path(name).name != name or name.startswith("."):
            raise UserError(f"'{name}' cannot name a folder", place="--names")
    if base is not None:
        found = {BASE: contestant(base, "pipeline", scheduler)}
    else:
        found = {BASE: contestant(paths[kinds.index("run")], BASE, scheduler)}
    for name, path, kind in zip(names, paths, kinds, strict=True):
        found[name] = contestant(path, kind, scheduler, base if kind == "run" else None)
    return found


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for depth in range(1, 4):
        names = ["-".join(part.strip("/") for part in one[-depth:]) for one in parts]
        if len({*names, BASE}) == len(names) + 1:
            return names
    return names


# --------------------------------------------------------------------------------------------------- drawing


def pieces(units: Sequence[Unit], batch_size: int) -> list[list[Unit]]:
    """What processes take in turns: whole batches, so that every batch is the same however many processes there are."""
    size = batch_size * max(1, PIECE // batch_size)
    return [list(units[start : start + size]) for start in range(0, len(units), size)]


def draw(
    contestant: Contestant,
    name: str,
    work: Sequence[Sequence[Unit]],
    folder: Path,
    protocol: Protocol,
    *,
    batch_size: int,
    place: Place,
) -> None:
    """Draw this process's pieces that are not there yet into `folder/images`.

    Raises:
        UserError: the disk is full, or the model cannot be opened or has too few steps.
    """
    import torch

    from mmalign.pictures import save
    from mmalign.progress import Progress

    mine = work[place.rank :: place.world]
    missing = [piece for piece in mine if not all((folder / unit.file).is_file() for unit in piece)]
    if not missing:
        return
    model = contestant.open()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.require_steps(protocol.steps, "--steps")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with Progress(sum(map(len, missing)), f"draw {name}", unit="picture", enabled=place.rank == 0) as shown:
        for piece in missing:
            pictures = model.sample(
                [unit.prompt for unit in piece],
                seeds=[unit.seed for unit in piece],
                steps=protocol.steps,
                guidance_scale=protocol.guidance_scale,
                batch_size=batch_size,
            )
            for unit, picture in zip(piece, pictures, strict=True):
                save(picture, folder / unit.file)
            shown.update(len(piece))


def judge(
    work: Sequence[Sequence[Unit]],
    folder: Path,
    scorers: Mapping[str, Scorer],
    header: Header,
    *,
    batch_size: int,
    place: Place,
) -> None:
    """Score this process's pictures; the first process waits for the others and writes `folder/scores.jsonl`."""
    from evaluators.samples import Sample, Shard, Source
    from evaluators.score import part_rows, score_source, wait_for_parts
    from evaluators.scorefile import FILE, digest, write_scores
    from mmalign.media import Media

    def shard(piece: Sequence[Unit]) -> Shard:
        def read() -> Iterator[Sample]:
            for unit in piece:
                media = Media(path=unit.file, root=str(folder))
                yield Sample(id=unit.id, prompt=unit.prompt, media=media, seed=unit.seed)

        return Shard(name=piece[0].id, read=read, size=len(piece))

    every = [unit for piece in work for unit in piece]
    source = Source(
        path=folder,
        shards=[shard(piece) for piece in work],
        fingerprint=digest([[unit.id, unit.prompt, unit.seed] for unit in every]),
        about={},
    )
    temporary = folder / ".scores"
    if (folder / FILE).exists():
        return
    score_source(source, scorers, temporary, header, batch_size=batch_size, place=place)
    if place.rank == 0:
        wait_for_parts(temporary, len(source.shards))
        files = {unit.id: unit.file for unit in every}
        rows = part_rows(temporary, len(source.shards))
        write_scores(folder / FILE, header, (replace(row, image=files[row.id]) for row in rows))
        shutil.rmtree(temporary, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- manifest


def picture_digests(units: Sequence[Unit], folder: Path) -> dict[str, str]:
    """SHA-256 of every picture's file."""
    return {unit.id: hashlib.sha256((folder / unit.file).read_bytes()).hexdigest() for unit in units}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an evaluation.

    Raises:
        UserError: it is none.
    """
    from mmalign.sources import parse_json

    try:
        found = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"cannot read the manifest: {error.strerror}", place=str(path)) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not {*DECIDING, "numbers"} <= set(found):
        raise UserError("not the manifest of an evaluation", place=str(path))
    return found


def _settle(out: Path, manifest: dict[str, Any], place: Place) -> None:
    """Write the manifest, or see that the one in the folder is of the same evaluation."""
    from evaluators.scorefile import write_whole

    file = out / MANIFEST
    if file.exists():
        known = read_manifest(file)
        if differ := [name for name in DECIDING if known[name] != manifest[name]]:
            raise UserError(
                f"this folder has an evaluation with other {' and '.join(differ)}",
                place=str(out),
                fix="Choose another folder, or delete this one.",
            )
    elif out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()) and place.rank == 0:
        raise UserError("something else is here already", place=str(out), fix="Choose another folder.")
    elif place.rank == 0:
        write_whole(file, [json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"])
    else:
        while not file.exists():  # written by the first process, which may refuse the folder and end all of them
            time.sleep(0.1)


# --------------------------------------------------------------------------------------------------- command


def _parser() -> Parser:
    parser = Parser(prog="mmalign eval t2i", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="runs, checkpoints or pipelines")
    parser.add_argument("--base", metavar="PATH", help="a pipeline (default: the base of the first run)")
    parser.add_argument("--names", nargs="+", help="of the models (default: of their folders)")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, or one to go on with")
    parser.add_argument("--protocol", help="diffusion-dpo-sd15, diffusion-dpo-sdxl, spo, pso-4step or geneval")
    parser.add_argument(
        "--prompts",
        help="PartiPrompts.tsv, .txt, .json ... or shapes:heldout (default: the first run's evaluation section)",
    )
    parser.add_argument("--count", type=int, help="prompts drawn by the seed (default: all)")
    parser.add_argument("--per-prompt", type=int, help="pictures per prompt (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, help="1 or less: none")
    parser.add_argument("--scheduler", help="ddim, ddpm, euler_ancestral or lcm (default: the model's own)")
    parser.add_argument("--seed", type=int, help="of the noise and of which prompts (default: 0)")
    parser.add_argument("--batch-size", type=int, help="pictures drawn at once (default: 8)")
    parser.add_argument("--scorer", action="append", metavar="NAME[,option=value]", help="may be given more than once")
    parser.add_argument("--numbers", nargs="+", metavar="SCORER/NUMBER", help="compared (default: the scorers' main)")
    parser.add_argument("--replay", type=Path, metavar="MANIFEST", help="draw and score again what a manifest says")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return parser


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that decides the outcome."""

    protocol: Protocol
    prompts: list[str]
    scorers: list[str]
    numbers: list[str] | None
    preference: str | None
    batch_size: int


def _section(models: Sequence[str]) -> EvaluationSettings | None:
    """The evaluation section of the first run, where there is one."""
    from diffusion.tuned import find_tuned

    runs = [path for path in models if kind_of(path) == "run"]
    return find_tuned(Path(runs[0])).config.evaluation if runs else None


def plan(said: Any) -> Plan:
    """What the command line asks for; what it leaves out comes from the protocol or from the run's own evaluation.

    Raises:
        UserError: prompts or scorers are named nowhere, or a number cannot be.
    """
    from diffusion import protocols
    from mmalign.prompts import read_prompts

    for name, least in (("count", 1), ("per_prompt", 1), ("steps", 1), ("seed", 0), ("batch_size", 1)):
        value = getattr(said, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if said.guidance_scale is not None and not said.guidance_scale >= 0:
        raise UserError(f"--guidance-scale must be at least 0, got {said.guidance_scale}")
    section = None if said.prompts and said.scorer else _section(said.models)
    source, scorers = said.prompts, said.scorer
    batch_size, count, protocol = said.batch_size or 8, said.count, protocols.Protocol(steps=30, guidance_scale=7.5)
    if said.protocol:
        protocol = protocols.named(said.protocol)
    if source is None:
        if section is None:
            raise UserError("there are no prompts", fix="Give --prompts FILE, or a run with an evaluation section.")
        source = section.prompts
        count = count or section.count
        batch_size = said.batch_size or section.sampler.batch_size
        if not said.protocol:  # as the demo drew them, so that its numbers come out
            protocol = protocols.Protocol(
                steps=section.sampler.steps,
                guidance_scale=section.sampler.guidance_scale,
                per_prompt=section.per_prompt,
                seed=section.seed,
                seeds="consecutive",
            )
    given = {
        name: value
        for name in ("steps", "guidance_scale", "scheduler", "per_prompt", "seed")
        if (value := getattr(said, name)) is not None
    }
    protocol = replace(protocol, **given)
    if scorers is None:
        if section is None:
            raise UserError("nothing to score with", fix="Give --scorer NAME; `mmalign scorers` lists them.")
        scorers = [_word(one.name, one.options()) for one in section.scorers]
    return Plan(
        protocol=protocol,
        prompts=read_prompts(source, count, protocol.seed),
        scorers=scorers,
        numbers=said.numbers,
        preference=section.preference if section else None,
        batch_size=batch_size,
    )


def _word(name: str, options: Mapping[str, Any]) -> str:
    """A scorer of a recipe as the command line names it."""
    return ",".join([name, *(f"{key}={json.dumps(value)}" for key, value in options.items())])


def _chosen(scorers: Mapping[str, Scorer], preference: str | None) -> list[str]:
    """The number that was taught, where a scorer has it, then every scorer's main one."""
    taught = [f"{label}/{preference}" for label, scorer in scorers.items() if preference in scorer.numbers]
    return list(dict.fromkeys([*taught, *(f"{label}/{scorer.main}" for label, scorer in scorers.items())]))


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign eval t2i MODEL ... --out FOLDER`. Exit code 1 when a replay drew another picture."""
    words = list(argv or [])
    said = _parser().parse_args(words)

    from diffusion import protocols
    from diffusion.stages import versions
    from evaluators.compare import compare
    from evaluators.compare_report import markdown, write_comparison
    from evaluators.score import Place
    from evaluators.scorefile import Header, described, read_scores, scorers_of, write_whole

    place = Place.of_environment()
    old: dict[str, Any] | None = None
    if said.replay is not None:
        if said.models or said.prompts or said.protocol:
            raise UserError("a replay takes everything from its manifest", place="--replay")
        old = read_manifest(said.replay)
        planned = Plan(
            protocol=protocols.Protocol(**old["protocol"]),
            prompts=old["prompts"],
            scorers=old["scorers"],
            numbers=old["numbers"],
            preference=None,
            batch_size=old["batch_size"],
        )
        models = {
            name: contestant(one["path"], one["kind"], planned.protocol.scheduler)
            for name, one in old["models"].items()
        }
        for name, one in models.items():
            if one.identity != old["models"][name]["identity"]:
                raise UserError(
                    f"'{name}' is {one.identity}, the manifest's was {old['models'][name]['identity']}",
                    place=one.path,
                    fix="Bring back the model that was evaluated.",
                )
    else:
        require_base(said.models, said.base)
        planned = plan(said)
        models = line_up(said.models, said.base, said.names, planned.protocol.scheduler)
    if len(models) < 2:
        raise UserError("there is only one model", fix="Give a run, or --base and a pipeline.")

    scorers = scorers_of(planned.scorers)
    numbers = planned.numbers or _chosen(scorers, planned.preference)
    protocol = planned.protocol.as_json(planned.prompts)
    manifest = {
        "format": FORMAT,
        "protocol": asdict(planned.protocol),
        "prompts": planned.prompts,
        "models": {
            name: {"path": one.path, "kind": one.kind, "base": one.base, "identity": one.identity}
            for name, one in models.items()
        },
        "scorers": planned.scorers,
        "numbers": numbers,
        "batch_size": planned.batch_size,
        "command": shlex.join(["mmalign", "eval", "t2i", *words]),
        "versions": versions(),
    }
    _settle(said.out, manifest, place)
    units = protocols.units(planned.protocol, planned.prompts)
    work = pieces(units, planned.batch_size)
    for name, one in models.items():
        folder = said.out / name
        draw(one, name, work, folder, planned.protocol, batch_size=planned.batch_size, place=place)
        header = Header(model=name, protocol=protocol, scorers=described(scorers))
        judge(work, folder, scorers, header, batch_size=64, place=place)
    if place.rank != 0:
        return 0
    found = compare([read_scores(said.out / name) for name in models], list(models), numbers=numbers)
    page = write_comparison(said.out, found)
    digests = {name: picture_digests(units, said.out / name) for name in models}
    write_whole(
        said.out / MANIFEST, [json.dumps({**manifest, "pictures": digests}, indent=1, ensure_ascii=False) + "\n"]
    )
    print(json.dumps(found.as_json(), allow_nan=False) if said.json else f"{markdown(found)}\n\nreport: {page}")
    return _compared_with(old, digests) if old is not None else 0


def _compared_with(old: Mapping[str, Any], digests: Mapping[str, Mapping[str, str]]) -> int:
    """Say whether a replay drew the same bytes."""
    before = old.get("pictures")
    if before is None:
        print("The first evaluation was not finished: there are no pictures to compare with.")
        return 0
    total = sum(map(len, digests.values()))
    other = sum(before[name].get(unit) != digest for name, found in digests.items() for unit, digest in found.items())
    print(f"replay: {total - other} of {total} pictures are the same, byte for byte")
    return 1 if other else 0
