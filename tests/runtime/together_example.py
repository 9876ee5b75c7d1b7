"""One of several processes of a run, as a program: python together_example.py OPTIONS, a JSON object; which one it is
stands in DIFFJAX_*.

Each step sums the numbers of the processes, 1 for the first, over all of them, and prints the sum. Options: config,
timeout_s, lost_after_s, skew_s (of the clock), steps, and what this process `does` before step `at`: "raise", "freeze",
"exit" (as after a signal), or "stay_away" from the barrier of step `barrier_at`, where the others wait a second.
Errors become exit codes as in the commands.
"""

import json
import os
import signal
import sys
import time

import numpy as np
from absl import flags as absl_flags


from diffjax.cli import flags
from diffjax.runtime import launchers


def main(values) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from diffjax.runtime import distributed

    options = json.loads(values.options)
    place = launchers.find(os.environ)
    with distributed.session(
        place,
        {"config": options.get("config", "a = 1\nb = 2")},
        ending=flags.ending(values),
        timeout_s=options.get("timeout_s", 60),
        lost_after_s=options.get("lost_after_s", 3),
        clock=lambda: time.time() + options.get("skew_s", 0),
    ):
        mesh = jax.make_mesh((place.num_processes,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.NamedSharding(mesh, jax.P("data"))
        total = jax.jit(lambda x: x.sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
        own = jax.make_array_from_process_local_data(rows, np.float32([place.process_id + 1]))
        for step in range(1, options.get("steps", 3) + 1):
            act(options, step)
            print(f"step {step}: sum {float(total(own)):.0f} over {jax.process_count()}", flush=True)
            distributed.beat(step)
            if step % 10 == 0:
                distributed.saved(step)
            time.sleep(0.05 if options.get("steps") else 0)
        distributed.barrier("done", 20)
        print(distributed.table(), flush=True)


def act(options: dict, step: int) -> None:
    """What was asked for this step."""
    from diffjax.runtime import distributed

    if options.get("barrier_at") == step and options.get("does") != "stay_away":
        distributed.barrier(f"at {step}", 1)
    if options.get("at") != step:
        return
    if options["does"] == "raise":
        launchers.split_address("this process had enough")  # an error of diffjax, raised on purpose
    if options["does"] == "stay_away":
        time.sleep(60)
    if options["does"] == "exit":
        raise SystemExit(75)
    if options["does"] == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)


def define(values, argv) -> None:
    absl_flags.DEFINE_string("options", None, "", flag_values=values)


if __name__ == "__main__":
    sys.exit(flags.run(__doc__, define, main, ["together_example", f"--options={sys.argv[1]}"]))
