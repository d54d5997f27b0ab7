"""The scripts of the pages, under torchrun with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOPS = Path(__file__).resolve().parents[2] / "docs" / "loops"


@pytest.mark.parametrize("page", ["ddp", "fsdp2"])
def test_the_script_runs_under_torchrun(tmp_path: Path, page: str) -> None:
    text = (LOOPS / f"{page}.md").read_text(encoding="utf-8")
    script = text.split("```python\n", 1)[1].split("```", 1)[0]
    # gloo's threads may abort while the interpreter exits, so the end of the script is what counts.
    script += '\nprint("reached the end", flush=True)\n'
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.count("reached the end") == 2, done.stderr[-3000:]
