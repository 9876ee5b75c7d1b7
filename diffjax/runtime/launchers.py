"""Which process of how many this one is, read from what its launcher left in the environment.

    place = find(os.environ)        # None: one process
    place = find(os.environ, "slurm")

    how          what is read
    hosts        DIFFJAX_COORDINATOR (host or host:port of process 0), DIFFJAX_NUM_PROCESSES, DIFFJAX_PROCESS_ID; or
                 DIFFJAX_HOSTS=a,b,c, with DIFFJAX_PROCESS_ID or by the name of this host
    gke          TPU_WORKER_ID, TPU_WORKER_HOSTNAMES (or TPU_PROCESS_ADDRESSES), and MEGASCALE_* of several slices
    kubernetes   JOB_COMPLETION_INDEX of an indexed job, with DIFFJAX_NUM_PROCESSES (its completions) and
                 DIFFJAX_SERVICE, the headless service that its pods name as their subdomain
    mpi          OMPI_COMM_WORLD_* of Open MPI; PMI_RANK and PMI_SIZE of MPICH and Intel MPI
    slurm        SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, which srun sets: a batch script is one process
    cloud_tpu    the metadata server of a TPU VM; asked only under this name, since elsewhere nothing answers

"auto" takes the first of them, in this order and without cloud_tpu, that started several processes. DIFFJAX_COORDINATOR
overrides the coordinator that any of them finds.
"""

import re
import socket
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

PORT = 17600  # of the coordinator, where nothing says another one; below the ports that systems hand out
_SLURM_PORTS = 4096  # by the job's number, since jobs may share a node
_METADATA_HOST = "metadata.google.internal"
_METADATA_TIMEOUT_S = 10


class Place(NamedTuple):
    """coordinator: host:port of process 0. how: what said so. hosts: of all processes, where that is known."""

    coordinator: str
    num_processes: int
    process_id: int
    how: str
    hosts: tuple[str, ...] = ()


def find(environ: Mapping[str, str], how: str = "auto", host_name: str | None = None) -> Place | None:
    """The place of this process, None for a process that is alone. host_name: of this host, by default its own.

    Raises ValueError for variables that contradict each other or are set in part, and where `how` names a launcher
    that did not start this process.
    """
    if how == "one":
        return None
    if how == "auto":
        places = (look(environ, host_name or socket.gethostname()) for look in _AUTOMATIC.values())
        return next((place for place in places if place is not None and place.num_processes > 1), None)
    launchers = {**_AUTOMATIC, "cloud_tpu": _cloud_tpu}
    if how not in launchers:
        raise ValueError(f"found --processes={how}, expected one of {', '.join(['auto', 'one', *launchers])}")
    place = launchers[how](environ, host_name or socket.gethostname())
    if place is None:
        raise ValueError(f"found --processes={how}, but not its variables: {_ABSENT[how]}")
    return place if place.num_processes > 1 else None


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of host:port. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"found {address!r}, expected host:port: type DIFFJAX_COORDINATOR=HOST:{PORT}")
    return host.strip("[]"), int(port)


def _place(
    environ: Mapping[str, str],
    how: str,
    host: str,
    number: int,
    own: int,
    port: int = PORT,
    hosts: tuple[str, ...] = (),
) -> Place:
    """Checked; with the coordinator that the user set."""
    if not 0 <= own < number:
        raise ValueError(f"{how}: found process {own} of {number}, expected 0 to {number - 1}: correct the variables")
    address = environ.get("DIFFJAX_COORDINATOR") or (f"[{host}]" if ":" in host else host)
    if ":" not in address.rpartition("]")[2]:
        address = f"{address}:{port}"
    split_address(address)
    return Place(address, number, own, how, hosts if len(hosts) == number else ())


def _number(environ: Mapping[str, str], name: str, example: str = "") -> int:
    """The variable as a number. Raises ValueError, with what to type instead."""
    text = environ.get(name, "")
    if not text.isdecimal():
        remedy = example or f"type {name}=NUMBER, or --processes=one"
        found = f"found {name}={text!r}, expected a number" if text else f"{name} is not set"
        raise ValueError(f"{found}: {remedy}")
    return int(text)


# Launchers -------------------------------------------------------------------------------------------------------


