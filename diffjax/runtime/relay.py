"""A local port that passes on to the coordinator, and stays open when the coordinator is gone.

JAX's client of the coordination service ends its process by SIGABRT as soon as the connection to process 0 breaks, and
no setting of jax 0.10 changes it: nobody could say what happened, and the exit code would be 134. Behind a relay the
client sees a coordinator that is slow to answer, and `heartbeat` has the say.
"""

import contextlib
import socket
import threading
import time

_PATIENCE_S = 60.0  # for the coordinator to listen
_PIECE = 2**16


def open_relay(host: str, port: int) -> int:
    """The local port that stands for host:port, served by daemon threads until the process ends."""
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(server, host, port), name="relay", daemon=True).start()
    return server.getsockname()[1]


def _serve(server: socket.socket, host: str, port: int) -> None:
    held = []  # never closed here
    while True:
        client, _ = server.accept()
        held.append(client)
        threading.Thread(target=_pass_on, args=(client, host, port), name="relay", daemon=True).start()


def _pass_on(client: socket.socket, host: str, port: int) -> None:
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            coordinator = socket.create_connection((host, port), timeout=5)
            break
        except OSError:
            if time.monotonic() > until:
                client.close()
                return
            time.sleep(0.05)
    coordinator.settimeout(None)
    for end in (client, coordinator):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_return, args=(coordinator, client), name="relay", daemon=True).start()
    _copy(client, coordinator)
    with contextlib.suppress(OSError):
        coordinator.shutdown(socket.SHUT_WR)


def _return(coordinator: socket.socket, client: socket.socket) -> None:
    with coordinator:
        _copy(coordinator, client)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """All that comes, until the source ends; the sink stays open."""
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            sink.sendall(piece)
