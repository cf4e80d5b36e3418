"""`dist-train run`: check the command, start torchrun, and answer with the run's own exit code."""

import argparse
import os
import shutil
import socket
import subprocess
import sys

from dist_train.config import ConfigError
from dist_train.config.arguments import (
    NODES_VARIABLE,
    Parser,
    Request,
    add_run_options,
    compose_request,
    print_error,
    words_of,
)
from dist_train.config.check import check_world
from dist_train.config.identity import run_dir_of
from dist_train.layout import detect_layout
from dist_train.slurm_step import Task, find_task
from dist_train.torchrun_here import ALONE, leftovers, without_leftovers
from launch.supervise import supervise

MAX_RESTARTS = 1_000_000  # the limits are those of the run's chain.json, not torchrun's


def main(argv: list[str]) -> int:
    """Run `dist-train run`; returns 0 finished or saved, 2 the user's mistake, 93 do not repeat."""
    try:
        options, request = _parse(argv)
        if options.master_port is not None:
            _check_port(options.master_port)
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    if request.text is not None:
        sys.stdout.write(request.text + "\n")
        return 0
    if options.dry_run:
        command = [sys.executable, "-m", "dist_train", *words_of(options), "--dry-run"]
        ranks = {"DIST_TRAIN_DRY_RUN_RANKS": str(options.nproc * options.nnodes)}
        return subprocess.call(command, env=_with_threads(options.nproc) | ranks)
    ignored = leftovers(os.environ, num_nodes=options.nnodes, num_local_ranks=options.nproc)
    if ignored is not None:
        sys.stderr.write(f"dist-train: {ignored}\n")
    command = torchrun_command(options)
    environment = _with_threads(options.nproc) | {NODES_VARIABLE: str(options.nnodes)}
    environment = without_leftovers(environment, num_nodes=options.nnodes)
    return supervise(
        command,
        environment,
        run_dir_of(request.config),
        chain=options.chain,
        attempt=options.attempt,
    )


def _parse(argv: list[str]) -> tuple[argparse.Namespace, Request]:
    parser = Parser(prog="dist-train run", description="Start a training on this machine.")
    parser.add_argument("--nproc", default="auto", help="ranks here: a number, or auto (the GPUs)")
    parser.add_argument(
        "--nnodes", type=int, help="machines that take part; in a SLURM step all of its nodes"
    )
    parser.add_argument("--rdzv-id", default="dist_train", help="the same on all machines of a run")
    parser.add_argument("--rdzv-endpoint", help="HOST:PORT on one of them, with --nnodes")
    parser.add_argument("--master-port", type=int, help="a fixed port, for one machine")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=MAX_RESTARTS,
        help="torchrun's own limit; there are better ones",
    )
    add_run_options(parser)
    options = parser.parse_intermixed_args(argv)
    options.nproc = _number_of_ranks(options.nproc)
    options.chain, options.attempt = None, 0
    task, _ = find_task(os.environ)
    if task is not None and options.nnodes is None:
        _take_part(options, task)
    options.nnodes = options.nnodes or 1
    if options.nnodes > 1 and not options.rdzv_endpoint:
        raise ConfigError("--nnodes needs --rdzv-endpoint HOST:PORT of one of the machines")
    request = compose_request(options)
    check_world(request.config, options.nproc * options.nnodes)
    return options, request


def _take_part(options: argparse.Namespace, task: Task) -> None:
    """Let this machine's torchrun meet those of the step's other nodes.

    Raises:
        ConfigError: srun started more than one on a node.
    """
    if task.num_tasks != len(task.nodes):
        raise ConfigError(
            f"srun started {task.num_tasks} tasks on {len(task.nodes)} nodes, and `dist-train run` "
            "starts the ranks of a whole node: use srun --ntasks-per-node=1, or one task for each "
            "GPU of `python -m dist_train`"
        )
    layout = detect_layout(os.environ)
    options.nnodes = task.num_tasks
    options.rdzv_id = f"{task.job}.{task.step}-{layout.attempt}"
    options.rdzv_endpoint = f"{layout.master_addr}:{layout.master_port}"
    options.chain, options.attempt = layout.chain, layout.attempt


def _number_of_ranks(asked: str) -> int:
    if asked == "auto":
        return count_gpus() or min(2, len(os.sched_getaffinity(0)))
    if not asked.isdigit() or int(asked) < 1:
        raise ConfigError(f"--nproc={asked} must be auto or a number from 1 on")
    return int(asked)


def count_gpus() -> int:
    """Return the number of visible NVIDIA GPUs, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _check_port(port: int) -> None:
    """Refuse a port that torchrun could not listen on: it would die with a traceback."""
    if not 0 < port < 2**16:
        raise ConfigError(f"--master-port={port} is out of range: give one from 1 to 65535")
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be used here ({os.strerror(error.errno or 0)}): choose another "
            "--master-port, or leave it out for a free one"
        ) from None


def _with_threads(num_local_ranks: int) -> dict[str, str]:
    """Return the environment with each rank's fair share of the cores, unless the user set it.

    torchrun would set 1 thread and print a banner; whoever reads this knows it is no such 1.
    """
    share = max(1, len(os.sched_getaffinity(0)) // num_local_ranks)
    return {"OMP_NUM_THREADS": str(share)} | os.environ


def torchrun_command(options: argparse.Namespace) -> list[str]:
    """Return the torchrun command that starts the ranks of this machine.

    dist_train.agent is torchrun's own main(), and tells how each attempt ended.
    """
    command = [sys.executable, "-m", "dist_train.agent"]
    command += [f"--nproc-per-node={options.nproc}", f"--max-restarts={options.max_restarts}"]
    if options.nnodes > 1:
        command += [f"--nnodes={options.nnodes}", f"--rdzv-id={options.rdzv_id}"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={options.rdzv_endpoint}"]
    elif options.master_port is not None:
        command += [f"--master-port={options.master_port}"]
    else:
        command += ALONE
    return [*command, "-m", "dist_train", *words_of(options)]
