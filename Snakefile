# The graph: classifiers → notebooks → claim ledger → site.
#
#   snakemake --cores 2                              every notebook of preset quick, and its ledger
#   snakemake --cores 2 --config preset=smoke        another preset
#   snakemake --cores 2 build/quick/04_coresets.done one notebook
#   snakemake --profile profiles/slurm               on a cluster; profiles/kubernetes likewise
#
# `dsv reproduce` and `make figures` use this file. What is out of date is decided by digests
# (dsvlib/graph.py says how): file times count for nothing, which is what ancient() means.

import os
import re
import shlex
import sys

from dsvlib._files import checkpoints_folder
from companion.graph import mark, options, sources, stamp, which
from companion.presets import plan
from companion.runs import figures_root, repository_root

PRESET = config.get("preset", "quick")
FIGURES = os.path.relpath(figures_root(), repository_root())
JOBS = {
    job.name: job
    for job in plan(
        PRESET, device=config.get("device") or None, data_root=config.get("data_root") or None
    )
}
# The first process decides; the copies of this file that run on a cluster's nodes only follow.
if not config.get("marked") and not workflow.remote_exec:
    mark(JOBS.values())

# all that are there, and those of the bundled digits, which can be trained anew without a download
CHECKPOINTS = os.path.relpath(checkpoints_folder(), repository_root())
SHIPPED = {"digits-convnet", "digits-convnet-shuffled", "digits-judge"}
SHIPPED |= {path.stem for path in checkpoints_folder().glob("*.safetensors")}
DSV = f"{shlex.quote(sys.executable)} -m companion.cli"


wildcard_constraints:
    preset=PRESET,
    job="|".join(map(re.escape, JOBS)),


rule ledger:
    input:
        [os.path.relpath(stamp(job), repository_root()) for job in JOBS.values()],
    output:
        f"{FIGURES}/claims/{PRESET}.csv",
        f"{FIGURES}/claims/{PRESET}.md",
    localrule: True
    shell:
        f"{DSV} claims --scale {PRESET} > /dev/null"


rule notebook:
    input:
        ancient(lambda wildcards: f"notebooks/{JOBS[wildcards.job].notebook}.ipynb"),
        ancient("notebooks/presets.yml"),
        ancient(sources()),
        ancient(expand(f"{CHECKPOINTS}/{{name}}.safetensors", name=sorted(SHIPPED))),
    output:
        "build/{preset}/{job}.done",
    params:
        which=lambda wildcards: shlex.join(which(JOBS[wildcards.job])),
        options=shlex.join(options(config)),
    threads: int(config.get("threads", 1))
    resources:
        mem_mb=4096,
        runtime=lambda wildcards: max(1, round(JOBS[wildcards.job].timeout_s / 60)),
    shell:
        f"{DSV} notebooks run {{params.which}} --preset {{wildcards.preset}} "
        "--threads {threads} {params.options}"


rule checkpoint:
    output:
        f"{CHECKPOINTS}/{{name}}.safetensors",
    wildcard_constraints:
        name="digits-.*",
    shell:
        f"{DSV} train {{wildcards.name}}"


rule site:
    input:
        rules.ledger.output,
    localrule: True
    shell:
        "make site"
