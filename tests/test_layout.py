"""Who a process is, by the launcher's variables, and what is refused in the table of ranks."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_train import build, device, slurm_step
from dist_train.build import precision_in_force
from dist_train.config import Config, ConfigError, ParallelConfig
from dist_train.config.arguments import VERDICT_VARIABLE
from dist_train.device import bind_device, check_precision, threads_of
from dist_train.layout import (
    Layout,
    Registration,
    check_registrations,
    detect_layout,
    elastic_nodes,
    word_of_torchrun,
)
from dist_train.slurm_step import hosts_of

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def entry(rank: int, **changed: Any) -> Registration:
    fields: dict[str, Any] = {
        "rank": rank,
        "local_rank": rank % 2,
        "world_size": 4,
        "host": f"node{rank // 2}",
        "pid": 100 + rank,
        "device": f"GPU-{rank % 2}",
        "config_hash": "aa",
        "versions": "torch 2",
    }
    return Registration(**(fields | changed))


def table(**of_rank_3: Any) -> list[Registration]:
    return [*(entry(rank) for rank in range(3)), entry(3, **of_rank_3)]


def test_a_sane_table_is_accepted() -> None:
    assert check_registrations(table(), 4) is None
    assert check_registrations([entry(r, device="cpu") for r in range(4)], 4) is None


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        (table(device="GPU-0"), ("rank 2 and rank 3 are both on GPU GPU-0 of node1", "--gpu-bind")),
        (table()[:3], ("rank 3 of 4 did not come", "--nproc-per-node", "--nnodes")),
        ([*table()[:3], entry(0)], ("two processes are rank 0", "--node-rank")),
        (table(world_size=8), ("rank 3 on node1 was told world_size=8, rank 0 4", "--nnodes")),
        (table(config_hash="bb"), ("rank 3 on node1 has other settings", "same command")),
        (table(versions="torch 1"), ("has other software (torch 1)", "installation")),
        (table(device="cpu"), ("rank 3 on node1 sees no GPU while others do", "device=cpu")),
        (table(error="no luck: buy some"), ("rank 3 on node1: no luck: buy some",)),
    ],
)
def test_nonsense_is_one_sentence(ranks: list[Registration], told: tuple[str, ...]) -> None:
    sentence = check_registrations(ranks, 4)
    assert sentence is not None
    assert "\n" not in sentence
    for part in told:
        assert part in sentence


def test_torchruns_variables() -> None:
    layout = detect_layout(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert (layout.launcher, layout.rank, layout.local_rank) == ("torchrun", 5, 1)
    assert (layout.world_size, layout.local_world_size, layout.attempt) == (8, 4, 2)
    assert (layout.master_addr, layout.master_port) == ("node1", 29500)


def test_a_slurm_steps_variables() -> None:
    layout = detect_layout(SLURM)
    assert (layout.launcher, layout.rank, layout.local_rank) == ("slurm", 5, 1)
    assert (layout.world_size, layout.local_world_size) == (7, 3)
    assert layout.master_addr == "gpu07"
    assert 15000 <= layout.master_port < 30000
    requeued = detect_layout(SLURM | {"SLURM_RESTART_COUNT": "1"})
    assert requeued.master_port != layout.master_port
    assert requeued.chain == layout.chain


def test_no_launcher_is_one_process() -> None:
    assert detect_layout({"PATH": "/bin"}) == Layout(launcher="single")


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "start with torchrun, or unset RANK and WORLD_SIZE"),
    ],
)
def test_broken_variables_are_refused(env: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        detect_layout(env)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("rack[1-2]node[03-04,9],login", "rack1node03 rack1node04 rack1node9 rack2node03 "
         "rack2node04 rack2node9 login"),
        ("a[1],b[2-4]", "a1 b2 b3 b4"),
        ("rack[1-2]node[3-4]", "rack1node3 rack1node4 rack2node3 rack2node4"),
        ("n1,n2", "n1 n2"),
        ("n1,n[3-4]", "n1 n3 n4"),
        ("gpu[008-011]", "gpu008 gpu009 gpu010 gpu011"),
        ("n[7,9]-ib", "n7-ib n9-ib"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)  # fmt: skip
def test_every_form_of_slurms_list_of_nodes(nodes: str, hosts: str) -> None:
    assert hosts_of(nodes) == hosts.split()


@pytest.mark.parametrize("nodes", ["n[1-", "n1]", "n[a-b]", "n[]"])
def test_what_is_no_list_of_nodes(nodes: str) -> None:
    with pytest.raises(ConfigError, match="list of nodes"):
        hosts_of(nodes)


ALLOCATION = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "bash"}
STRANGER = str(2**22 + 1)  # no process has a number above Linux's PID_MAX_LIMIT


@pytest.mark.parametrize(
    ("env", "launcher", "rule"),
    [
        ({}, "single", "no launcher"),
        (ALLOCATION, "single", "in the allocation of SLURM job 77 but not started by srun"),
        (ALLOCATION | {"SLURM_PROCID": "0"}, "single", "in the allocation of SLURM job 77"),
        (SLURM, "slurm", "SLURM step 77.0"),
        (SLURM | TORCHRUN, "torchrun", "torchrun"),
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, "slurm", "SLURM step 77.0"),
        (SLURM | {"SLURM_STEP_ID": str(0xFFFF_FFFA)}, "single", "interactive shell is no srun"),
        (SLURM | {"SLURM_TASK_PID": str(os.getpid())}, "slurm", "SLURM step 77.0"),
        (SLURM | {"SLURM_TASK_PID": str(os.getppid())}, "slurm", "SLURM step 77.0"),
        (SLURM | {"SLURM_TASK_PID": STRANGER}, "single", "SLURM step 77.0 are left over"),
    ],
)
def test_who_started_this_process(
    env: dict[str, str], launcher: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_step, "_pid_namespace", lambda: slurm_step.FIRST_PID_NAMESPACE)
    layout = detect_layout(env | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"})
    assert layout.launcher == launcher
    assert rule in layout.rule


def test_a_shell_in_a_step_is_no_task_of_it() -> None:
    env = SLURM | {"SLURM_PTY_PORT": "4711"}
    shell = detect_layout(env | {"SLURM_TASK_PID": str(os.getppid())})
    assert (shell.launcher, shell.world_size) == ("single", 1)
    assert "interactive shell in SLURM step 77.0 (srun --pty)" in shell.rule
    direct = detect_layout(env | {"SLURM_TASK_PID": str(os.getpid())})
    assert direct.launcher == "slurm", "srun --pty python -m dist_train"


@pytest.mark.parametrize(("running", "launcher"), [(True, "slurm"), (False, "single")])
def test_in_a_container_slurm_is_asked(
    running: bool, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_step, "_pid_namespace", lambda: 4711)
    monkeypatch.setattr(slurm_step, "_is_running", lambda job: running)
    assert detect_layout(SLURM | {"SLURM_TASK_PID": STRANGER}).launcher == launcher


def test_the_attempt_goes_on_where_the_batch_job_says() -> None:
    told = {"DIST_TRAIN_CHAIN": "slurm-77", "DIST_TRAIN_ATTEMPT": "5"}
    layout = detect_layout(SLURM | told | {"SLURM_RESTART_COUNT": "2"})
    assert (layout.chain, layout.attempt) == ("slurm-77", 5)
    layout = detect_layout(TORCHRUN | told | {"TORCHELASTIC_RESTART_COUNT": "2"})
    assert (layout.chain, layout.attempt) == ("slurm-77", 7)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "127.0.1.1"])
def test_an_address_that_leads_every_node_to_itself_is_told(address: str) -> None:
    with pytest.raises(ConfigError) as refused:
        detect_layout(SLURM | {"MASTER_ADDR": address})
    wrong, cure = str(refused.value).split(": unset it")
    assert wrong.startswith(f"MASTER_ADDR={address} leads each of the 2 nodes to itself")
    assert "(gpu07)" in cure
    alone = SLURM | {"SLURM_STEP_NODELIST": "gpu07", "MASTER_ADDR": address}
    assert detect_layout(alone).master_addr == address
    assert detect_layout(SLURM | {"MASTER_ADDR": "gpu07"}).master_addr == "gpu07"


def test_the_words_of_a_torchrun_that_cannot_be_seen() -> None:
    """Without /proc, in another PID namespace (its parent is 0), or another user's."""
    assert elastic_nodes(0, {}) is None
    assert elastic_nodes(0, {"PET_NNODES": "1:2"}) == "1:2"
    nobody = 2**22 + 1  # beyond the largest process id
    assert elastic_nodes(nobody, {"PET_NNODES": "2"}) is None
    command = [sys.executable, "-c", "input()", "--rdzv_endpoint", "a:1", "--nnodes=1:3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        end = time.monotonic() + 30
        while elastic_nodes(parent.pid, {}) is None:  # until it has become the command
            assert time.monotonic() < end
        assert elastic_nodes(parent.pid, {"PET_NNODES": "4:5"}) == "1:3"
        assert word_of_torchrun("rdzv-endpoint", parent.pid, {}) == "a:1"
        parent.communicate(b"")


def place(local_rank: int, local_world_size: int, launcher: str = "torchrun") -> Layout:
    return Layout(
        launcher=launcher,
        rank=local_rank,
        local_rank=local_rank,
        world_size=local_world_size,
        local_world_size=local_world_size,
    )


class Gpus:
    """As many GPUs as a test wants."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)
    ) -> None:
        self.bound: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", self.bound.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", self.properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B + device.index, pci_device_id=0)


def test_more_local_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, 2)
    assert bind_device(Config(), place(1, 3))[0] == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: 2 visible, 3 processes") as no:
        bind_device(Config(), place(2, 3))
    assert "start at most 2 (--nproc-per-node), or set device=cpu" in str(no.value)
    assert gpus.bound == [torch.device("cuda", 1)]


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_the_one_visible_gpu_is_taken_by_any_rank(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher may show each rank its own; the table finds out if it does not."""
    Gpus(monkeypatch, 1)
    assert bind_device(Config(), place(3, 4, launcher))[0] == torch.device("cuda", 0)


def test_a_task_of_slurm_that_sees_fewer_gpus_than_there_are_tasks_takes_one_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Gpus(monkeypatch, 2)
    taken = [bind_device(Config(), place(rank, 4, "slurm"))[0].index for rank in range(4)]
    assert taken == [0, 1, 0, 1], "two of its own each (--gpus-per-task=2), or the table refuses"


def test_a_gpu_without_a_name_has_that_of_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number, ranks that see one GPU each would seem to share it."""
    Gpus(monkeypatch, 2)
    names = [bind_device(Config(), place(rank, 2))[1] for rank in (0, 1)]
    assert names == ["0000:3b:00", "0000:3c:00"]


def test_device_cpu_binds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, 2)
    assert bind_device(Config(device="cpu"), place(5, 6)) == (torch.device("cpu"), "cpu")
    assert gpus.bound == []


def test_device_cuda_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match="torch sees no GPU: install a driver"):
        bind_device(Config(device="cuda"), place(0, 1))


def test_a_precision_that_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, 1, capability=(7, 5))
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with pytest.raises(ConfigError, match=r"8\.0 or newer, this one is 7\.5: use precision=fp16"):
        check_precision(Config(precision="bf16"), gpu)
    check_precision(Config(precision="fp16"), gpu)
    with pytest.raises(ConfigError, match="use precision=bf16 or fp32"):
        check_precision(Config(precision="fp16"), cpu)
    with pytest.raises(ConfigError, match="SyncBatchNorm refuses CPU"):
        check_precision(Config(parallel=ParallelConfig(sync_batchnorm=True)), cpu)


@pytest.mark.parametrize(
    ("capability", "units", "on_gpu", "on_cpu"),
    [
        ((7, 5), {"amx_bf16"}, "fp32", "bf16"),
        ((8, 0), {"avx2", "avx512_f", "avx512_vnni"}, "bf16", "fp32"),
        ((9, 0), {"avx512_bf16"}, "bf16", "bf16"),
        ((9, 0), {"neon", "bf16", "sve_bf16"}, "bf16", "fp32"),  # ARM: nothing is measured
    ],
)
def test_the_precision_follows_the_hardware(
    capability: tuple[int, int],
    units: set[str],
    on_gpu: str,
    on_cpu: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Gpus(monkeypatch, 1, capability=capability)
    has = dict.fromkeys(units, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert precision_in_force(Config(), torch.device("cuda", 0)) == (on_gpu, None)
    assert precision_in_force(Config(), torch.device("cpu")) == (on_cpu, None)
    assert precision_in_force(Config(precision="fp32"), torch.device("cuda", 0)) == ("fp32", None)


@pytest.mark.parametrize(
    ("units", "cap", "supported", "precision", "told"),
    [
        ({"avx512_f"}, "", True, "bf16", "emulates them at about a third of the speed of fp32"),
        ({"avx512_f"}, "", False, "fp32", "would emulate them many times slower than fp32"),
        ({"avx512_bf16"}, "", True, "bf16", None),
        ({"amx_bf16", "avx512_bf16"}, "", True, "bf16", None),
        ({"avx512_bf16"}, "AVX512_CORE", True, "bf16", "set precision=auto, which is fp32 here"),
        ({"avx512_bf16", "amx_bf16"}, "AVX512_CORE_BF16", True, "bf16", None),
        ({"neon", "bf16"}, "", True, "bf16", None),
    ],
)
def test_bf16_that_is_emulated_is_computed_as_asked_and_told(
    units: set[str],
    cap: str,
    supported: bool,
    precision: str,
    told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN says yes on any CPU with AVX-512: the instructions are asked for, and its own cap."""
    has = dict.fromkeys(units, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(device, "_onednn_cap", lambda: cap)
    monkeypatch.setattr(build, "_cpu_has_bf16", lambda: supported)
    cpu = torch.device("cpu")
    found, notice = precision_in_force(Config(precision="bf16"), cpu)
    assert found == precision
    assert (notice is None) if told is None else (told in (notice or ""))
    gains = notice is None and "bf16" not in units  # ARM's auto is fp32
    assert precision_in_force(Config(), cpu) == ("bf16" if gains else "fp32", None)
    assert device.has_amx() == ("amx_bf16" in units and cap == "")


@pytest.mark.parametrize(
    ("asked", "local_ranks", "launcher", "env", "threads"),
    [
        (3, 2, "torchrun", {"OMP_NUM_THREADS": "5"}, 3),  # the key wins
        (None, 2, "torchrun", {"OMP_NUM_THREADS": "5"}, 5),
        (None, 2, "torchrun", {"OMP_NUM_THREADS": "1"}, 6),  # torchrun's own
        (None, 1, "torchrun", {"OMP_NUM_THREADS": "1"}, 1),  # torchrun sets none for one rank
        (None, 2, "slurm", {"OMP_NUM_THREADS": "1"}, 1),
        (None, 2, "torchrun", {"OMP_NUM_THREADS": "1", VERDICT_VARIABLE: "x"}, 1),
        (None, 2, "torchrun", {}, 6),
        (None, 24, "torchrun", {}, 1),
    ],
)
def test_threads(
    asked: int | None,
    local_ranks: int,
    launcher: str,
    env: dict[str, str],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    assert threads_of(asked, place(0, local_ranks, launcher), env) == threads
