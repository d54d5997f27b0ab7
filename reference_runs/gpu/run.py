"""What sparse training costs and gains on a CUDA card: steps, mask updates, 2:4 products.

    python -m reference_runs.gpu.run
    python -m reference_runs.gpu.run --device cpu --tiny --out /tmp/tried    # tries the scripts out

from the repository's root, on a card that does nothing else. A run that was stopped goes on where
it was. See the README beside this file.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reference_runs import _common as common
from reference_runs.gpu import measures
from reference_runs.gpu.models import Workload, gpt2_source
from reference_runs.gpu.tables import tables
from reference_runs.gpu.training import OPTIMIZERS, PRECISIONS
from sparsetrain.cost.machine import Machine

HERE = Path(__file__).parent
Job = tuple[str, Callable[[], common.Record]]


def jobs(options: argparse.Namespace, device: torch.device) -> list[Job]:
    """Everything there is to measure, each under the key that it is kept by."""
    size = "tiny" if options.tiny else "full"
    resnet = Workload("resnet50", size, options.resnet_batch)
    gpt2 = Workload("gpt2", size, options.gpt2_batch, gpt2_source(options.gpt2))
    found: list[Job] = []

    def add(section: str, work: Callable[..., common.Record], **about: Any) -> None:
        kept = {"section": section} | {k: _plain(v) for k, v in about.items()}
        key = " ".join(str(value) for value in kept.values())
        found.append((key, lambda: {**kept, **work(*about.values(), device, options)}))

    for workload in (resnet, gpt2):
        for optimizer in OPTIMIZERS:
            for precision in PRECISIONS:
                add(
                    "steps",
                    measures.steps,
                    workload=workload,
                    optimizer=optimizer,
                    precision=precision,
                )
        optimizer = "SGD" if workload is resnet else "AdamW"
        for policy in measures.POLICIES:
            add("updates", measures.updates, workload=workload, optimizer=optimizer, policy=policy)
    for dtype in measures.DTYPES:
        add("2:4", _two_of_four, size=size, dtype=dtype, tokens=options.tokens)
    return [job for job in found if options.only is None or job[0].startswith(options.only)]


def _plain(value: Any) -> Any:
    if not isinstance(value, Workload):
        return value
    origin = f", {value.source}" if value.network == "gpt2" else ""
    return f"{value.network} ({value.size}{origin}, batch {value.batch_size})"


def _two_of_four(
    size: str, dtype: str, tokens: int, device: torch.device, options: argparse.Namespace
) -> common.Record:
    if device.type != "cuda":
        return {"skipped": "2:4 products need a CUDA GPU"}
    return measures.two_of_four(size, dtype, tokens, device, options)


def about(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on; the part that has to be the same when a run goes on."""
    return {
        "device": Machine.here(device).device,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "matmul_in_tf32": torch.backends.cuda.matmul.allow_tf32,
        "convolutions_in_tf32": torch.backends.cudnn.allow_tf32,
    }


def measure(found: Sequence[Job], log: common.ResultLog, device: torch.device) -> list[str]:
    """Do the jobs that the log does not have; returns the keys of those that failed.

    Raises:
        SystemExit: the log is of another device or torch.
    """
    here = about(device)
    for record in log.read():
        if record["on"] != here:
            raise SystemExit(
                f"{log.path} was measured on {record['on']}, this is {here}: move it away, or give "
                "another folder with --out"
            )
    finished = {record["key"] for record in log.read()}
    failed = []
    for key, work in found:
        if key in finished:
            continue
        try:
            result = work()
        except Exception as error:
            failed.append(f"{key}: {type(error).__name__}: {error}")
            common.console.print(f"{failed[-1]}", style="red", markup=False)
        else:
            date = datetime.now(UTC).isoformat(timespec="seconds")
            log.append({"key": key, "date": date, "on": here, **result})
            common.console.print(f"{key}: done", markup=False)
        if device.type == "cuda":  # the next network has the card to itself
            gc.collect()
            torch.cuda.empty_cache()
    return failed


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: what it asks for cannot be measured, or must not go where results are kept.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the scripts")
    parser.add_argument("--only", choices=["steps", "updates", "2:4"])
    parser.add_argument("--resnet-batch", type=int, help="images in a batch")
    parser.add_argument("--gpt2-batch", type=int, help="sequences in a batch")
    parser.add_argument("--tokens", type=int, help="rows of the input of 2:4 products")
    parser.add_argument("--gpt2", choices=["auto", "transformers", "own"], default="auto")
    parser.add_argument("--rounds", type=int, help="of which medians are taken")
    parser.add_argument("--calls", type=int, help="steps of a round")
    parser.add_argument("--warm-up", type=int, help="rounds that do not count")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    options = parser.parse_args(arguments)
    full = {
        "resnet_batch": 128,
        "gpt2_batch": 8,
        "tokens": 8192,
        "rounds": 21,
        "calls": 5,
        "warm_up": 10,
    }
    tiny = {
        "resnet_batch": 2,
        "gpt2_batch": 2,
        "tokens": 64,
        "rounds": 3,
        "calls": 1,
        "warm_up": 1,
    }
    for name, value in (tiny if options.tiny else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.rounds - 1, options.calls, options.warm_up) < 1:
        parser.error("--rounds must be at least 2, --calls and --warm-up at least 1")
    is_real = torch.device(options.device).type == "cuda" and not options.tiny
    if not is_real and options.out.resolve() == HERE.resolve():
        parser.error("only full runs on a CUDA card are kept here: give a folder with --out")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "torch finds no CUDA card, so nothing was measured; "
            "--device cpu --tiny --out FOLDER tries the scripts out"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write results.json and the tables in the README."""
    options = options_of(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    else:  # tiny networks gain nothing from more
        torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    log = common.ResultLog(options.out / "results.jsonl")
    failed = measure(jobs(options, device), log, device)
    records = log.read()
    results = {
        "machine": common.machine() | about(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "effort": {name: getattr(options, name) for name in ("rounds", "calls", "warm_up")},
        "failed": failed,
        "runs": records,
    }
    common.write_json(options.out / "results.json", results)
    text = tables(results)
    common.console.print(text, soft_wrap=True, markup=False)
    if options.out.resolve() == HERE.resolve():
        common.put_into(HERE / "README.md", text)
    if failed:
        raise SystemExit(f"{len(failed)} of the measurements failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
