"""Which process this is, from the variables that launchers set: examples of their documentation."""

import http.server
import threading

import pytest

from diffjax.runtime import launchers
from diffjax.runtime.launchers import PORT, find

SLURM = {
    "SLURM_JOB_ID": "65541", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "node[003-004,9]", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911",
}  # fmt: skip
OPEN_MPI_V6 = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d::2]:43370"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}
JOB = {"JOB_COMPLETION_INDEX": "1", "HOSTNAME": "train-xl-1", "DIFFJAX_NUM_PROCESSES": "3", "DIFFJAX_SERVICE": "pods"}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "tpu-0-0.svc:8080"}
OWN = {"DIFFJAX_COORDINATOR": "10.0.0.7:1234", "DIFFJAX_NUM_PROCESSES": "2", "DIFFJAX_PROCESS_ID": "1"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("environ", "host", "number", "process", "how"),
    [
        (OWN, "10.0.0.7:1234", 2, 1, "hosts"),
        ({**OWN, "DIFFJAX_COORDINATOR": "10.0.0.7"}, f"10.0.0.7:{PORT}", 2, 1, "hosts"),
        ({"DIFFJAX_HOSTS": "a, b.lan,c"}, f"a:{PORT}", 3, 1, "hosts"),
        ({"DIFFJAX_HOSTS": "a,a", "DIFFJAX_PROCESS_ID": "1"}, f"a:{PORT}", 2, 1, "hosts"),
        (GKE, f"tpu-0.svc:{PORT}", 2, 1, "gke"),
        ({**GKE, **SLICES}, f"tpu-0-0.svc:{PORT}", 4, 3, "gke"),
        ({**GKE, "TPU_PROCESS_ADDRESSES": "x:8476,y:8476,z:8476"}, f"x:{PORT}", 3, 1, "gke"),
        (JOB, f"train-xl-0.pods:{PORT}", 3, 1, "kubernetes"),
        ({**JOB, "HOSTNAME": "odd", "DIFFJAX_COORDINATOR": "h:7"}, "h:7", 3, 1, "kubernetes"),
        (OPEN_MPI, f"10.96.0.1:{PORT}", 4, 3, "mpi"),
        (OPEN_MPI_V6, f"[fe80::b9b:ac5d:9cf0:b858]:{PORT}", 4, 3, "mpi"),
        ({**SLURM, **OPEN_MPI}, f"10.96.0.1:{PORT}", 4, 3, "mpi"),  # mpirun starts its daemons by srun
        ({**HYDRA, "MPI_LOCALNRANKS": "4"}, f"127.0.0.1:{PORT}", 4, 1, "mpi"),
        ({**HYDRA, "DIFFJAX_COORDINATOR": "h"}, f"h:{PORT}", 4, 1, "mpi"),
        ({**SLURM, "DIFFJAX_COORDINATOR": "10.0.0.7:1234"}, "10.0.0.7:1234", 4, 2, "slurm"),
        ({**SLURM, **OWN}, "10.0.0.7:1234", 2, 1, "hosts"),
    ],
)
def test_each_launcher(environ, host, number, process, how):
    found = find(environ, host_name="b")
    assert found[:4] == (host, number, process, how)
    assert find(environ, how, host_name="b") == found and find(environ, "one") is None


