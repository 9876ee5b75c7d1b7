"""Progress in images, on a terminal and in a log file."""

import io

import pytest

from diffjax.runtime import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_images_rate_and_time_left(monkeypatch):
    stream = Terminal()
    with progress.Progress(2000, 500, stream) as bar:
        bar.update(1000, "loss 0.5")
        bar.say("hello")
    text = stream.getvalue()
    assert "1.00k/2.00k" in text and "img/s" in text and "hello\n" in text and "loss 0.5" in text


def test_all_processes_but_one_are_silent():
    stream = Terminal()
    with progress.Progress(2000, 500, stream, is_silent=True) as bar:
        bar.update(1000, "loss 0.5")
        bar.say("hello")
    assert stream.getvalue() == "" and bar.images_per_s > 0


@pytest.mark.fast
def test_a_log_file_gets_plain_lines_at_intervals(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bar = progress.Progress(4096, 1024, stream, interval_s=30)
    for second, images in ((10, 1124), (31, 1334), (40, 1434), (64, 1664)):
        now[0] = 100.0 + second
        bar.update(images)
    bar.close()
    # images before this session do not count in the rate
    assert stream.getvalue().splitlines() == [
        "1,334/4,096 images, 10 images/s, 0:04:36 left",
        "1,664/4,096 images, 10 images/s, 0:04:03 left",
    ]


def test_the_rate_is_zero_and_the_time_unknown_before_the_first_update(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 5.0)
    bar = progress.Progress(10, stream=io.StringIO())
    assert bar.images_per_s == 0 and "unknown time left" in bar.line()
