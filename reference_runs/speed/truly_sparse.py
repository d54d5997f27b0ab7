"""Training and inference by non-zeros against dense: time, memory, kernels, and where it pays.

    python -m reference_runs.speed.truly_sparse                    # everything, half an hour
    python -m reference_runs.speed.truly_sparse --only steps --resume
    python -m reference_runs.speed.truly_sparse --quick            # does it run? no numbers to keep

from the repository's root, on a machine that does nothing else. See the README beside this file.
The wide networks of section "scale" have a script of their own, `scale.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path

import torch

from reference_runs import _common as common
from reference_runs.speed import scale_results
from reference_runs.speed.sections import (
    causes,
    inference,
    kernels,
    layers,
    memory,
    peer_size,
    rigl,
    steps,
)
from reference_runs.speed.sections.base import THREADS, Effort, Record, Section
from sparsetrain.keeping import whole_file

HERE = Path(__file__).parent
#: What `--quick` writes is nothing to keep; git ignores the folder.
QUICK = HERE / "checkpoints" / "quick"
NAME = "truly_sparse.json"
#: What threads do while they wait, and how memory is had.
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_")
SECTIONS: dict[str, Section] = {
    "steps": steps.SECTION,
    "rigl": rigl.SECTION,
    "inference": inference.SECTION,
    "kernels": kernels.SECTION,
    "memory": memory.SECTION,
    "peer_size": peer_size.SECTION,
    "layers": layers.SECTION,
    "causes": causes.SECTION,
}


def measure(name: str, results: Record, path: Path, effort: Effort, *, resume: bool) -> None:
    """Measure the cases of a section, and write each as it comes.

    Args:
        resume: keep the cases that the file has; else the section begins anew.
    """
    section = SECTIONS[name]
    before: list[Record] = results.get(name, []) if resume else []
    rows: list[Record] = []
    wanted = section.cases(effort.quick)
    for number, case in enumerate(wanted, start=1):
        row = next((row for row in before if case.items() <= row.items()), None)
        if row is None:
            row = {**case, **section.measure(case, effort)}
            common.console.print(f"{name} {number}/{len(wanted)}", _short(row), soft_wrap=True)
            gc.collect()
        rows.append(row)
        results[name] = rows
        results["machine"] = machine()
        write(path, results)


def _short(row: Record) -> str:
    return json.dumps(row)[1:-1].replace('"', "")


def machine() -> Record:
    """As for the other benchmarks, with numba's version and the settings that were not default."""
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return common.machine() | {"numba": _numba_version(), "environment": settings}


def _numba_version() -> str:
    try:
        import numba
    except ImportError:
        return "not installed"
    version: str = numba.__version__
    return version


def read(path: Path) -> Record:
    """What was measured before, or nothing."""
    results: Record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def write(path: Path, results: Record) -> None:
    """JSON with one line a row, written whole or not at all."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    with whole_file(path) as partial:
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def tables(results: Record) -> str:
    """Everything measured, as Markdown."""
    parts = [s.table(results[name]) for name, s in SECTIONS.items() if results.get(name)]
    return "\n\n".join([*parts, *scale_results.tables(results)])


def publish(results: Record) -> None:
    """Put the tables into the README."""
    common.put_into(HERE / "README.md", tables(results), section="truly sparse")


def prepare() -> None:
    """Threads, and how numbers too small for the normal range are treated, for all contenders."""
    # Before the first thread starts, because threads inherit it. Momenta of dead units decay into
    # denormal numbers, on which a CPU is many times slower.
    torch.set_flush_denormal(True)
    torch.set_num_threads(THREADS)


def main() -> None:
    """Measure, then write truly_sparse.json and the tables in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=list(SECTIONS), action="append")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, no README")
    parser.add_argument("--resume", action="store_true", help="keep cases measured before")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.4, help="of a round, for each contender")
    parser.add_argument("--out", type=Path, help="folder of the results, instead of this one")
    arguments = parser.parse_args()
    effort = Effort(arguments.rounds, arguments.seconds)
    if arguments.quick:
        effort = Effort(3, 0.02, quick=True)
    folder = arguments.out or (QUICK if arguments.quick else HERE)
    results = read(folder / NAME)
    prepare()
    for name in [] if arguments.tables else arguments.only or list(SECTIONS):
        measure(name, results, folder / NAME, effort, resume=arguments.resume)
    common.console.print(tables(results), soft_wrap=True, markup=False)
    if folder == HERE:
        publish(results)


if __name__ == "__main__":
    main()