def test_slurm_takes_its_port_from_the_job():
    ports = {}
    for job in ("65541", "65542"):
        for extra in ({}, {"PMI_RANK": "2", "PMI_SIZE": "4"}):  # srun --mpi=pmi2 sets these too
            host, port = launchers.split_address(find({**SLURM, "SLURM_JOB_ID": job, **extra}).coordinator)
            assert host == "node003" and PORT <= port < PORT + 4096
            assert ports.setdefault(job, port) == port
    assert len(set(ports.values())) == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("rack[0-1]n[07-12]", "rack0n07"),
    ],
)
def test_first_node_of_a_list(nodes, first):
    assert launchers.first_node(nodes) == first


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {name: value for name, value in SLURM.items() if "STEP" not in name},  # a batch script
        {"JOB_COMPLETION_INDEX": "3"},  # each index a run of its own
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        {"DIFFJAX_COORDINATOR": "10.0.0.7"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_process_alone(environ):
    assert find(environ) is None


@pytest.mark.parametrize(
    ("environ", "how", "message"),
    [
        ({**OWN, "DIFFJAX_COORDINATOR": ""}, "auto", "DIFFJAX_PROCESS_ID is set, DIFFJAX_COORDINATOR is not"),
        ({**OWN, "DIFFJAX_PROCESS_ID": "2"}, "auto", "found process 2 of 2, expected 0 to 1"),
        ({**OWN, "DIFFJAX_PROCESS_ID": "one"}, "auto", "found DIFFJAX_PROCESS_ID='one', expected a number"),
        ({**OWN, "DIFFJAX_COORDINATOR": "h:http"}, "auto", "found 'h:http', expected host:port"),
        ({"DIFFJAX_NUM_PROCESSES": "2"}, "auto", "DIFFJAX_PROCESS_ID is not"),
        ({"DIFFJAX_HOSTS": "a,b", "DIFFJAX_NUM_PROCESSES": "3"}, "auto", "names 2 processes, DIFFJAX_NUM_PROCESSES=3"),
        ({"DIFFJAX_HOSTS": "a,c"}, "auto", "names this host, b, 0 times"),
        ({"DIFFJAX_HOSTS": "b,b.lan,b"}, "auto", "names this host, b, 2 times"),
        ({**GKE, "TPU_WORKER_ID": ""}, "auto", "TPU_WORKER_ID is not set"),
        ({**GKE, "MEGASCALE_NUM_SLICES": "2"}, "auto", "MEGASCALE_COORDINATOR_ADDRESS is not set"),
        ({**JOB, "DIFFJAX_SERVICE": ""}, "auto", "DIFFJAX_SERVICE is not"),
        ({**JOB, "DIFFJAX_NUM_PROCESSES": ""}, "auto", "DIFFJAX_NUM_PROCESSES is not set"),
        ({**JOB, "HOSTNAME": "train-7"}, "auto", "found the host name train-7, expected JOB-1"),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""}, "auto", "mpirun -x DIFFJAX_COORDINATOR"),
        (HYDRA, "auto", "type DIFFJAX_COORDINATOR=HOST"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "auto", "SLURM_STEP_NODELIST is not"),
        ({**SLURM, "SLURM_STEP_NODELIST": "[1-2"}, "auto", "found the list of nodes"),
        ({}, "slurm", "start with srun"),
        ({}, "kubernetes", "completionMode: Indexed"),
        ({}, "pbs", "found --processes=pbs, expected one of"),
    ],
)
def test_what_does_not_fit_is_refused(environ, how, message):
    with pytest.raises(ValueError, match=message):
        find(environ, how, host_name="b")


@pytest.fixture
def metadata():
    """A metadata server; name -> text."""
    texts = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            known = name in texts and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(texts.get(name, "").encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_port}", "http_proxy": "http://127.0.0.1:9"}, texts
        server.shutdown()
        thread.join()


def test_a_tpu_vm_asks_the_metadata_server(metadata):
    environ, texts = metadata
    with pytest.raises(ValueError, match="agent-worker-number gave HTTP Error 404: .*is this a TPU VM"):
        find(environ, "cloud_tpu")
    assert find(environ) is None
    texts.update({"agent-worker-number": "1", "worker-network-endpoints": "u:0:10.0.0.2,u:1:10.0.0.3"})
    assert find(environ, "cloud_tpu") == (f"10.0.0.2:{PORT}", 2, 1, "cloud_tpu", ("10.0.0.2", "10.0.0.3"))
    texts["worker-network-endpoints"] = "10.0.0.2,10.0.0.3"
    texts["tpu-env"] = "ZONE: 'z'\n" + "\n".join(f"{name}: '{value}'" for name, value in SLICES.items())
    assert find(environ, "cloud_tpu")[:3] == (f"tpu-0-0.svc:{PORT}", 4, 3)
    texts["worker-network-endpoints"] = "10.0.0.2"
    texts.update({"tpu-env": "", "agent-worker-number": "0"})
    assert find(environ, "cloud_tpu") is None
