"""Searches settings; each trial is a whole run.

`PRESET --shards DIR --name SWEEP --vary cluster.clusters=20,30,50` tries three numbers of clusters.
Weak trials are stopped between rounds, lost ones go on, and all share the shards and, where
their settings permit, the first keypoints. The best trial is the one with the smallest objective, which needs no
annotations unless told otherwise.
"""

import sys
from collections.abc import Sequence

import tyro

from sst.errors import exit_on_user_error
from sst.run.options import one_per_preset
from sst.run.preflight import check_kept
from sst.tune.command import TuneCommand, print_table, sweep_of
from sst.tune.sweep import best_of, given, run_sweep

COMMAND = one_per_preset(TuneCommand)


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.tune") -> None:
    """Searches; mistakes exit with code 2, a sweep without a finished trial with 1, an interrupted one with 130."""
    command = tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments, config=(tyro.conf.AvoidSubcommands,))
    check_kept(runs=command.where.runs, tracking=command.where.tracking)
    sweep = sweep_of(command)
    records = run_sweep(sweep, concurrent=command.concurrent, early_stop=command.early_stop, resume=command.resume)
    print_table(sweep, records)
    best = best_of(records)
    if best is None:
        reasons = "; ".join(f"{n:03d}: {record.error or record.status}" for n, record in enumerate(records))
        print(f"error: no trial finished ({reasons})", file=sys.stderr)
        raise SystemExit(1)
    print(f"best trial  {sweep.run(best).url}: {given(sweep.trials[best])}")


if __name__ == "__main__":
    main()
