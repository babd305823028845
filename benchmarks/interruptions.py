"""Runs that are interrupted at random moments and resumed, and pairs of runs that start in one folder.

    python -m benchmarks.interruptions --out results/safety/interruptions.json

A small teacher is distilled on the embedded images by `cgspn distill`, in processes forked from one that has imported
the package. At a random moment the run, one of its workers or one of its two processes is killed. The same command is
then repeated until it finishes. The student must be bitwise equal to that of an uninterrupted run. If two runs start in
one folder within a second, one of them must be rejected.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image

from cgspn import cli
from cgspn.commands import distill  # noqa: F401 - so that its processes need not import it again
from cgspn.data import load_embedded
from cgspn.environment import describe

STAGES = [f"--config.{stage}.{name}={value}" for stage, steps in (("stage1", 9), ("stage2", 6))
          for name, value in (("steps", steps), ("batch-size", 8))]  # fmt: skip
STAGES += ["--config.compute.save-every=2", "--no-report", "--device=cpu"]
PATIENCE = 120.0  # seconds, after which a run counts as hanging
ENDS = {"kill": signal.SIGKILL, "SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
KINDS = (*ENDS, "dead worker", "dead rank")


def _work(arguments: list[str], log: Path, environ: dict[str, str]) -> None:
    """The main function of a process: run the command, with its output in a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environ)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["cgspn", *arguments]
    cli.main()


def start(arguments: list[str], log: Path, ranks: int = 1) -> list[BaseProcess]:
    """Start the processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[BaseProcess] = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environ = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        process = multiprocessing.get_context("fork").Process(
            target=_work, args=(arguments, log, environ if ranks > 1 else {})
        )
        process.start()
        started.append(process)
    return started


def finish(processes: list[BaseProcess]) -> list[int | None]:
    """Wait for exit codes. If a process fails, the others are terminated, as by torchrun. None for a run that hangs."""
    limit = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and time.monotonic() < limit:
        if any(process.exitcode for process in processes):
            time.sleep(1)
            break
        time.sleep(0.05)
    hung = [process.is_alive() and not any(p.exitcode for p in processes) for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return [None if late else process.exitcode for late, process in zip(hung, processes, strict=True)]


def digest(out: Path) -> str:
    """A hash of the student's weights and config."""
    return hashlib.sha256((out / "model.safetensors").read_bytes() + (out / "config.json").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Study:
    """A working folder with photographs."""

    root: Path

    def arguments(self, kind: str, out: Path, seed: int = 0) -> list[str]:
        """The command that is run for a kind of interruption."""
        data = ["--data", str(self.root / "photos"), "--loader.workers", "2"] if kind == "dead worker" else []
        return ["distill", "embedded", str(out), *STAGES, "--config.stage1.seed", str(seed), *data]

    def reference(self, kind: str, seed: int = 0) -> tuple[str, float]:
        """The hash of the student of an uninterrupted run, and the seconds that the run took."""
        out = self.root / f"reference {kind} {seed}"
        began = time.monotonic()
        codes = finish(start(self.arguments(kind, out, seed), self.root / "log", 2 if kind == "dead rank" else 1))
        if any(codes):
            raise RuntimeError(f"the reference ended with {codes}: {(self.root / 'log').read_text()[-2000:]}")
        return digest(out), time.monotonic() - began

    def interrupted(self, kind: str, number: int, wanted: str, seconds: float) -> dict[str, Any]:
        """Interrupt one run at a random moment, and resume it."""
        rng = random.Random(f"{kind} {number}")
        out, log = self.root / f"{kind} {number}", self.root / f"{kind} {number}.log"
        for attempt in range(10):
            shutil.rmtree(out, ignore_errors=True)
            moment = rng.uniform(0.05, 0.95) * seconds * 0.9**attempt
            running = start(self.arguments(kind, out), log, 2 if kind == "dead rank" else 1)
            time.sleep(moment)
            victim = self.victim(kind, rng, running)
            steps = sorted(f"{path.parent.name}/{path.name}" for path in (out / "snapshots").glob("*/0*"))
            with suppress(ProcessLookupError):
                if victim:
                    os.kill(victim, ENDS.get(kind, signal.SIGKILL))
                    break
            finish(running)  # it was faster than the one before
        codes = [finish(running)]
        while any(codes[-1]) and len(codes) < 3:
            codes.append(finish(start(self.arguments(kind, out), log, len(running))))
        same = not any(codes[-1]) and digest(out) == wanted
        shutil.rmtree(out, ignore_errors=True)
        found = {"kind": kind, "second": round(moment, 2), "snapshots": steps, "exit codes": codes, "same": same}
        return found | ({} if same else {"said": log.read_text()[-1500:]})

    def victim(self, kind: str, rng: random.Random, running: list[BaseProcess]) -> int:
        """The process to kill; 0 if the run has finished."""
        chosen = rng.choice(running)
        while chosen.is_alive():
            if kind != "dead worker":
                return chosen.pid or 0
            workers = Path(f"/proc/{chosen.pid}/task/{chosen.pid}/children").read_text().split()
            if workers:
                return int(rng.choice(workers))
            time.sleep(0.02)
        return 0

    def double(self, number: int, wanted: dict[int, str]) -> dict[str, Any]:
        """Start two runs with different settings in one folder within a second."""
        rng = random.Random(number)
        out, logs = self.root / f"double {number}", [self.root / f"double {number} {seed}.log" for seed in wanted]
        runs = []
        for seed, log in zip(wanted, logs, strict=True):
            runs.append(start(self.arguments("kill", out, seed), log))
            time.sleep(rng.uniform(0, 1) if seed == 0 else 0)
        codes = [finish(run)[0] for run in runs]
        refused = [log.read_text() for log, code in zip(logs, codes, strict=True) if code == 2]
        named = len(refused) == 1 and "which another run is using: " in refused[0]
        winner = codes.index(0) if 0 in codes else None
        same = winner is not None and digest(out) == wanted[winner]
        shutil.rmtree(out, ignore_errors=True)
        found = {"exit codes": codes, "refused and named": named, "same": same}
        return found if named and same else found | {"said": [log.read_text()[-800:] for log in logs]}


def main(each: int = 8, doubles: int = 20, out: Path = Path("results/safety/interruptions.json")) -> None:
    """Interrupt `each` runs of every kind, and start `doubles` pairs of runs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder))
        (study.root / "photos").mkdir()
        for number, image in enumerate(load_embedded("train").images[:64]):
            Image.fromarray(image[0].numpy()).save(study.root / "photos" / f"{number}.png")
        runs, pairs, students = [], [], {1: study.reference("kill", 1)[0]}
        for kind in KINDS:
            wanted, seconds = study.reference(kind)
            students |= {0: wanted} if kind == "kill" else {}
            for number in range(each):
                runs.append(study.interrupted(kind, number, wanted, seconds))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        for number in range(doubles):
            pairs.append(study.double(number, dict(sorted(students.items()))))
            print(json.dumps(pairs[-1]), file=sys.stderr, flush=True)
    record = {
        "machine": describe(program="python -m benchmarks.interruptions"),
        "interrupted": dict(Counter(run["kind"] for run in runs)),
        "bitwise the uninterrupted student": dict(Counter(run["kind"] for run in runs if run["same"])),
        "second run refused and named, first one's student whole": sum(
            p["refused and named"] and p["same"] for p in pairs
        ),
        "runs": runs,
        "pairs": pairs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name not in ("runs", "pairs")}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