def _hosts(environ: Mapping[str, str], host_name: str) -> Place | None:
    if environ.get("DIFFJAX_HOSTS"):
        return _host_list(environ, host_name)
    if not environ.get("DIFFJAX_PROCESS_ID"):
        if environ.get("DIFFJAX_NUM_PROCESSES") and not any(map(environ.get, _NUMBERED)):
            raise ValueError("DIFFJAX_NUM_PROCESSES is set, DIFFJAX_PROCESS_ID is not: set it to 0, 1, ...")
        return None
    for name in ("DIFFJAX_COORDINATOR", "DIFFJAX_NUM_PROCESSES"):
        if not environ.get(name):
            raise ValueError(f"DIFFJAX_PROCESS_ID is set, {name} is not: set all three, or none")
    number, own = _number(environ, "DIFFJAX_NUM_PROCESSES"), _number(environ, "DIFFJAX_PROCESS_ID")
    return _place(environ, "hosts", "", number, own)


def _host_list(environ: Mapping[str, str], host_name: str) -> Place:
    hosts = tuple(filter(None, map(str.strip, environ["DIFFJAX_HOSTS"].split(","))))
    told = environ.get("DIFFJAX_NUM_PROCESSES")
    if told and told != str(len(hosts)):
        raise ValueError(
            f"DIFFJAX_HOSTS names {len(hosts)} processes, DIFFJAX_NUM_PROCESSES={told}: correct one, or leave the "
            "number out"
        )
    if environ.get("DIFFJAX_PROCESS_ID"):
        return _place(environ, "hosts", hosts[0], len(hosts), _number(environ, "DIFFJAX_PROCESS_ID"), hosts=hosts)
    same = [i for i, host in enumerate(hosts) if host == host_name]
    same = same or [i for i, host in enumerate(hosts) if host.partition(".")[0] == host_name.partition(".")[0]]
    if len(same) != 1:
        raise ValueError(
            f"DIFFJAX_HOSTS={','.join(hosts)} names this host, {host_name}, {len(same)} times, expected once: type "
            "DIFFJAX_PROCESS_ID=0, 1, ... on each"
        )
    return _place(environ, "hosts", hosts[0], len(hosts), same[0], hosts=hosts)


def _gke(environ: Mapping[str, str], host_name: str) -> Place | None:
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if not names or (len(names.split(",")) == 1 and not environ.get("MEGASCALE_NUM_SLICES")):
        return None
    workers = [name.strip().partition(":")[0] for name in names.split(",")]
    return _slices(environ, "gke", workers, _number(environ, "TPU_WORKER_ID"))


def _slices(environ: Mapping[str, str], how: str, workers: list[str], own: int) -> Place:
    """Of one TPU slice, or of several whose processes are numbered slice by slice."""
    slices = _number(environ, "MEGASCALE_NUM_SLICES") if environ.get("MEGASCALE_NUM_SLICES") else 1
    if slices == 1:
        return _place(environ, how, workers[0], len(workers), own, hosts=tuple(workers))
    if not environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        raise ValueError(
            f"MEGASCALE_NUM_SLICES={slices}, but MEGASCALE_COORDINATOR_ADDRESS is not set: set both, or none"
        )
    host = environ["MEGASCALE_COORDINATOR_ADDRESS"].partition(":")[0]
    own += _number(environ, "MEGASCALE_SLICE_ID") * len(workers)
    return _place(environ, how, host, slices * len(workers), own)


def _kubernetes(environ: Mapping[str, str], host_name: str) -> Place | None:
    if not environ.get("JOB_COMPLETION_INDEX"):
        return None
    service, coordinator = environ.get("DIFFJAX_SERVICE"), environ.get("DIFFJAX_COORDINATOR")
    if not environ.get("DIFFJAX_NUM_PROCESSES") and not service and not coordinator:
        return None  # each index a run of its own
    own = _number(environ, "JOB_COMPLETION_INDEX")
    number = _number(environ, "DIFFJAX_NUM_PROCESSES", "give it in the job's env, with the value of its completions")
    if not service and not coordinator:
        raise ValueError(
            "DIFFJAX_NUM_PROCESSES is set, DIFFJAX_SERVICE is not: give in the job's env the name of the headless "
            "service that its pods have as subdomain"
        )
    job = environ.get("HOSTNAME", host_name).partition(".")[0]
    if not coordinator and not job.endswith(f"-{own}"):
        raise ValueError(
            f"found the host name {job}, expected JOB-{own} as indexed jobs have it: set "
            f"DIFFJAX_COORDINATOR=HOST:{PORT}"
        )
    return _place(environ, "kubernetes", f"{job.removesuffix(f'-{own}')}-0.{service}", number, own)


