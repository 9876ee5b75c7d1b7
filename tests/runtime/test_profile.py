"""Profiles: figures of traces whose times are known, and of a real trace of the CPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.runtime import profile, traces


def span(start, end, name, kind="compute"):
    return traces.Span(start, end, name, kind)


@pytest.mark.fast
def test_self_time_is_what_no_inner_operation_has():
    found = traces.pieces([span(5, 6, "dot"), span(0, 10, "while"), span(2, 4, "fusion"), span(20, 25, "copy")])
    assert [(piece.start, piece.end, piece.name) for piece in found] == [
        (0, 2, "while"), (2, 4, "fusion"), (4, 5, "while"), (5, 6, "dot"), (6, 10, "while"), (20, 25, "copy"),
    ]  # fmt: skip


def test_self_times_add_up_to_the_union():
    """Against a count of the integers that any operation covers; operations that overlap without nesting too."""
    random = np.random.default_rng(0)
    for _ in range(50):
        starts = random.integers(0, 50, 8)
        ends = starts + random.integers(1, 20, 8)
        spans = [span(int(start), int(end), str(i)) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]
        found = traces.pieces(spans)
        covered = set().union(*(range(each.start, each.end) for each in spans))
        assert sum(piece.end - piece.start for piece in found) == len(covered)
        assert all(before.end <= after.start for before, after in zip(found, found[1:], strict=False))


def test_an_instant_belongs_to_compute_before_collectives_before_transfers():
    lines = [span(10, 30, "dot"), span(20, 50, "all-reduce", "collectives"), span(45, 70, "copy-done", "transfers")]
    assert traces.split(lines, 0, 100) == {"compute": 20, "collectives": 20, "transfers": 20, "host gaps": 40}


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("fusion.12", "fused_computation.3"), "compute"),
        (("fusion.3", "%all-reduce-scatter.2.clone"), "collectives"),
        (("all-gather-start.1",), "collectives"),
        (("all-to-all", "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"), "collectives"),
        (("", "ncclDevKernel_AllReduce_Sum_f32_RING_LL"), "collectives"),
        (("MemcpyD2H",), "transfers"),
        (("copy-start.7",), "transfers"),
        (("copy.7", "data formatting"), "compute"),  # within the device's memory
        (("loop_broadcast_fusion",), "compute"),
    ],
)
def test_kinds_go_by_the_names_of_each_backend(names, kind):
    assert traces.kind_of(*names) == kind


def plane(name, *lines):
    """A plane in the text format of traces. lines: (name, [(operation, start in ns, end in ns)])."""
    operations = list(dict.fromkeys(each[0] for _, events in lines for each in events))
    text = f'planes {{ name: "{name}"'
    for line, events in lines:
        text += f' lines {{ name: "{line}" timestamp_ns: 1000'
        for operation, start, end in events:
            number = operations.index(operation) + 1
            text += f" events {{ metadata_id: {number} offset_ps: {start * 1000} duration_ps: {(end - start) * 1000} }}"
        text += " }"
    for number, operation in enumerate(operations, 1):
        text += f' event_metadata {{ key: {number} value {{ id: {number} name: "{operation}" }} }}'
    return text + " }"


STEPS = [(traces.STEP_NAME, 0, 100), (traces.STEP_NAME, 100, 220), ("PjitFunction(train_step)", 0, 5)]
HOST = plane("/host:CPU", ("python", STEPS))


def summary_of(tmp_path, *planes):
    path = tmp_path / "trace.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(" ".join(planes)))
    return traces.summarise(path)


def test_a_trace_of_two_tpu_chips(tmp_path):
    """A loop around a fusion and a gather, and a chip that waits; other lines, and parts of a chip, do not count."""
    busy = plane(
        "/device:TPU:0",
        ("Steps", [("0", 0, 200)]),
        ("XLA Modules", [("jit_train_step(1)", 0, 200)]),
        ("XLA Ops", [
            ("%while.1 = (f32[]) while(%tuple)", 20, 120),
            ("%fusion.2 = f32[8]{0} fusion(%all-reduce.1), calls=%fused.2", 30, 60),
            ("%all-gather-done.3 = f32[8]{0} all-gather-done(%s)", 60, 100),
            ("%fusion.2 = f32[8]{0} fusion(%all-reduce.1), calls=%fused.2", 210, 250),  # half of it after the last step
        ]),
        ("Async XLA Ops", [("%all-gather-start.3 = f32[8]{0} all-gather-start(%p)", 30, 100)]),
    )  # fmt: skip
    idle = plane("/device:TPU:1", ("XLA Ops", [("%copy-done = f32[8]{0} copy-done(%s)", 0, 44)]))
    part = plane("/device:TPU:0 SparseCore 0", ("XLA Ops", [("%fusion.9 = f32[] fusion()", 0, 220)]))
    found = summary_of(tmp_path, busy, idle, part, HOST)
    assert found.devices == 2 and list(found.step_ms) == [100e-6, 120e-6]
    assert found.spread_ms == pytest.approx(200**0.5 * 1e-6)  # of 100 and 120 ns about 110
    expected = {"compute": 70 / 440, "collectives": 40 / 440, "transfers": 44 / 440, "host gaps": 286 / 440}
    assert found.shares == pytest.approx(expected) and sum(found.shares.values()) == pytest.approx(1)
    # per step and chip, of which there are two each
    rows = {row.operation: (row.kind, round(row.self_ms * 4e6), row.calls) for row in found.operations}
    assert rows == {
        "copy-done": ("transfers", 44, 0.25), "fusion.2": ("compute", 40, 0.5), "while.1": ("compute", 30, 0.25),
        "all-gather-done.3": ("collectives", 40, 0.25),
    }  # fmt: skip
    assert [row.self_ms for row in found.operations] == sorted((row.self_ms for row in found.operations), reverse=True)


def test_the_streams_of_a_gpu_run_beside_each_other(tmp_path):
    gpu = plane(
        "/device:GPU:0",
        ("Stream #13(Compute)", [("fusion_kernel", 0, 110)]),
        ("Stream #20(Collective)", [("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 55, 165)]),
        ("XLA Modules", [("jit_train_step", 0, 220)]),
    )
    found = summary_of(tmp_path, gpu, HOST)
    assert found.shares == {"compute": 0.5, "collectives": 0.25, "transfers": 0.0, "host gaps": 0.25}


def test_traces_without_steps_or_operations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no annotation 'train_step'"):
        summary_of(tmp_path, plane("/device:TPU:0", ("XLA Ops", [("%fusion", 0, 1)])))
    with pytest.raises(ValueError, match="no operation of a device within its 2 steps"):
        summary_of(tmp_path, plane("/device:TPU:0", ("XLA Ops", [("%fusion", 500, 600)])), HOST)


@pytest.fixture(scope="module")
def run():
    """steps -> a loop over 8 devices with a reduction across them, as the trainer runs its own."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, P("data")))
    w = jax.device_put(jnp.ones((128, 128)), NamedSharding(mesh, P()))

    @jax.jit
    def train_step(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)

    def loop(tracer, steps, limit=2):
        """limit: steps that are queued on the devices."""
        nonlocal w
        with tracer:
            for step in range(1, steps + 1):
                w = train_step(w, x)
                if step % (limit + 1) == 0:
                    jax.block_until_ready(w)
                tracer.step(step, lambda: jax.block_until_ready(w))

    return loop


