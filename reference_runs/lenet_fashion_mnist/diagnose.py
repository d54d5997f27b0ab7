"""Why RigL is not above SET at 98 %: how many connections and hidden units each of them uses.

    python -m reference_runs.lenet_fashion_mnist.diagnose --workers 2

Trains RigL and SET as `run.py` does, at other update intervals, drop fractions and lengths too, and
looks at the finished network. Finished runs are kept in diagnosis.jsonl.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import sparsetrain as st
from reference_runs import _common as common
from reference_runs.lenet_fashion_mnist.methods import STOP
from reference_runs.lenet_fashion_mnist.run import Settings, begin, data, steps_of

HERE = Path(__file__).parent
POLICIES: dict[str, type[st.RigL] | type[st.SET] | type[st.SNFS]] = {
    "rigl": st.RigL,
    "set": st.SET,
    "snfs": st.SNFS,
}


@dataclass(frozen=True)
class Case:
    """One way to train; the defaults are those of `run.py`."""

    method: str
    sparsity: float
    every: int = 100
    drop: float = 0.3
    epochs: int = 20
    stop: float = STOP

    def policy(self, steps: int) -> st.Policy:
        """The policy over so many steps."""
        return POLICIES[self.method](
            sparsity=self.sparsity,
            total_steps=steps,
            drop_fraction=st.Schedule(shape="cosine", initial=self.drop, final=0.0),
            update=st.UpdateSchedule(every=self.every, start=0, stop=self.stop),
        )


CASES = (
    *(Case(method, sparsity) for sparsity in (0.98, 0.99) for method in POLICIES),
    *(Case(method, 0.98, every=600) for method in ("rigl", "set")),
    Case("rigl", 0.98, drop=0.5),
    *(Case(method, 0.98, epochs=60) for method in ("rigl", "set")),
    # SNFS with the drop fraction of its paper, at our interval and at the paper's.
    *(Case("snfs", sparsity, drop=0.5) for sparsity in (0.98, 0.99)),
    *(Case("snfs", sparsity, every=600, drop=0.5, stop=1.0) for sparsity in (0.98, 0.99)),
)


def train(job: common.Record, report: common.Report) -> common.Record:
    """One run: test error, exploration rate, and units that have inputs and outputs."""
    case = Case(**job["case"])
    settings = Settings(epochs=case.epochs)
    steps = steps_of(settings)
    trainer = begin(settings, job["seed"], case.policy(steps))
    optimizer = trainer.optimizer
    assert isinstance(optimizer, st.SparseOptimizer)
    rates: list[float] = []
    optimizer.register_update_hook(lambda event: rates.append(event.exploration_rate))
    for record in trainer.run(steps):
        words = f"test {100 * record.test_accuracy:.1f} %"
        report(job["key"], record.epoch, settings.epochs, words)
    first, second = optimizer.masks()["fc1.weight"], optimizer.masks()["fc2.weight"]
    return {
        **job["case"],
        "seed": job["seed"],
        "test_error": 1 - trainer.history.accuracies[-1],
        "train_loss": trainer.history.last.loss,
        "exploration_rate": round(rates[-1], 4),
        "hidden_units": int((first.any(1) & second.any(0)).sum()),
        "pixels": int(first.any(0).sum()),
    }


def table(runs: list[common.Record]) -> str:
    """A row a case, means over the seeds."""
    rows = []
    for case in CASES:
        mine = [run for run in runs if asdict(case).items() <= run.items()]
        rows.append(
            [
                f"{case.method} {100 * case.sparsity:g} %, every {case.every} steps, "
                f"to {100 * case.stop:g} % of training, drop {100 * case.drop:g} %, "
                f"{case.epochs} epochs",
                f"{100 * common.mean([run['test_error'] for run in mine]):.2f}",
                f"{common.mean([run['train_loss'] for run in mine]):.3f}",
                f"{common.mean([run['exploration_rate'] for run in mine]):.2f}",
                f"{common.mean([run['hidden_units'] for run in mine]):.0f} of 300",
            ]
        )
    head = ["", "test error [%]", "training loss", "weights explored (R_s)", "hidden units used"]
    return common.markdown_table(head, rows)


def main() -> None:
    """Run what is missing, then write diagnosis.json and the table in the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    data()
    jobs = [
        {
            "key": f"{c.method}-{c.sparsity}-{c.every}-{c.drop}-{c.epochs}-{c.stop}-{seed}",
            "case": asdict(c),
            "seed": seed,
        }
        for seed in range(arguments.seeds)
        for c in CASES
    ]
    log = common.ResultLog(HERE / "diagnosis.jsonl")
    runs = common.run_jobs(jobs, train, log, workers=arguments.workers)
    common.write_json(HERE / "diagnosis.json", {"machine": common.machine(), "runs": runs})
    common.put_into(HERE / "README.md", table(runs), section="diagnosis")


if __name__ == "__main__":
    main()
