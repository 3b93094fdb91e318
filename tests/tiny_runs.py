"""Training runs of seconds: a store of random pictures, and recipes on a tiny random Stable Diffusion.

As a script it runs recipes, one after another, and can interrupt them:

    python tests/tiny_runs.py JOBS.json         each job in a process of its own, forked after the imports
    torchrun --nproc_per_node 2 tests/tiny_runs.py JOBS.json        each job on all processes
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OPENERS = {
    "diffusion": ("diffusion.models", "load_model"),
    "vlm": ("vlm.models", "open_model"),
    "evaluators": ("evaluators.training.model", "PreferenceModel"),
}
TIMED = ("time", "throughput/pairs_per_second", "memory/peak_gb")

RECIPE: dict[str, Any] = {
    "package": "diffusion",
    "model": {"path": ""},
    "adapter": {"rank": 2, "targets": "all"},
    "data": {"path": "", "cache": None, "pairing": {"score": "taste"}},
    "method": {"name": "dpo", "beta": 2000.0},
    # Adam divides a gradient by its own size, so that rounding of a tiny one becomes a whole step. With a large eps a
    # step is proportional to the gradient, and comparisons between ways to compute it mean something.
    "optim": {"lr": 1.0e-3, "eps": 1.0e-2},
    "loop": {"steps": 3, "batch_size": 2, "output_dir": "", "trackers": ["jsonl"]},
}


def write_store(path: Path, records: int = 7, *, size: int = 32, seed: int = 0) -> Path:
    """Records of two random pictures; `taste` prefers the second one of every other record."""
    import numpy as np
    from PIL import Image

    from mmalign.media import Media
    from mmalign.preferences import Store
    from mmalign.records import Candidate, Record

    def picture(number: int) -> Media:
        coarse = np.random.default_rng([seed, number]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Media.from_image(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))

    def rows() -> Iterator[Record]:
        for index in range(records):
            scores = (0.0, 1.0) if index % 2 else (1.0, 0.5)
            candidates = tuple(
                Candidate(candidate_id=str(side), image=picture(2 * index + side), scores={"taste": scores[side]})
                for side in (0, 1)
            )
            prompt = f"a {('red', 'green', 'blue')[index % 3]} circle"
            yield Record(record_id=f"{index:02d}", prompt=prompt, candidates=candidates, split="train")

    Store.write(rows(), path)
    return path


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merged key by key; `adapter: None` and a method of another name replace theirs."""
    out = dict(base)
    for key, value in changes.items():
        whole = key == "method" and "name" in value
        nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping) and not whole
        out[key] = merged(out[key], value) if nested else value
    return out


class Tiny:
    """A folder with a pipeline and a store, and the recipes on them."""

    def __init__(self, folder: Path) -> None:
        import tiny_models

        self.folder = folder
        self.model = tiny_models.write(tiny_models.sd_pipeline(), folder / "model")
        self.store = write_store(folder / "store")

    def recipe(self, out: Path, **changes: Any) -> Path:
        """A recipe's file, training into `out`."""
        import yaml

        own = {"model": {"path": str(self.model)}, "data": {"path": str(self.store)}, "loop": {"output_dir": str(out)}}
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.parent / f"{out.name}.yaml"
        file.write_text(yaml.safe_dump(merged(merged(RECIPE, own), changes)))
        return file

    def train(self, out: Path, **changes: Any) -> int:
        """Train in this process."""
        from diffusion.train import main

        return main([str(self.recipe(out, **changes))])


def lines(run: Path) -> list[dict[str, Any]]:
    """The logged lines without what a clock or a machine decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def newest(run: Path) -> Path:
    from mmalign import checkpoint

    found = checkpoint.latest(run)
    assert found.path is not None and not found.warnings
    return found.path


def weights(run: Path) -> dict[str, Any]:
    """Every tensor of the newest checkpoint's models, by file and name."""
    from safetensors.torch import load_file

    path = newest(run)
    return {
        f"{file.relative_to(path)}:{name}": tensor
        for file in sorted(path.rglob("*.safetensors"))
        if file.name != "state.safetensors"
        for name, tensor in load_file(file).items()
    }