def test_a_real_trace_of_the_cpu(tmp_path, run):
    said = []
    run(profile.Profile(tmp_path, 3, said.append), 8)
    assert said == [f"profile: {tmp_path / 'profile' / 'summary.md'}"]
    tables = json.loads((tmp_path / "profile" / "summary.json").read_text())["tables"]
    steps, shares = tables["steps"][0], {row["time"]: row["share"] for row in tables["shares"]}
    assert steps["steps"] == 3 and steps["devices"] == 8 and steps["min_ms"] <= steps["mean_ms"] <= steps["max_ms"]
    assert sum(shares.values()) == pytest.approx(1) and shares["compute"] > 0 and shares["collectives"] > 0
    rows = {row["operation"]: row for row in tables["operations"]}
    reduction = next(row for name, row in rows.items() if name.startswith("all-reduce"))
    assert reduction["kind"] == "collectives" and reduction["calls"] == 1
    assert any(name.startswith("dot") or "fusion" in name for name in rows)
    text = (tmp_path / "profile" / "summary.md").read_text()
    assert "| all-reduce" in text and "## Where the time goes" in text
    assert len(list((tmp_path / "profile" / "plugins" / "profile" / "step_00000002").glob("*.trace.json.gz"))) == 1


def test_a_short_run_has_the_steps_there_were(tmp_path, run):
    said = []
    run(profile.Profile(tmp_path, 10, said.append), 4, limit=0)
    tables = json.loads((tmp_path / "profile" / "summary.json").read_text())["tables"]
    assert tables["steps"][0]["steps"] == 2 and len(said) == 1
    said = []
    run(profile.Profile(tmp_path / "short", 10, said.append), 2)
    assert said == ["no profile: the session ended within its first three steps, which are not traced"]
    run(profile.Profile(tmp_path / "none", 0, said.append), 4)
    assert len(said) == 1 and not (tmp_path / "none").exists()


def test_a_trace_without_figures_stops_nothing(tmp_path):
    said = []
    with profile.Profile(tmp_path, 2, said.append) as tracer:
        for step in range(1, 6):
            tracer.step(step, lambda: None)  # nothing is computed
    assert len(said) == 1 and said[0].startswith("no summary of the profile: ") and "no operation of a device" in said[0]


def test_an_error_of_the_run_ends_the_trace(tmp_path, run):
    tracer = profile.Profile(tmp_path, 5, pytest.fail)
    with pytest.raises(KeyError), tracer:
        for step in (1, 2, 3):
            tracer.step(step, lambda: None)
        raise KeyError
    jax.profiler.start_trace(tmp_path / "next")  # a running one would be in the way
    jax.profiler.stop_trace()
    assert not (tmp_path / "profile" / "summary.md").exists()
