"""`mmalign score SOURCE --scorer NAME ... --out FOLDER`: every picture of a source, by any number of scorers.

    mmalign score pictures --scorer pickscore --scorer clip,path=/models/clip --out scores
    torchrun --nproc_per_node 8 -m mmalign score shards/ --scorer hpsv2 --out scores
    mmalign compare scores/base scores/tuned

SOURCE is a preference store, a .jsonl, .parquet or .tar file, or a folder. Each picture is decoded once, in threads
ahead of the scorers. A shard's rows are written aside and renamed, so a run that was killed goes on with the shards
that are missing; several processes take shards by index and need no word of one another. What cannot be opened or
scored becomes a row with an error. At the end all rows are put together in FOLDER/scores.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.cli import Parser
from mmalign.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from evaluators.samples import Sample, Shard, Source
    from evaluators.scorefile import Header, Row
    from evaluators.scorer import Scorer

JOB, PARTS = "job.json", "parts"
AHEAD = 2  # batches decoded before they are asked for


@dataclass(kw_only=True, slots=True)
class Timing:
    """Where the time of one process went, in seconds of the clock.

    Attributes:
        waiting: for pictures to be read and decoded; computing: in each scorer; writing: rows to the disk.
        decoding: summed over threads, so it may exceed the rest.
    """

    pictures: int = 0
    errors: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    writing: float = 0.0
    decoding: float = 0.0
    computing: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Seconds, and what share of the clock they are."""
        clock = max(self.seconds, 1e-9)
        spent = {"waiting": self.waiting, "computing": sum(self.computing.values()), "writing": self.writing}
        return {
            "pictures": self.pictures,
            "errors": self.errors,
            "seconds": self.seconds,
            "pictures_per_second": self.pictures / clock,
            "shares": {name: value / clock for name, value in spent.items()},
            "computing_seconds": self.computing,
            "decoding_thread_seconds": self.decoding,
        }

    def __str__(self) -> str:
        said = self.as_json()
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in said["shares"].items())
        return (
            f"{self.pictures} pictures in {self.seconds:.1f} s ({said['pictures_per_second']:.3g}/s), "
            f"{self.errors} with errors; {shares}; decoding took {self.decoding:.1f} s of threads"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def of_environment() -> Place:
        """As torchrun and accelerate launch say it; each process then uses the GPU of its own.

        Raises:
            UserError: RANK and WORLD_SIZE are not numbers that fit each other.
        """
        try:
            place = Place(rank=int(os.environ.get("RANK", "0")), world=int(os.environ.get("WORLD_SIZE", "1")))
            local = int(os.environ.get("LOCAL_RANK", "0"))
        except ValueError as error:
            raise UserError(f"not a number: {error}", place="RANK, LOCAL_RANK, WORLD_SIZE") from error
        if not 0 <= place.rank < place.world:
            raise UserError(f"rank {place.rank} of {place.world}", place="RANK, WORLD_SIZE")
        if place.world > 1:
            import torch

            if torch.cuda.is_available():
                torch.cuda.set_device(local % torch.cuda.device_count())
        return place


# ------------------------------------------------------------------------------------------------- the engine


def score_source(
    source: Source,
    scorers: Mapping[str, Scorer],
    out: Path,
    header: Header,
    *,
    batch_size: int = 64,
    threads: int | None = None,
    place: Place | None = None,
) -> Timing:
    """Score this process's shards of a source into `out/parts`, those that are not there yet.

    Raises:
        UserError: `out` has scores of something else, a shard cannot be read, or the disk is full.
    """
    place = place or Place()
    parts = _open_job(source, out, header)
    todo = [
        (index, shard)
        for index, shard in enumerate(source.shards)
        if index % place.world == place.rank and not part_file(parts, index).exists()
    ]
    return _work(todo, scorers, parts, batch_size, threads or max(2, (os.cpu_count() or 1) // place.world), place)


def _open_job(source: Source, out: Path, header: Header) -> Path:
    """The folder of parts; what is in it must be of the same job. Every process writes the same file."""
    from evaluators.scorefile import write_whole

    job = {
        "source": source.fingerprint,
        "shards": len(source.shards),
        "model": header.model,
        "protocol": dict(header.protocol),
        "scorers": {label: dict(one) for label, one in header.scorers.items()},
    }
    file = out / JOB
    if file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read: {error}", place=str(file), fix="Choose another folder.") from error
        differ = [name for name in job if not isinstance(known, dict) or known.get(name) != job[name]]
        if differ:
            raise UserError(
                f"this folder has scores of another {' and '.join(differ)}",
                place=str(out),
                fix="Choose another folder, or delete this one.",
            )
    elif out.exists() and (not out.is_dir() or any(not _ours(entry.name) for entry in out.iterdir())):
        raise UserError("something else is here already", place=str(out), fix="Choose another folder.")
    else:
        write_whole(file, [json.dumps(job, indent=1) + "\n"])
    parts = out / PARTS
    parts.mkdir(exist_ok=True)
    return parts


def _ours(name: str) -> bool:
    """Whether a name in a folder without a finished job file is of a process that is just starting."""
    return name in (JOB, PARTS) or name.startswith(f".{JOB}.tmp-")


def part_file(parts: Path, index: int) -> Path:
    """The rows of one shard."""
    return parts / f"{index:06d}.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Samples of one shard with their pictures to come; `last` ends the shard."""

    index: int
    samples: list[Sample]
    pictures: list[Future[tuple[Image.Image | str, float]]]
    last: bool


def _work(
    todo: Sequence[tuple[int, Shard]],
    scorers: Mapping[str, Scorer],
    parts: Path,
    batch_size: int,
    threads: int,
    place: Place,
) -> Timing:
    from evaluators.scorefile import row_line, write_whole
    from mmalign.progress import Progress

    timing = Timing(computing=dict.fromkeys(scorers, 0.0))
    sizes = [shard.size for _, shard in todo]
    known = [size for size in sizes if size is not None]
    counted = len(known) == len(sizes)
    total, unit = (sum(known), "picture") if counted else (len(todo), "shard")
    title = "score" if place.world == 1 else f"score (rank {place.rank} of {place.world})"
    start = time.perf_counter()
    lines: list[str] = []
    with (
        Progress(total, title, unit=unit, enabled=place.rank == 0) as shown,
        contextlib.closing(_batches(todo, batch_size, threads)) as batches,
    ):
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            decoded = [picture.result() for picture in batch.pictures]
            timing.waiting += time.perf_counter() - begin
            timing.decoding += sum(seconds for _, seconds in decoded)
            rows = _score(scorers, batch.samples, [picture for picture, _ in decoded], timing)
            begin = time.perf_counter()
            lines += map(row_line, rows)
            if batch.last:
                _remove_remains(parts, batch.index)
                write_whole(part_file(parts, batch.index), lines)
                lines = []
            timing.writing += time.perf_counter() - begin
            timing.pictures += len(rows)
            timing.errors += sum(row.error is not None for row in rows)
            shown.update(len(rows) if counted else int(batch.last), errors=timing.errors)
    timing.seconds = time.perf_counter() - start
    return timing


def _remove_remains(parts: Path, index: int) -> None:
    """What a killed process left of a shard; no other process works on it."""
    for stale in parts.glob(f".{part_file(parts, index).name}.tmp-*"):
        stale.unlink(missing_ok=True)


def _batches(todo: Sequence[tuple[int, Shard]], batch_size: int, threads: int) -> Generator[_Batch]:
    """Batches in order, their pictures being decoded: a thread reads ahead, a pool decodes."""
    waiting: queue.Queue[_Batch | BaseException | None] = queue.Queue(maxsize=AHEAD)
    stop = threading.Event()

    def put(item: _Batch | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def read(pool: ThreadPoolExecutor) -> None:
        try:
            for index, shard in todo:
                samples = list(shard.read())
                chunks = [samples[at : at + batch_size] for at in range(0, len(samples), batch_size)] or [[]]
                for number, chunk in enumerate(chunks, start=1):
                    futures = [pool.submit(_decode, sample) for sample in chunk]
                    if not put(_Batch(index=index, samples=chunk, pictures=futures, last=number == len(chunks))):
                        return
            put(None)
        except BaseException as error:  # of any kind: it is raised again where the batches are used
            put(error)

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        reader = threading.Thread(target=read, args=(pool,), name="read", daemon=True)
        reader.start()
        try:
            while (item := waiting.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            reader.join()


def _decode(sample: Sample) -> tuple[Image.Image | str, float]:
    """The picture or what is wrong with it, and the seconds it took."""
    begin = time.perf_counter()
    if sample.media is None:
        return sample.error or "no picture", 0.0
    try:
        picture: Image.Image | str = sample.media.open()
    except UserError as error:
        picture = str(error)
    return picture, time.perf_counter() - begin


def _score(
    scorers: Mapping[str, Scorer], samples: Sequence[Sample], pictures: Sequence[Image.Image | str], timing: Timing
) -> list[Row]:
    """A row per sample; each scorer sees all pictures that there are at once."""
    from evaluators.scorefile import Row
    from evaluators.scorer import score_each

    errors: list[list[str]] = [[picture] if isinstance(picture, str) else [] for picture in pictures]
    scores: list[dict[str, float]] = [{} for _ in samples]
    good = [index for index, picture in enumerate(pictures) if not isinstance(picture, str)]
    prompts = [samples[index].prompt for index in good]
    opened = [picture for picture in pictures if not isinstance(picture, str)]
    for label, scorer in scorers.items():
        begin = time.perf_counter()
        for index, scored in zip(good, score_each(scorer, prompts, opened) if opened else [], strict=True):
            scores[index] |= {f"{label}/{number}": value for number, value in scored.numbers.items()}
            if scored.error is not None:
                errors[index].append(f"{label}: {scored.error}")
        timing.computing[label] += time.perf_counter() - begin
    return [
        Row(
            id=sample.id,
            prompt=sample.prompt,
            seed=sample.seed,
            scores=numbers,
            error="; ".join(wrong) or None,
        )
        for sample, numbers, wrong in zip(samples, scores, errors, strict=True)
    ]


# --------------------------------------------------------------------------------------------------- the rest


def wait_for_parts(out: Path, count: int, pause: float = 0.5) -> None:
    """Until every shard's rows are there: other processes may still be at theirs."""
    from mmalign.progress import Progress

    def there() -> int:
        return sum(part_file(out / PARTS, index).exists() for index in range(count))

    done = there()
    if done == count:
        return
    with Progress(count, "wait for the other processes", unit="shard", initial=done) as shown:
        while shown.done < count:
            time.sleep(pause)
            shown.update(there() - shown.done)


def part_rows(out: Path, count: int) -> Iterator[Row]:
    """The rows of all shards, in order.

    Raises:
        UserError: an id comes twice, or a part is damaged.
    """
    from evaluators.scorefile import read_row

    seen: set[str] = set()
    for index in range(count):
        file = part_file(out / PARTS, index)
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                row = read_row(line, f"{file} line {number}")
                if row.id in seen:
                    raise UserError(
                        f"two pictures have the id '{row.id}'", place=str(file), fix="Give each its own id."
                    )
                seen.add(row.id)
                yield row


def finish(source: Source, out: Path, header: Header) -> Path:
    """Put all parts together in `out/scores.jsonl`."""
    from evaluators.scorefile import FILE, write_scores

    write_scores(out / FILE, header, part_rows(out, len(source.shards)))
    return out / FILE


def scoring_options(parser: Parser) -> None:
    """The options that scoring and labelling share."""
    parser.add_argument(
        "source", type=Path, help="a store, .jsonl, .parquet, .tar, or a folder of these or of pictures"
    )
    parser.add_argument(
        "--scorer", action="append", required=True, metavar="NAME[,option=value]", help="may be given more than once"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="pictures per call of a scorer (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="that decode (default: this process's share of the cores)")
    parser.add_argument("--shard-rows", type=int, default=1000, help="of sources without shards (default: %(default)s)")


def require_positive(said: Any) -> None:
    """Refuse counts below one."""
    for name in ("batch_size", "threads", "shard_rows"):
        value = getattr(said, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def read_protocol(path: Path) -> dict[str, Any]:
    """A protocol from a YAML or JSON file: a mapping of plain values.

    Raises:
        UserError: it is none.
    """
    from mmalign import yamltext

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the protocol: {error}", place=str(path)) from error
    value, _ = yamltext.parse(text, str(path))
    if not isinstance(value, dict):
        raise UserError("a protocol is a mapping of names to values", place=str(path))
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """`mmalign score SOURCE --scorer NAME --out FOLDER`."""
    parser = Parser(prog="mmalign score", description=__doc__)
    scoring_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="a new folder, or one to go on with")
    parser.add_argument("--model", help="whose pictures these are (default: what the source says, else its name)")
    parser.add_argument("--protocol", type=Path, help="YAML or JSON: how they were drawn; compare refuses others")
    parser.add_argument("--json", action="store_true", help="print counts and seconds as JSON")
    said = parser.parse_args(argv)
    require_positive(said)

    from evaluators.compare import UNKNOWN
    from evaluators.samples import find
    from evaluators.scorefile import Header, described, scorers_of

    place = Place.of_environment()
    source = find(said.source, said.shard_rows)
    scorers = scorers_of(said.scorer)
    protocol = read_protocol(said.protocol) if said.protocol else source.about.get("protocol", {"sampler": UNKNOWN})
    model = said.model or source.about.get("model") or said.source.stem
    header = Header(model=model, protocol=protocol, scorers=described(scorers))
    timing = score_source(
        source, scorers, said.out, header, batch_size=said.batch_size, threads=said.threads, place=place
    )
    print(json.dumps({"rank": place.rank, **timing.as_json()}) if said.json else timing, flush=True)
    if place.rank == 0:
        wait_for_parts(said.out, len(source.shards))
        file = finish(source, said.out, header)
        if not said.json:
            print(f"scores: {file}")
    return 0