def contents(run: Path) -> dict[str, object]:
    """Every byte of the newest checkpoint but the manifest, which has a date: files, tensors one by one.

    Tensors one by one since safetensors writes the metadata of a file in any order.
    """
    from safetensors.torch import load_file

    path = newest(run)
    found: dict[str, object] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.suffix == ".safetensors":
            for key, tensor in load_file(file).items():
                found[f"{name}:{key}"] = (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        elif file.is_file() and file.name != "manifest.json":
            found[name] = file.read_bytes()
    return found


# ------------------------------------------------------------------------------------------------ as a script


def run_jobs(jobs: Sequence[Mapping[str, Any]], folder: Path, *, processes: int = 1) -> list[tuple[int, str | None]]:
    """Run jobs `{"recipe": file, "interrupt": ..., "rank": ...}`, each in a process of its own.

    Returns, for each, the exit code (-n: ended by signal n) and the newest checkpoint that it left.

    `interrupt` is [signal, "forward", n] (as the n-th forward of an update's loss begins, counted from 1) or
    [signal, "save", n] (when the n-th folder of weights is written but not its checkpoint).
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps(list(jobs)))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*launcher, str(Path(__file__)), str(file)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [(code, left) for code, left in json.loads(done.stdout.splitlines()[-1])]


def interrupt(package: str, number: int, where: str, count: int) -> None:
    """Make this process send itself a signal at a point of its training."""

    def counted(function: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        calls = 0

        def wrapper(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            result = function(*args, **named) if after else None
            if calls == count:
                os.kill(os.getpid(), number)
            return result if after else function(*args, **named)

        return wrapper

    if where == "save":
        if package == "evaluators":
            writing, name = importlib.import_module("evaluators.training.model").PreferenceModel, "save"
        else:
            writing, name = importlib.import_module(f"{package}.weights"), "save_weights"
        setattr(writing, name, counted(getattr(writing, name), after=True))
        return
    kinds: list[Any]
    if package == "evaluators":
        from evaluators.methods import pickscore

        kinds = [pickscore.PickScore]
    elif package == "diffusion":
        from diffusion import trajectories
        from diffusion.methods import dpo

        kinds = [dpo.DiffusionDPO, trajectories.TrajectoryMethod]
    else:
        from vlm.methods import povid

        kinds = [povid.POVID]
    for kind in kinds:
        kind.losses = counted(kind.losses, after=False)


def run_job(job: Mapping[str, Any]) -> int:
    from mmalign.cli import run_entry

    package = job.get("package", "diffusion")
    if job.get("interrupt") and str(job.get("rank", 0)) == os.environ.get("RANK", "0"):
        interrupt(package, *job["interrupt"])
    return run_entry(importlib.import_module(f"{package}.train").main, [job["recipe"]])


def forked(job: Mapping[str, Any]) -> int:
    """The exit code of a job in a forked process, -n if signal n ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run_job(job)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    import torch

    from mmalign import config

    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    package = jobs[0].get("package", "diffusion")
    recipes = importlib.import_module(f"{package}.recipe").TrainConfig
    importlib.import_module(f"{package}.train")  # once, before the forks
    together = "RANK" in os.environ
    if not together:  # and what the libraries import late
        module, opened = OPENERS[package]
        getattr(importlib.import_module(module), opened)(config.load(recipes, jobs[0]["recipe"]).model)
    results = []
    for job in jobs:
        code = run_job(job) if together else forked(job)
        left = sorted(path.name for path in config.load(recipes, job["recipe"]).loop.output_dir.glob("checkpoint-*"))
        results.append((code, left[-1] if left else None))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(results), flush=True)
    if together:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
