"""Several processes start and end together: the roll call and the barriers between threads, the rest between real
processes on CPU."""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import together_example

from diffjax.runtime import heartbeat, relay, rollcall
from diffjax.runtime.launchers import Place

FACTS = {"config": "a = 1\nb = 2", "jax": "1.0"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def call(processes, number, timeout_s=20.0, facts=None, numbers=None, clocks=None, port=None, hosts=()):
    """The roll call of `processes` (their numbers), each in a thread: what each returned or raised."""
    port = port or free_port()

    def hold(i):
        place = Place(f"127.0.0.1:{port}", (numbers or {}).get(i, number), processes[i], "hosts", hosts)
        clock = (clocks or {}).get(i, time.time)
        try:
            return rollcall.hold(place, (facts or {}).get(i, FACTS), timeout_s, clock)
        except (rollcall.TogetherError, ValueError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as threads:
        return list(threads.map(hold, range(len(processes))))


def close(rolls):
    for roll in rolls:
        for line in roll.lines.values():
            line.close()


@pytest.mark.fast
def test_all_come_beside_strangers_and_wrong_clocks(capfd):
    port = free_port()

    def disturb():
        strangers = []
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'{"magic": 1}\n', b"\xff\n", b""):
            stranger = socket.socket()
            while stranger.connect_ex(("127.0.0.1", port)):
                time.sleep(0.01)
            stranger.sendall(words)
            strangers.append(stranger)
        late = call([1], 3, port=port)
        for stranger in strangers:
            stranger.close()
        return late

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        late = thread.submit(disturb)
        rolls = call([0, 2], 3, clocks={1: lambda: time.time() - 40}, port=port)
        rolls += late.result()
    assert [sorted(roll.lines) for roll in rolls] == [[1, 2], [0], [0]]
    assert all(roll.hosts == [socket.gethostname()] * 3 for roll in rolls)
    warning, *rest = capfd.readouterr().err.splitlines()
    assert not rest
    assert re.search(r"WARNING: the clock of \S+ \(process 2\) is (39|40) s behind that of process 0", warning)
    close(rolls)


def test_who_is_missing_is_told_to_all_that_came():
    first, second = call([0, 3], 4, timeout_s=1, hosts=("a", "b", "c", "d"))
    assert isinstance(first, rollcall.TogetherError) and first.exit_code == 75
    assert str(first).startswith("2 of 4 processes came within 1 s; missing: 1 (b), 2 (c). ")
    assert isinstance(second, rollcall.TogetherError) and str(second) == str(first)
    (alone,) = call([1], 2, timeout_s=1)
    assert isinstance(alone, rollcall.TogetherError)
    message = r"process 1 of 2 did not reach process 0 at 127.0.0.1:\d+ within 1 s: Connection refused"
    assert re.match(message, str(alone))


@pytest.mark.parametrize(
    ("processes", "options", "message"),
    [
        ([0, 1, 1], {}, r"two processes have the number 1, on \S+ and \S+: give each its own"),
        ([0, 1, 0], {}, r"two processes have the number 0, on \S+ and"),
        ([0, 1, 2], {"numbers": {2: 4}}, r"process 2 \(\S+\) was started as one of 4, process 0 \(\S+\) as one of 3"),
        ([0, 1, 2], {"facts": {2: {**FACTS, "config": "a = 1\nb = 3"}}}, r"another config than .*: b = 3, not b = 2\."),
        ([0, 1, 2], {"facts": {1: {**FACTS, "jax": "1.1"}}}, r"process 1 .* has another jax than .*: 1.1, not 1.0"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_all(processes, options, message):
    errors = call(processes, 3, **options)
    assert all(type(error) is ValueError and re.search(message, str(error)) for error in errors), errors


def test_a_port_in_use_is_said(monkeypatch):
    monkeypatch.setattr(rollcall, "_LATE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ValueError, match=f"port {taken.getsockname()[1]} of this host is in use"):
            rollcall.hold(Place(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, "hosts"), FACTS, 5)


def test_barriers_and_the_table():
    peers = [heartbeat.Peers(i, roll, lost_after_s=5) for i, roll in enumerate(call([0, 1, 2], 3))]
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for _ in range(2):  # a name may come again
            list(threads.map(lambda one: one.barrier("save", 20), peers))
        for i, step in enumerate((7, 5, 1234)):
            peers[i].beat(step)
        waiting = [threads.submit(one.barrier, "report", 1.5) for one in (peers[0], peers[2])]
        for future in waiting:
            with pytest.raises(rollcall.TogetherError) as error:
                future.result()
            assert re.fullmatch(
                r"barrier 'report': 2 of 3 processes came within 2 s, not process 1 of 3 \(\S+\), at step 5, \d s ago, "
                r"past barrier 'save 2'",
                str(error.value),
            )
        rows = [line.split()[:2] for line in peers[2].table().splitlines()]
        assert rows == [["process", "step"], ["1", "5"], ["0", "7"], ["2", "1,234"]]
        list(threads.map(lambda one: one.barrier(heartbeat.END, 20), peers))
        list(threads.map(lambda one: one.leave(), peers))


def test_a_relay_stays_open_when_the_coordinator_is_gone():
    """At once JAX's client would end its process by SIGABRT."""
    port = free_port()
    with socket.create_connection(("127.0.0.1", relay.open_relay("127.0.0.1", port)), timeout=20) as client:
        client.sendall(b"early")  # it may listen later
        with socket.create_server(("127.0.0.1", port)) as server:
            coordinator, _ = server.accept()
        with coordinator:
            assert coordinator.recv(5, socket.MSG_WAITALL) == b"early"
            coordinator.sendall(b"back")
            assert client.recv(4, socket.MSG_WAITALL) == b"back"
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)


# Real processes --------------------------------------------------------------------------------------------------


def start(number, *options, stderr=subprocess.STDOUT):
    """As many processes as `options`, numbered from 0, of a run of `number`."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("DIFFJAX_", "XLA_FLAGS"))}
    variables |= {"PYTHONPATH": os.pathsep.join(sys.path), "DIFFJAX_COORDINATOR": f"127.0.0.1:{free_port()}"}
    return [
        subprocess.Popen(
            [sys.executable, together_example.__file__, json.dumps(given)],
            env={**variables, "DIFFJAX_NUM_PROCESSES": str(number), "DIFFJAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE, stderr=stderr, text=True,
        )
        for process, given in enumerate(options)
    ]  # fmt: skip


def finish(processes):
    """(exit code, what it printed) of each."""
    try:
        logs = [process.communicate(timeout=60)[0] for process in processes]
        return [(process.returncode, log) for process, log in zip(processes, logs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


def test_processes_compute_together_and_end_together():
    for code, log in finish(start(3, {}, {}, {})):
        assert code == 0 and "step 3: sum 6 over 3\n" in log, log
        # the table; what one did last may be under way
        assert len(re.findall(r"^[012] +3 ", log, flags=re.MULTILINE)) >= 2, log


def test_a_process_that_never_starts_ends_the_others():
    ((code, log),) = finish(start(2, {"timeout_s": 1}))
    assert code == 75 and "error: 1 of 2 processes came within 1 s; missing: 1. " in log, log


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim):
    processes = start(3 - victim, *[{"steps": 400}] * (3 - victim))
    wait_for(processes[victim], "step 15:")
    processes[victim].kill()
    for i, (code, log) in enumerate(finish(processes)):
        if i != victim:
            assert code == 75, log
            message = rf"error: process {victim} of {3 - victim} \(\S+\) was lost, last heard of at step \d+: its "
            message += "connection broke; run the same command again on all hosts to go on: it resumes from step "
            message += "[1-9]0 or a later one\n$"
            assert re.search(message, log), log


def test_a_frozen_process_ends_the_others():
    processes = start(2, {"steps": 400}, {"steps": 400, "at": 5, "does": "freeze"})
    log, _ = processes[0].communicate(timeout=60)
    processes[1].send_signal(signal.SIGKILL)
    finish(processes[1:])
    assert processes[0].returncode == 75, log
    message = r"process 1 of 2 \(\S+\) was lost, last heard of at step \d: nothing came from it for 3 s; run"
    assert re.search(message, log), log


def test_an_error_ends_all_with_its_message_and_code():
    (_, first), (_, second) = ended = finish(start(2, {"steps": 400}, {"steps": 400, "at": 5, "does": "raise"}))
    assert [code for code, _ in ended] == [2, 2], first + second
    text = "found 'this process had enough', expected host:port"
    assert re.search(rf"error: process 1 of 2 \(\S+\) ended: {text}", first), first
    assert f"error: {text}" in second, second


def test_a_barrier_that_one_misses_and_a_stop_of_all():
    stays = finish(start(2, {"barrier_at": 2}, {"barrier_at": 2, "at": 2, "does": "stay_away"}))
    assert [code for code, _ in stays] == [75, 75], stays
    assert all("barrier 'at 2': 1 of 2 processes came within 1 s, not process 1 of 2" in log for _, log in stays), stays
    stops = finish(start(2, *[{"at": 2, "does": "exit"}] * 2))
    assert [code for code, _ in stops] == [75, 75] and not any("error" in log for _, log in stops), stops


def test_a_process_whose_log_nobody_reads_ends():
    """Its last words cannot be written: it must not hold its devices for ever."""
    processes = start(2, *[{"steps": 400}] * 2, stderr=subprocess.PIPE)
    wait_for(processes[1], "step 5:")
    processes[1].stderr.close()
    processes[0].kill()
    assert processes[1].wait(timeout=30) == 75
    processes[1].stderr = None
    finish(processes)
