"""Many pairs of the zoo, in as many processes as there are processors, and the files that they leave."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from wavedistill.tools.errors import UserError
from wavedistill.tools.files import replacing, write_json
from wavedistill.tools.machine import machine
from wavedistill.tools.progress import progress
from wavedistill.zoo.families import FAMILIES
from wavedistill.zoo.fit import Pair, examine
from wavedistill.zoo.page import picture, render
from wavedistill.zoo.targets import TARGETS

COMMON = ("moons", "table")
"""Densities that every family learns, so that families compare."""


def chosen(families: Sequence[str], targets: Sequence[str], seed: int, steps: int, *, every: bool) -> list[Pair]:
    """The pairs that are asked for.

    Args:
        families: by name; all of them if none is named.
        targets: by name; if none is named, each family's own density and the common ones, or every one.
        seed: of all random numbers.
        steps: of each fit and each distillation.
        every: every density for every family.
    """
    return [
        Pair(name, target, seed, steps)
        for name, family in FAMILIES.items()
        if name in (families or FAMILIES)
        for target in TARGETS
        if target in (targets or (TARGETS if every else (family.own, *COMMON)))
    ]


def run(pairs: Sequence[Pair], folder: Path) -> str:
    """Examine pairs, and write `index.html` and `zoo.json` into a folder; if it is cut short, of those that are done.

    Returns:
        A line on what was done.

    Raises:
        UserError: if it is interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[tuple[str, str], dict[str, Any]] = {}
    pictures: dict[tuple[str, str], list[bytes]] = {}
    began = time.perf_counter()

    def write() -> None:
        found = [(done[pair[:2]], pictures[pair[:2]]) for pair in pairs if pair[:2] in done]
        about = {
            "machine": machine(torch.device("cpu")),
            "processes": workers,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": sum(figures["cpu_seconds"] for figures, _ in found),
            "seed": pairs[0].seed,
            "pairs": len(pairs),
        }
        write_json(folder / "zoo.json", {"about": about, "pairs": [figures for figures, _ in found]})
        with replacing(folder / "index.html") as file:
            file.write(render(about, found).encode())

    workers = min(os.cpu_count() or 1, len(pairs))
    # What takes longest begins first, so that no processor waits for another in the end.
    order = sorted(pairs, key=lambda pair: FAMILIES[pair.family].pace)
    try:
        with _pool(workers) as pool, progress(total=len(pairs), desc="zoo", unit="pair") as bar:
            for future in as_completed([pool.submit(examine, pair) for pair in order]):
                figures, shown = future.result()
                key = (figures["family"], figures["target"])
                done[key], pictures[key] = figures, [picture(points) for points in shown]
                bar.set_postfix_str(f"{FAMILIES[key[0]].title} on {key[1]}, KL {figures['kl']:.3f}")
                bar.update()
                if len(done) % 8 == 0:
                    write()
    except KeyboardInterrupt as interrupt:
        if done:
            write()
        raise UserError(
            f"interrupted: {len(done)} of {len(pairs)} pairs are done"
            + (f", and on {folder / 'index.html'}" if done else "")
        ) from interrupt
    write()
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    return f"{folder / 'index.html'}: {len(pairs)} pairs in {minutes}:{seconds:02d} minutes"


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each, which end with the block, also in the middle of their work."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _begin() -> None:
    """An interrupt is for the process that has the page to write; when that one ends, so does this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
