"""torchrun on this machine alone meets at 127.0.0.1 and takes nothing from leftover variables."""

import argparse

import pytest

from dist_train.torchrun_here import OF_THE_COMMAND, leftovers, without_leftovers
from launch.local import torchrun_command


def told(env: dict[str, str], num_nodes: int = 1) -> str | None:
    return leftovers(env, num_nodes=num_nodes, num_local_ranks=2)


def test_what_contradicts_the_command_is_dropped_and_told() -> None:
    env = {"PET_NNODES": "2", "PET_MASTER_ADDR": "pod-0", "PET_LOG_DIR": "/logs", "HOME": "/me"}
    assert without_leftovers(env, num_nodes=1) == {"PET_LOG_DIR": "/logs", "HOME": "/me"}
    line = told(env)
    assert line is not None
    assert line.startswith("PET_MASTER_ADDR=pod-0, PET_NNODES=2 of the environment is ignored")
    assert "for 2 ranks on this machine; for others give --nproc, --nnodes" in line
    assert told({"PET_RDZV_CONF": "timeout=9"}, num_nodes=2) is None, "it may be needed"
    assert "2 ranks on each of 3 machines" in (told({"PET_NNODES": "2"}, num_nodes=3) or "")


@pytest.mark.parametrize(
    "env",
    [
        {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "2"},
        {"PET_NNODES": "1:1", "PET_MAX_RESTARTS": "3", "PET_TEE": "3"},
        {},
    ],
)
def test_what_says_the_same_is_not_worth_a_word(env: dict[str, str]) -> None:
    assert told(env) is None


def test_what_torchrun_takes_from_the_environment_is_sorted() -> None:
    from torch.distributed.run import get_args_parser

    harmless = {"help", "log_dir", "redirects", "tee", "role", "start_method", "monitor_interval"}
    harmless |= {
        "event_log_handler",
        "log_line_prefix_template",
        "local_ranks_filter",
        "logs_specs",
    }
    harmless |= {"duplicate_stdout_filters", "duplicate_stderr_filters", "numa_binding"}
    harmless |= {"signals_to_handle", "shutdown_timeout", "virtual_local_rank", "print_completion"}
    harmless |= {"rdzv_conf", "local_addr", "training_script", "training_script_args"}
    known = {name.lower() for name in OF_THE_COMMAND}
    assert {action.dest for action in get_args_parser()._actions} <= known | harmless


def test_ranks_of_one_machine_meet_at_its_loopback() -> None:
    options = argparse.Namespace(
        nproc=2,
        nnodes=1,
        master_port=None,
        max_restarts=3,
        overrides=[],
        config=None,
        config_dir=None,
    )
    words = torchrun_command(options)
    assert "--standalone" in words
    assert "--local-addr=127.0.0.1" in words
