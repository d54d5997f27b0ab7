"""What the reference runs share: resumable jobs, records of the machine, tables, plot style."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsetrain.cost.machine import processor_name
from sparsetrain.keeping import append_line, read_lines, whole_file
from sparsetrain.workbench.environment import environment

Record = dict[str, Any]
#: A worker's way to say how far it is: (job key, steps done, steps in all, a few words).
Report = Callable[[str, int, int, str], None]

console = Console()


# Jobs: one JSON line a finished run, so that a run that was killed costs one run at most.


class ResultLog:
    """Finished runs in a JSON-lines file; each record carries the `key` of its job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """All whole records; a last line that was cut short is left out."""
        return list({record["key"]: record for record in read_lines(self.path)}.values())

    def append(self, record: Record) -> None:
        """Write one record and wait until it is on disk."""
        append_line(self.path, record)


_messages: Any = None


def _begin_worker(messages: Any) -> None:
    global _messages
    _messages = messages
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # Momenta of dead units decay into denormal numbers, on which a CPU is many times slower.
    torch.set_flush_denormal(True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would go on for nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _send(key: str, done: int, total: int, words: str) -> None:
    _messages.put((key, done, total, words))


def _call(work: Callable[[Record, Report], Record], job: Record) -> Record:
    started = time.perf_counter()
    record = work(job, _send)
    wall = time.perf_counter() - started
    return {"key": job["key"], **record, "wall_seconds": round(wall, 2)}


def run_jobs(
    jobs: Sequence[Record],
    work: Callable[[Record, Report], Record],
    log: ResultLog,
    *,
    workers: int,
) -> list[Record]:
    """Run the jobs that `log` does not have yet, `workers` processes of one thread each.

    `work(job, report)` must be a module's function and returns the result as plain data. Returns
    the records of all `jobs`, in their order. A job that fails is named and the others go on.

    Raises:
        SystemExit: after everything else is done, when a job failed.
    """
    finished = {record["key"] for record in log.read()}
    waiting = [job for job in jobs if job["key"] not in finished]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them finished before")
    failed: list[str] = []
    if waiting:
        context = multiprocessing.get_context("spawn")
        messages = context.Queue()
        with (
            ProcessPoolExecutor(workers, context, _begin_worker, (messages,)) as pool,
            _progress() as bars,
        ):
            futures = {pool.submit(_call, work, job): job["key"] for job in waiting}
            failed = _follow(futures, messages, log, bars)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}")
    records = {record["key"]: record for record in log.read()}
    return [records[job["key"]] for job in jobs]


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def _follow(
    futures: dict[Future[Record], str], messages: Any, log: ResultLog, bars: Progress
) -> list[str]:
    """Show the progress of all runs and write down each result as it comes."""
    overall = bars.add_task("all runs", total=len(futures))
    tasks: dict[str, Any] = {}
    failed, pending, started = [], set(futures), time.perf_counter()
    while pending:
        done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        for key, steps, total, words in _drain(messages):
            if key not in tasks:
                tasks[key] = bars.add_task(key, total=total)
            bars.update(tasks[key], completed=steps, description=f"{key}  {words}")
        for future in done:
            key = futures[future]
            if key in tasks:
                bars.remove_task(tasks.pop(key))
            error = future.exception()
            if error is None:
                record = future.result()
                log.append(record)
                bars.console.print(f"{_clock(started)}  {key}: {record['wall_seconds']:.0f} s")
            else:
                failed.append(key)
                bars.console.print(f"{_clock(started)}  {key} failed: {error!r}", style="red")
            bars.advance(overall)
    return failed


def _drain(messages: Any) -> Iterable[tuple[str, int, int, str]]:
    while True:
        try:
            yield messages.get_nowait()
        except queue.Empty:
            return


def _clock(started: float) -> str:
    minutes, seconds = divmod(int(time.perf_counter() - started), 60)
    return f"{minutes:3d}:{seconds:02d}"


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write a model's state dict, whole or not at all."""
    with whole_file(path) as partial:
        torch.save(model.state_dict(), partial)


# A study: jobs in stages, then results.json and the tables in the README of its folder.


#: Jobs for some networks and a number of seeds, and what does one of them.
Stage = tuple[Callable[[Sequence[str], int], list[Record]], Callable[[Record, Report], Record]]


def run_study(
    doc: str | None,
    folder: Path,
    stages: Sequence[Stage],
    summarise: Callable[[Sequence[Record]], list[Record]],
    tables: Callable[[list[Record]], str],
    *,
    begin: Callable[[], Any],
    networks: Iterable[str] = (),
) -> None:
    """Read the command line, run what is missing, then write results.json and the tables.

    Args:
        doc: docstring of the script; its first line is the help.
        stages: done one after the other.
        begin: called first, so that a missing data set is told once.
        networks: that can be chosen.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    if networks:
        parser.add_argument("--networks", nargs="+", default=[*networks], choices=[*networks])
    parser.add_argument("--only-write", action="store_true", help="tables of the finished runs")
    arguments = parser.parse_args()
    log = ResultLog(folder / "results.jsonl")
    if not arguments.only_write:
        begin()
        for jobs, work in stages:
            chosen = jobs(getattr(arguments, "networks", ()), arguments.seeds)
            run_jobs(chosen, work, log, workers=arguments.workers)
    runs = log.read()  # those of earlier calls too, which may have had other networks or seeds
    rows = summarise(runs)
    write_json(folder / "results.json", {"machine": machine(), "table": rows, "runs": runs})
    put_into(folder / "README.md", tables(rows))


# What the results depend on.


def machine() -> dict[str, Any]:
    """Versions and the kind of machine: what a time or a last digit depends on."""
    return {**environment(), "cpu": processor_name(), "logical_cores": os.cpu_count()}


# Results and tables.


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over all values (divided by n, as the published table has it)."""
    return statistics.pstdev(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean (0 for a single value)."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def advantage(pairs: Sequence[float]) -> dict[str, Any]:
    """Mean and standard error of differences that are paired by seed."""
    return {
        "advantage": round(mean(pairs), 3),
        "standard_error": round(standard_error(pairs), 3),
        "seeds": len(pairs),
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write readable JSON: one line a leaf list, so that curves do not fill the screen."""
    path.write_text(_to_json(value) + "\n", encoding="utf-8")
    console.print(f"wrote {path}")


def _to_json(value: Any, indent: int = 0) -> str:
    pad = " " * (indent + 1)
    if isinstance(value, Mapping) and value:
        items = [f"{pad}{json.dumps(str(k))}: {_to_json(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        items = [pad + _to_json(entry, indent + 1) for entry in value]
        return "[\n" + ",\n".join(items) + "\n" + " " * indent + "]"
    return json.dumps(value)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A GitHub-flavoured table; the first column is left-aligned, the others right-aligned."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join([":--"] + ["--:"] * (len(header) - 1)) + "|")
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def put_into(readme: Path, text: str, *, section: str = "results") -> None:
    """Replace what a README says between its `<!-- section -->` and `<!-- /section -->` marks.

    Raises ValueError when the file does not have the two marks.
    """
    content = readme.read_text(encoding="utf-8")
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    head, found, rest = content.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{readme.name} needs the marks {begin} and {end}: put them back")
    readme.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")
    console.print(f"wrote the table into {readme}")
