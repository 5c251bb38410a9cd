"""What SLURM's queue says of jobs that do not start; Snakemake asks it only which have ended."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from time import sleep

IN_TURN = ("None", "Priority", "Resources")  # reasons that pass without anybody doing anything


def tell_waiting(root: Path, tell: Callable[[str], object], every_s: float = 30.0) -> None:
    """Say of each job of this checkout that waits for more than its turn why it does, once.

    It goes on as long as the process, unless there is no SLURM here.
    """
    told: set[str] = set()
    while (lines := waiting(root)) is not None:
        for line in lines:
            if line not in told:
                tell(line)
                told.add(line)
        sleep(every_s)


def waiting(root: Path) -> list[str] | None:
    """Return a sentence for each job submitted in `root` that waits for more than its turn.

    None means that there is no SLURM here.
    """
    command = ["squeue", "--me", "--states=PENDING", "--noheader", "--format=%i|%r|%C|%m|%P|%Z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:  # a busy controller; Snakemake asks it again too
        return []
    found = []
    for line in done.stdout.splitlines():
        number, reason, cores, memory, partition, folder = line.split("|", 5)
        if Path(folder) == root and reason not in IN_TURN:
            found.append(
                f"SLURM job {number} (cores: {cores}, memory: {memory}, partition {partition}) "
                f"waits, and not for its turn: the queue says {reason}"
            )
    return found
