"""What a checkpoint costs: to save, to load, and to the training that goes on meanwhile.

    python benchmarks/saving.py files [--megabytes 100] [--rounds 9] [--dir .]
    python benchmarks/saving.py runs [--width 1024] [--steps 60] [--every 10] [--rounds 5] [--dir .]

``files`` saves and loads one state by everything at hand, in turns in one process, after every way has been seen to
give back the same bits: trainfn (files and directories fsynced, every byte hashed), ``torch.save`` and plain
safetensors (no fsync; and with one of file and directory), and ``torch.distributed.checkpoint`` with ``sync_files`` and
without. ``stall`` is how long the training waits where the save goes on beside it, next to a plain copy of the same
bytes. Bytes are written over files that are gone: each save is a first one, as checkpoints are.

``runs`` trains with checkpoints before and beside the training, and with none, after the last states have been found
bitwise equal: what the steps lose to the writing is in it, too. Both write a dated file into ``results``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from harness import record
from torch import Tensor, nn

import trainfn
from trainfn.store import Saver
from trainfn.tree import digest, named_leaves

Tensors = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["files", "runs"])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dir", default=None, help="where to write: its file system decides")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    (files if args.what == "files" else runs)(args)


def in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, Any]]:
    """Return median and quartiles of what each way says that it took, in ms; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            seconds = way()
            if number:
                found[name].append(1e3 * seconds)
    rows = []
    for name, times in found.items():
        low, middle, high = statistics.quantiles(times, n=4)
        rows.append({"way": name, "ms": round(middle, 1), "quartiles": [round(low, 1), round(high, 1)]})
    return rows


def took(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def synced(path: Path) -> None:
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def files(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    side = int((args.megabytes * 1e6 / 4 / 3 / 8) ** 0.5)  # eight matrices, and two moments of each
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(8)))
    state = trainfn.init(model, trainfn.optim.adamw(lr=0.1))
    plain: Tensors = {name: leaf.detach() for name, leaf in named_leaves(state) if isinstance(leaf, Tensor)}
    whole = digest(dict(sorted(plain.items())))
    size = sum(leaf.numel() * leaf.element_size() for leaf in plain.values())
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        saves, loads = peers(Path(folder), state, plain)
        for name, save in saves.items():
            save()
            assert digest(dict(sorted(loads[name]().items()))) == whole, name
        rows = [{"what": "save"} | row for row in in_turns({n: anew(folder, s) for n, s in saves.items()}, args.rounds)]
        for save in saves.values():
            save()
        rows += [{"what": "load"} | row for row in in_turns(timings(loads), args.rounds)]
        rows += [{"what": "stall"} | row for row in in_turns(stalls(Path(folder), state, plain), args.rounds)]
    record("saving", rows, megabytes=round(size / 1e6, 1), tensors=len(plain))


def peers(folder: Path, state: trainfn.TrainState, plain: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what saves into the folder, and what loads it again as tensors by name."""
    torch_path, safe_path = folder / "state.pt", folder / "state.safetensors"

    def saved_by_dcp(name: str, sync: bool) -> None:
        writer = dcp.FileSystemWriter(folder / name, sync_files=sync)
        dcp.save(dict(plain), storage_writer=writer, no_dist=True)

    def loaded_by_dcp(name: str) -> Tensors:
        into = {key: torch.empty_like(leaf) for key, leaf in plain.items()}
        dcp.load(into, checkpoint_id=folder / name, no_dist=True)
        return into

    def loaded_by_us() -> Tensors:
        loaded = named_leaves(trainfn.load(folder / "run", like=state))
        return {name: leaf.detach() for name, leaf in loaded if isinstance(leaf, Tensor)}

    def by_torch() -> None:
        torch.save(plain, torch_path)

    def by_safetensors() -> None:
        safetensors.torch.save_file(plain, safe_path)

    saves = {
        "trainfn: fsync, SHA-256": lambda: trainfn.save(state, folder / "run"),
        "torch.save": by_torch,
        "torch.save, then fsync": lambda: (by_torch(), synced(torch_path)),
        "safetensors.save_file": by_safetensors,
        "safetensors.save_file, then fsync": lambda: (by_safetensors(), synced(safe_path)),
        "DCP: fsync": lambda: saved_by_dcp("dcp", True),
        "DCP, sync_files=False": lambda: saved_by_dcp("dcp", False),
    }
    loads = {
        "trainfn: fsync, SHA-256": loaded_by_us,
        "torch.save": lambda: torch.load(torch_path, weights_only=True),
        "torch.save, then fsync": lambda: torch.load(torch_path, weights_only=True),
        "safetensors.save_file": lambda: {n: t.clone() for n, t in safetensors.torch.load_file(safe_path).items()},
        "safetensors.save_file, then fsync": lambda: safetensors.torch.load(safe_path.read_bytes()),
        "DCP: fsync": lambda: loaded_by_dcp("dcp"),
        "DCP, sync_files=False": lambda: loaded_by_dcp("dcp"),
    }
    return saves, loads


def anew(folder: str, save: Callable[[], Any]) -> Callable[[], float]:
    """Return a timing of a save into an empty folder; what was there is removed outside of it."""

    def timing() -> float:
        for path in Path(folder).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()
        return took(save)

    return timing


def timings(loads: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], float]]:
    names = {
        "trainfn: fsync, SHA-256": "trainfn: verified", "torch.save": "torch.load",
        "safetensors.save_file": "safetensors.load_file, copied out of the map",
        "safetensors.save_file, then fsync": "safetensors.load of the bytes", "DCP: fsync": "DCP",
    }  # fmt: skip
    return {names[name]: lambda load=load: took(load) for name, load in loads.items() if name in names}


def stalls(folder: Path, state: trainfn.TrainState, plain: Tensors) -> dict[str, Callable[[], float]]:
    """Return how long the training thread waits for a save beside it, and for what it cannot do without: a copy."""

    def beside() -> float:
        shutil.rmtree(folder / "beside", ignore_errors=True)
        with Saver(folder / "beside") as saver:
            return took(lambda: saver.save(state))

    return {
        "a copy of the same bytes": lambda: took(lambda: {name: leaf.clone() for name, leaf in plain.items()}),
        "trainfn, save_async=True": beside,
        "trainfn, save_async=False": lambda: took(lambda: trainfn.save(state, folder / f"run{time.time_ns()}")),
    }


def runs(args: argparse.Namespace) -> None:
    x, y = torch.randn(512, args.width), torch.randint(0, 10, (512,))
    torch.manual_seed(0)
    hidden = [part for _ in range(4) for part in (nn.Linear(args.width, args.width), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(args.width, 10))

    def once(way: str) -> tuple[float, str]:
        with tempfile.TemporaryDirectory(dir=args.dir) as run:
            settings = (
                {} if way == "none" else {"out_dir": run, "save_every": args.every, "save_async": way == "beside"}
            )
            result = trainfn.fit(
                model, (x, y), loss="classification", lr=1e-4, batch_size=64, max_steps=args.steps, compile="eager",
                progress=False, health_every=None, **settings,
            )  # fmt: skip
            return result.seconds, digest(result.state)

    ways = ("none", "before", "beside")
    assert len({once(way)[1] for way in ways}) == 1
    rows = in_turns({way: lambda way=way: once(way)[0] for way in ways}, args.rounds)
    parameters = sum(param.numel() for param in model.parameters())
    record("saving-runs", rows, parameters=parameters, saves=args.steps // args.every, steps=args.steps)


if __name__ == "__main__":
    main()
