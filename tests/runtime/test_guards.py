"""Guards: what is not finite is named, hangs show their stacks, signals wait, compilations are counted."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from diffjax.runtime import guards

PATHS = ["enc/bias", "enc/kernel"]


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: a test run started with `&` in a script ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.fast
def test_a_non_finite_metric_names_step_metric_and_parameter():
    queue = guards.InFlight(0, PATHS)
    good = {"loss": jnp.float32(0.5), "nonfinite_leaf": jnp.int32(-1)}
    assert queue.push(1, good) == [(1, {"loss": 0.5, "nonfinite_leaf": -1.0})]
    with pytest.raises(guards.NonFiniteError, match="step 2: found non-finite loss = inf; .*: enc/kernel"):
        queue.push(2, {"loss": jnp.inf, "nonfinite_leaf": jnp.int32(1)})
    # a gradient may be broken where the loss is not
    with pytest.raises(guards.NonFiniteError, match="step 3: found non-finite gradients; .*: enc/bias"):
        queue.push(3, {"loss": jnp.float32(1), "nonfinite_leaf": jnp.int32(0)})
    with pytest.raises(guards.NonFiniteError, match=r"found non-finite grad_norm = nan\."):
        queue.push(4, {"loss": jnp.float32(1), "grad_norm": jnp.nan})


def test_steps_leave_the_queue_late_in_order_and_all_when_drained():
    queue = guards.InFlight(2, PATHS)
    left = [step for number in range(1, 6) for step, _ in queue.push(number, {"loss": jnp.float32(number)})]
    assert left == [1, 2, 3]
    assert [(step, values["loss"]) for step, values in queue.drain()] == [(4, 4.0), (5, 5.0)]
    assert queue.drain() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number, interruptible):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with guards.StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == signal.Signals(number).name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_interrupts_and_a_second_sigterm_does_not(interruptible):
    with guards.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_interrupt_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with guards.StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_signals_need_the_main_thread():
    errors = []

    def enter():
        try:
            with guards.StopSignal():
                pass
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread" in errors[0]


def test_preemption_ends_the_process_with_the_documented_code():
    error = guards.Preempted(7, "SIGTERM")
    assert isinstance(error, SystemExit) and error.code == 75 and error.step == 7


def test_a_hang_prints_the_stacks_of_all_threads(tmp_path):
    def stuck_in_here():
        while not path.read_text():
            time.sleep(0.01)

    path = tmp_path / "stacks.txt"
    with path.open("w") as stream, guards.Watchdog(0.05, stream) as watchdog:
        watchdog.beat()
        stuck_in_here()
    assert "stuck_in_here" in path.read_text()


def test_a_hang_prints_what_stands_beside_again_and_again(tmp_path):
    path = tmp_path / "stacks.txt"
    with path.open("w") as stream, guards.Watchdog(0.05, stream, beside=lambda: "process 1 lags"):
        while path.read_text().count("process 1 lags\n") < 2:
            time.sleep(0.01)
    assert "test_a_hang_prints" in path.read_text()


def test_the_watchdog_is_quiet_when_off(tmp_path):
    path = tmp_path / "stacks.txt"
    with path.open("w") as stream, guards.Watchdog(0, stream) as watchdog:
        watchdog.beat()
    assert path.read_text() == ""


def test_compilations_are_counted_by_name_and_only_inside():
    def cube(x):
        return x**3

    def quarter(x):
        return x / 4

    compiled = jax.jit(cube)
    compiled(jnp.ones(2))
    with guards.CompileCounter() as counter:
        compiled(jnp.ones(2))
        assert counter.count("cube") == 0
        compiled(jnp.ones(3))
        compiled(jnp.ones(4))
        jax.jit(quarter)(jnp.ones(3))
    jax.jit(cube)(jnp.ones(5))
    assert (counter.count("cube"), counter.count("quarter"), counter.count("other")) == (2, 1, 0)
    assert counter.count() >= 3
