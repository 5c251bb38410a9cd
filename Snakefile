# The graph: classifiers → notebooks → comparison with the recorded values → site.
#
#   snakemake --cores 2                              every notebook of preset quick, and the comparison
#   snakemake --cores 2 --config preset=smoke        another preset
#   snakemake --profile profiles/slurm               on a cluster; profiles/kubernetes likewise
#
# `dsv reproduce` and `make figures` use this file. A notebook's output is a file whose name is the
# digest of all that makes its numbers (companion/workflow.py says of what): it runs where that file
# is missing. Figures and records are no outputs in Snakemake's sense, since it deletes outputs before
# a rule runs and after it failed, and what was published earlier has to stay whole.

import os
import re
import shlex
import sys
from pathlib import Path
from threading import Thread

from companion.presets import plan
from companion.runs import own_root, repository_root
from companion.slurm import tell_waiting
from companion.workflow import done, finish, forget
from dsvlib._files import checkpoints_folder

PRESET = config.get("preset", "quick")
OPTIONS = {key: str(config[key]) for key in ("device", "data_root") if config.get(key)}
OWN = os.path.relpath(own_root() / PRESET, repository_root())
PLAN = plan(PRESET, **OPTIONS)
JOBS = {os.path.relpath(done(job), repository_root()): job for job in PLAN}
# The first process says what has to run; copies of this file on a cluster's nodes only follow.
if not config.get("forgotten") and not workflow.remote_exec:
    forget(PLAN)


# On a cluster, a job that cannot start would be waited for in silence.
onstart:
    if workflow.non_local_exec:
        Thread(target=tell_waiting, args=(Path.cwd(), logger.warning), daemon=True).start()


# Those of the bundled digits can be trained anew without a download, should they be missing.
TRAINED = ("digits-convnet", "digits-convnet-shuffled", "digits-judge")
CHECKPOINTS = [checkpoints_folder() / f"{name}.safetensors" for name in TRAINED]
CHECKPOINTS = {os.path.relpath(path, repository_root()) for path in CHECKPOINTS}
DSV = f"{shlex.quote(sys.executable)} -m companion.cli"


def words(output):
    """Return the words of `dsv notebooks run` that make an output."""
    job = JOBS[output]
    seed = [] if job.repetition is None else [f"--seed={job.repetition}"]
    options = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
    return shlex.join([job.notebook, f"--preset={PRESET}", *seed, *options])


rule comparison:
    input:
        list(JOBS),
    output:
        f"{OWN}/README.md",
    localrule: True
    run:
        finish(PRESET, PLAN)


rule notebook:
    input:
        [path for path in sorted(CHECKPOINTS) if not os.path.exists(path)],
    output:
        "{done}",
    wildcard_constraints:
        done="|".join(map(re.escape, JOBS)),
    params:
        words=lambda wildcards, output: words(output[0]),
    threads: int(config.get("threads", 1))
    resources:
        mem_mb=4096,
        runtime=lambda wildcards: max(1, round(JOBS[wildcards.done].timeout_s / 60)),
    shell:
        f"{DSV} notebooks run {{params.words}} --threads={{threads}}"


rule checkpoint:
    output:
        "{folder}/{name}.safetensors",
    wildcard_constraints:
        name="|".join(TRAINED),
    shell:
        f"{DSV} train {{wildcards.name}}"


rule site:
    input:
        rules.comparison.output,
    localrule: True
    shell:
        "make site"
