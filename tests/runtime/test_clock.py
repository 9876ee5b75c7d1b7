"""Time accounts and goodput, by a clock that the test moves; every figure is a small whole number of seconds."""

import json

import pytest

from diffjax.runtime import clock


class Now:
    """A clock that stands still until it is moved."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now():
    return Now()


def spend(accounts, now, **seconds):
    """So many seconds under each name, 'nothing' for none."""
    for name, duration in seconds.items():
        if name == "nothing":
            now.seconds += duration
            continue
        with accounts.account(name):
            now.seconds += duration


def test_accounts_add_up_over_restarts_and_never_twice(now):
    first = clock.Clock(now=now)
    with first.account("train"):
        now.seconds += 3
        with first.account("checkpoint"):
            now.seconds += 2
            with first.account("data"):
                now.seconds += 1
        now.seconds += 4
    now.seconds += 10
    saved = first.state()
    assert saved == {"train": 7, "checkpoint": 2, "data": 1, "total": 20}
    now.seconds = 1000.0
    second = clock.Clock(saved, now=now)
    with second.account("data"):
        now.seconds += 5
    assert second.state() == {"train": 7, "checkpoint": 2, "data": 6, "total": 25}


def test_an_account_that_fails_is_closed(now):
    accounts = clock.Clock(now=now)
    with pytest.raises(KeyError), accounts.account("train"):
        now.seconds += 1
        raise KeyError
    with accounts.account("train"):
        now.seconds += 1
    assert accounts.state()["train"] == 2


def test_the_sum_is_no_account(now):
    with pytest.raises(ValueError, match="'total'"), clock.Clock(now=now).account("total"):
        pass


def test_the_way_to_the_first_batch_is_booked(now):
    started = now()
    now.seconds += 6  # a checkpoint is read
    accounts = clock.Clock({"start": 1.0, "total": 2.0}, started, now)
    assert accounts.state() == {"start": 7, "total": 8}


def test_goodput_is_the_share_of_steps_that_count(now):
    accounts = clock.Clock(now=now)
    assert accounts.goodput == 0
    spend(accounts, now, compile=4, data=1, train=12, hooks=2, nothing=1)
    assert accounts.goodput == 12 / 20


@pytest.mark.fast
def test_steps_after_the_checkpoint_are_lost_over_three_sessions(tmp_path, now):
    """Killed twice, each time after the last log line; every second is in one account, and in the total."""
    first = clock.Clock(now=now)
    spend(first, now, compile=5, data=1, train=10)
    checkpoint = first.state()
    spend(first, now, checkpoint=2, data=3, train=20, hooks=1)  # 24 s that the next session repeats
    first.write(tmp_path)
    spend(first, now, train=7)  # after the last line: nobody knows of them

    now.seconds += 3600  # between sessions
    second = clock.Clock(clock.carried_over(tmp_path, checkpoint, print), now=now)
    assert second.state() == {"compile": 5, "data": 1, "train": 10, "hooks": 0, "checkpoint": 2, "lost": 24, "total": 42}
    spend(second, now, compile=5, data=1, train=4, nothing=1)
    second.write(tmp_path)

    third = clock.Clock(clock.carried_over(tmp_path, checkpoint, print), now=now)  # no newer checkpoint
    assert third.state() == {"compile": 10, "data": 1, "train": 10, "hooks": 0, "checkpoint": 2, "lost": 29, "total": 53}
    spend(third, now, train=47)
    assert third.goodput == 57 / 100
    assert third.total == sum(third.state().values()) - third.total + 1  # the second that no account holds


def test_nothing_is_lost_where_the_checkpoint_is_the_last_word(tmp_path, now):
    accounts = clock.Clock(now=now)
    spend(accounts, now, train=10)
    accounts.write(tmp_path)
    spend(accounts, now, train=5)
    checkpoint = accounts.state()  # after the log line
    assert clock.carried_over(tmp_path, checkpoint, print) == checkpoint
    spend(accounts, now, checkpoint=3)  # a stop by a signal: saved, written, ended
    accounts.write(tmp_path)
    kept = clock.carried_over(tmp_path, checkpoint, print)
    assert kept == {"train": 15, "checkpoint": 3, "data": 0, "hooks": 0, "lost": 0, "total": 18}


def test_a_run_that_had_no_checkpoint_lost_its_steps(tmp_path, now):
    accounts = clock.Clock(now=now)
    spend(accounts, now, compile=5, train=10)
    accounts.write(tmp_path)
    kept = clock.carried_over(tmp_path, None, print)
    assert kept == {"compile": 5, "train": 0, "data": 0, "hooks": 0, "lost": 10, "total": 15}
    assert clock.carried_over(tmp_path / "new", None, print) == {}


@pytest.mark.parametrize("text", ["", "{", "[1]", json.dumps({"train": "much"})])
def test_a_damaged_file_is_said_and_stops_nothing(tmp_path, text):
    (tmp_path / clock.FILE_NAME).write_text(text)
    said = []
    assert clock.carried_over(tmp_path, {"train": 3.0, "total": 4.0}, said.append) == {"train": 3, "total": 4}
    assert len(said) == 1 and "goodput.json is damaged" in said[0]
