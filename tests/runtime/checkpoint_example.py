"""One of several processes that write or read a checkpoint together, as a program:

    python checkpoint_example.py PORT PROCESS PROCESSES DEVICES FOLDER ACTION [STEP]

ACTION  save     write the checkpoint of STEP
        read     restore the newest
        blind    as read, but process 1 has lost sight of the newest one's JSON part
        fail     as save, but process 1 may write no file of more than 4 KiB
        late     as save, but process 1 does not come: it ends instead
        SIGTERM, SIGKILL   process 1 sends it to itself as soon as saving has begun

The arrays are spread over all devices, of all processes, in a mesh of as many as there are.
"""

import os
import signal
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[4]}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

CONFIG = {"seed": 0}
HEARTBEAT_S = 5  # after which jax.distributed gives up a process that is gone
SHAPES = {"kernel": (64, 48), "bias": (48,), "half": (16, 8), "step": (), "odd": (5, 7)}
SPECS = {"kernel": ("x",), "bias": (), "half": (None, "x"), "step": (), "odd": ()}


def values(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return arrays | {"half": arrays["half"].astype(jnp.bfloat16), "step": np.int32(step)}


def shardings() -> dict[str, NamedSharding]:
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    return {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in SPECS.items()}


def make_state(step: int) -> dict[str, jax.Array]:
    where = shardings()
    return {
        name: jax.make_array_from_callback(np.shape(array), where[name], lambda index, a=array: np.asarray(a)[index])
        for name, array in values(step).items()
    }


def save(folder: str, step: int, action: str) -> None:
    from diffjax.runtime import checkpoint, guards

    is_second = jax.process_index() == 1
    with guards.StopSignal() as stop, checkpoint.Checkpoints(folder, CONFIG) as checkpoints:
        if action == "fail" and is_second:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        if action == "late" and is_second:
            os._exit(9)
        checkpoints.save(step, make_state(step), {"position": step}, {})
        if action in ("SIGTERM", "SIGKILL") and is_second:
            os.kill(os.getpid(), getattr(signal, action))
    print("saved", step, checkpoint.steps(folder), stop.received, flush=True)


def read(folder: str, is_blind: bool) -> None:
    from diffjax.runtime import checkpoint_read

    if is_blind:
        open_one = checkpoint_read._read_run

        def read_run(own):
            return open_one(own / "absent" if own.name == "2" else own)

        checkpoint_read._read_run = read_run
    where = shardings()
    arrays = values(0).items()
    abstract = {name: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where[name]) for name, x in arrays}
    found = checkpoint_read.read_newest(folder, abstract, CONFIG, lambda line: print("said", line))
    expected = values(found.step)
    for name, array in found.state.items():
        assert array.sharding == where[name] and array.dtype == expected[name].dtype
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected[name])[shard.index])
    assert found.run["iterator"] == {"position": found.step}
    print("read", found.step, flush=True)


def main() -> None:
    port, process, processes, folder, action = *map(int, sys.argv[1:4]), *sys.argv[5:7]
    jax.config.update("jax_platforms", "cpu")
    if processes > 1:
        patience = HEARTBEAT_S if action in ("SIGKILL", "late") else 100
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process, heartbeat_timeout_seconds=patience)
    from diffjax.runtime import exchange
    from diffjax.runtime.checkpoint import CheckpointError

    try:
        if action in ("read", "blind"):
            read(folder, is_blind=action == "blind" and process == 1)
        else:
            save(folder, int(sys.argv[7]), action)
    except CheckpointError as error:
        print("CheckpointError", error, flush=True)
        exchange.texts("over", patience_s=30)  # without process 0, jax.distributed aborts the others
        os._exit(7)


if __name__ == "__main__":
    main()
