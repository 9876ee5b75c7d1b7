"""Messages between processes: one JSON object a line, over TCP, never waiting.

What comes in is data from a network: a line that is no JSON object, or longer than LIMIT, raises ValueError.
"""

import json
import socket
from collections.abc import Mapping
from typing import Any

LIMIT = 2**22  # bytes of a line: the text of a config is some thousand


class Line:
    """One end of a connection. `ended` once the other side has closed it or it broke."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._in, self._out = connection, bytearray(), bytearray()
        self._kept: list[dict[str, Any]] = []
        self.ended = False

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    def close(self) -> None:
        """End it."""
        self.ended = True
        self._socket.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Put a message behind those that wait, and send what the network takes now."""
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Send what waits, as far as the network takes it; returns whether all has gone."""
        try:
            while self._out and not self.ended:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        return not self._out

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come. Raises ValueError for anything else."""
        try:
            while not self.ended and len(self._in) <= LIMIT:
                piece = self._socket.recv(2**16)
                self._in += piece
                self.ended = not piece
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        *lines, rest = self._in.split(b"\n")
        self._in = bytearray(rest)
        if len(rest) > LIMIT:
            raise ValueError(f"found a line of more than {LIMIT:,} bytes")
        kept, self._kept = self._kept, []
        return [*kept, *map(_message, lines)]

    def put_back(self, messages: list[dict[str, Any]]) -> None:
        """Messages for the next `receive`."""
        self._kept = messages


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found {bytes(line[:40])!r}, expected a line of JSON") from error
    if not isinstance(message, dict):
        raise ValueError(f"found {bytes(line[:40])!r}, expected a JSON object")
    return message
