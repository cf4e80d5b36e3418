"""A real SLURM cluster on this machine: slurmctld, and one slurmd in the namespaces of each node.

A node has its own address, host name, processes and /etc/hosts, so that ranks meet over virtual
cables which can be cut, and a node's power can be taken away. Needs root (network namespaces) and
the packages PACKAGES of Debian or Ubuntu.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
START_SEC = 120.0
# PID 1 of a node: it starts slurmd, and reaps what is left behind.
NODE = """hostname {node}; mount --bind {hosts} /etc/hosts; slurmd -D -N {node} &
while :; do wait -n || [ $? != 127 ] || sleep 1; done"""


def why_not() -> str | None:
    """Return why no cluster can be started here, or None."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in COMMANDS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install {' '.join(PACKAGES)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return None


@dataclass(kw_only=True)
class Cluster:
    """A running cluster; its files lie under `base`."""

    base: Path
    num_nodes: int = 4
    cpus: int = 4  # of a node; they need not exist
    gpus: int = 0  # of a node; each is a device file without a driver
    kill_wait: int = 5  # seconds from SIGTERM to SIGKILL
    loopback_names: bool = False  # a node's own name leads to 127.0.1.1, as Debian has it
    env: dict[str, str] = field(default_factory=dict)
    _net: str = ""
    _tag: str = ""
    _processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(self) -> None:
        """Start the controller and every node, and wait until all are idle."""
        self._tag = f"s{random.randrange(16**5):05x}"
        self._net = f"10.{random.randrange(100, 200)}.{random.randrange(250)}"
        for name in ("etc", "state", "log", "spool", "run", "dev"):
            (self.base / name).mkdir(parents=True)
        self._configure(_free_ports(self.num_nodes + 1))
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        self.env = {"SLURM_CONF": str(self.base / "etc/slurm.conf"), "PATH": path}
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self._net}.1/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        self._spawn("slurmctld", ["slurmctld", "-D", "-c"])  # -c: it has no jobs
        for number in range(1, self.num_nodes + 1):
            self._cable(number)
            self.boot(number)
        self.wait_for_nodes()

    def stop(self) -> None:
        """End every process of the cluster and take its cables and namespaces away."""
        for number in range(1, self.num_nodes + 1):
            self.crash(number)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for number in range(1, self.num_nodes + 1):
            subprocess.run(["ip", "link", "del", self._port(number)], capture_output=True)
            subprocess.run(["ip", "netns", "del", self._namespace(number)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    def boot(self, number: int) -> None:
        """Start a node."""
        node = f"node{number}"
        (self.base / "spool" / node).mkdir(exist_ok=True)
        own = self.base / "etc" / f"hosts.{node}"
        script = NODE.format(node=node, hosts=own if own.exists() else self.base / "etc/hosts")
        words = ["nsenter", f"--net=/run/netns/{self._namespace(number)}", "unshare", "--uts"]
        words += ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._spawn(node, [*words, "bash", "-c", script])

    def crash(self, number: int) -> None:
        """Take a node's power away: all its processes die at once."""
        process = self._processes.get(f"node{number}")
        if process is not None and process.poll() is None:
            process.kill()  # with it dies PID 1 of the node, and with that all others
            process.wait()

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Kill the controller, and start it again at the end, with what it knew."""
        self._processes["slurmctld"].kill()
        self._processes["slurmctld"].wait()
        try:
            yield
        finally:  # the other tests of this cluster need it
            self._spawn("slurmctld", ["slurmctld", "-D"])

    def cut(self, number: int) -> None:
        """Cut a node's cable."""
        _run("ip", "link", "set", self._port(number), "down")

    def heal(self, number: int) -> None:
        """Plug it in again."""
        _run("ip", "link", "set", self._port(number), "up")

    def wait_for_nodes(self) -> None:
        """Wait until every node is idle."""
        end = time.monotonic() + START_SEC
        while time.monotonic() < end:
            states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
            if states == ["idle"] * self.num_nodes:
                return
            time.sleep(0.1)
        raise AssertionError(f"nodes not idle:\n{self.state()}")

    def clear(self) -> None:
        """Cancel the jobs that are left, and wait until every node is idle."""
        left = self.run("squeue", "-h", "-o", "%A").split()
        if left:
            self.run("scancel", *left)
        self.wait_for_nodes()

    def state(self) -> str:
        """Return the nodes, the jobs, and the end of the controller's log."""
        log = (self.base / "log/slurmctld.log").read_text(errors="replace")
        nodes = self.run("sinfo", "-N", "-l", "-p", "main") + self.run("sinfo", "-R")
        return f"{nodes}{self.run('squeue')}{log[-3000:]}"

    def run(self, *words: str, **variables: str) -> str:
        """Run a command where the cluster's commands are found; returns what it wrote."""
        env = os.environ | self.env | variables
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def on_node(self, number: int, *words: str) -> str:
        """Run a command in a node's network namespace; returns what it wrote."""
        return self.run("nsenter", f"--net=/run/netns/{self._namespace(number)}", *words)

    def _configure(self, ports: list[int]) -> None:
        etc, gres = self.base / "etc", ""
        lines = []
        if self.gpus:
            gres = f" Gres=gpu:{self.gpus}"
            for gpu in range(self.gpus):  # any character device will do
                os.mknod(self.base / f"dev/gpu{gpu}", 0o20666, os.makedev(1, 3))
            files = f"{self.base}/dev/gpu[0-{self.gpus - 1}]"
            text = f"AutoDetect=off\nNodeName=node[1-{self.num_nodes}] Name=gpu File={files}\n"
            (etc / "gres.conf").write_text(text)
        for number in range(1, self.num_nodes + 1):
            lines.append(
                f"NodeName=node{number} NodeHostname=node{number} NodeAddr={self.address(number)} "
                f"Port={ports[number]} CPUs={self.cpus} RealMemory=4000{gres} State=UNKNOWN"
            )
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # slurmd wants one, unused
        template = Path(__file__).with_name("slurm.conf.in").read_text()
        host = socket.gethostname().partition(".")[0]
        text = template.format(
            name=self._tag,
            host=host,
            address=f"{self._net}.1",
            port=ports[0],
            user="root",
            base=self.base,
            kill_wait=self.kill_wait,
            nodes="\n".join(lines),
        )
        (etc / "slurm.conf").write_text(text)
        names = [f"{self.address(n)} node{n}" for n in range(1, self.num_nodes + 1)]
        text = "\n".join(["127.0.0.1 localhost", f"{self._net}.1 {host}", *names, ""])
        (etc / "hosts").write_text(text)
        for number in range(1, self.num_nodes + 1 if self.loopback_names else 1):
            own = text.replace(f"{self.address(number)} ", "127.0.1.1 ")
            (etc / f"hosts.node{number}").write_text(own)

    def address(self, number: int) -> str:
        """Return a node's address."""
        return f"{self._net}.{10 + number}"

    def _cable(self, number: int) -> None:
        space, port = self._namespace(number), self._port(number)
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", port, "master", self._bridge, "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "-n", space, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _spawn(self, name: str, words: list[str]) -> None:
        with (self.base / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                words,
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def _bridge(self) -> str:
        return f"{self._tag}-br"

    def _port(self, number: int) -> str:
        return f"{self._tag}-v{number}"

    def _namespace(self, number: int) -> str:
        return f"{self._tag}-n{number}"


@contextlib.contextmanager
def running_cluster(**settings: Any) -> Iterator[Cluster]:
    """Yield a cluster that runs (settings: those of Cluster), and leave nothing of it behind."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(base=Path(folder) / "c", **settings)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _free_ports(count: int) -> list[int]:
    """Return as many free ports in a row, below those of outgoing connections."""
    for _ in range(200):
        first = random.randrange(5000, 9500)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return list(range(first, first + count))
    raise AssertionError("no free ports")


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