def _mpi(environ: Mapping[str, str], host_name: str) -> Place | None:
    if environ.get("OMPI_COMM_WORLD_SIZE"):
        rank, size, local = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    elif environ.get("PMI_SIZE") and environ["PMI_SIZE"] != environ.get("SLURM_STEP_NUM_TASKS"):  # srun sets PMI_* too
        rank, size, local = "PMI_RANK", "PMI_SIZE", environ.get("MPI_LOCALNRANKS")
    else:
        return None
    own, number = _number(environ, rank), _number(environ, size)
    # Open MPI 4 tells where mpirun runs: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    if local == str(number):
        host = "127.0.0.1"
    elif launcher:
        host = launcher[1] or launcher[2]
    elif number == 1 or environ.get("DIFFJAX_COORDINATOR"):
        host = "localhost"
    else:
        raise ValueError(
            f"{size}={number}, but MPI does not tell on which host process 0 is: type "
            f"DIFFJAX_COORDINATOR=HOST:{PORT} before mpiexec (mpirun -x DIFFJAX_COORDINATOR)"
        )
    return _place(environ, "mpi", host, number, own)


def _slurm(environ: Mapping[str, str], host_name: str) -> Place | None:
    if not environ.get("SLURM_STEP_NUM_TASKS"):
        return None
    number, own = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    if number == 1:
        return _place(environ, "slurm", "localhost", 1, own)
    nodes = environ.get("SLURM_STEP_NODELIST")
    if not nodes:
        raise ValueError(
            "SLURM_STEP_NUM_TASKS is set, SLURM_STEP_NODELIST is not: start with srun, or type --processes=one"
        )
    job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    port = PORT + zlib.crc32(job.encode()) % _SLURM_PORTS
    return _place(environ, "slurm", first_node(nodes), number, own, port)


def first_node(nodes: str) -> str:
    """Of a list as Slurm writes it: node003 of node[003-007,9],login1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"found the list of nodes {nodes!r}, expected one such as node[003-007,9],login1")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _cloud_tpu(environ: Mapping[str, str], host_name: str) -> Place | None:
    own = _number({"agent-worker-number": _metadata(environ, "agent-worker-number")}, "agent-worker-number")
    # "10.0.0.2,10.0.0.3", or of older ones "name:0:10.0.0.2,name:1:10.0.0.3"
    workers = [name.split(":")[-1] for name in _metadata(environ, "worker-network-endpoints").split(",")]
    try:
        told = _metadata(environ, "tpu-env")
    except ValueError:  # a single slice may have none
        told = ""
    slices = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)'?$", told, flags=re.MULTILINE))
    return _slices({**slices, **environ}, "cloud_tpu", workers, own)


def _metadata(environ: Mapping[str, str], name: str) -> str:
    host = environ.get("GCE_METADATA_HOST") or environ.get("GCE_METADATA_IP") or _METADATA_HOST
    address = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=_METADATA_TIMEOUT_S) as answer:
            return answer.read(2**20).decode().strip()
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(
            f"--processes=cloud_tpu: {address} gave {error}: is this a TPU VM? Elsewhere leave the flag out, or type "
            "DIFFJAX_HOSTS=a,b,c"
        ) from error


_NUMBERED = ("JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_ID")
_AUTOMATIC: dict[str, Callable[[Mapping[str, str], str], Place | None]] = {
    "hosts": _hosts, "gke": _gke, "kubernetes": _kubernetes, "mpi": _mpi, "slurm": _slurm,
}  # fmt: skip
_ABSENT = {
    "hosts": "type DIFFJAX_COORDINATOR=HOST:PORT DIFFJAX_NUM_PROCESSES=N DIFFJAX_PROCESS_ID=I, or DIFFJAX_HOSTS=a,b,c",
    "gke": "TPU_WORKER_HOSTNAMES is set in pods that ask for several TPU hosts",
    "kubernetes": "the job needs completionMode: Indexed, and DIFFJAX_NUM_PROCESSES and DIFFJAX_SERVICE in its env",
    "mpi": "start with mpirun or mpiexec",
    "slurm": "start with srun",
    "cloud_tpu": "nothing answered",
}
HOW = ("auto", "one", *_ABSENT)
