"""What a chain of restarts remembers, and when it ends for good."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import chain
from dist_train.chain import Cause, begin, record
from dist_train.failure import ChainNotes, is_follower
from tests.faults import Fault, train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import small

CHAIN = "a-chain"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path


def attempt(folder: Path, number: int, *, step: int = 0, stopped: bool = False) -> chain.Beginning:
    return begin(folder, chain=CHAIN, attempt=number, world_size=2, step=step, stopped=stopped)


def fail(folder: Path, number: int, *, step: int = 7, message: str = "bad", rank: int = 1) -> Any:
    cause = Cause(attempt=number, rank=rank, step=step, type="ValueError", message=message)
    return record(folder, CHAIN, cause, "Traceback: here")


def test_the_third_same_exception_at_a_step_ends_the_chain(folder: Path) -> None:
    for number in range(2):
        assert attempt(folder, number).refusal is None
        assert fail(folder, number, message=f"bad at 0x{number}f of {number}") is None
    attempt(folder, 2)
    line = fail(folder, 2, message="bad at 0x77f of 5")
    assert "rank 1 failed at step 7: ValueError: bad" in line
    assert "give the command again" in line
    assert str(chain.failure_file(folder, 2, 1)) in line
    assert chain.read(folder).exit_code == 93


@pytest.mark.parametrize("other", [{"step": 8}, {"message": "worse"}])
def test_another_step_or_another_exception_is_not_the_same(folder: Path, other: dict) -> None:
    for number in range(4):
        attempt(folder, number)
        assert fail(folder, number, **(other if number % 2 else {})) is None
    attempt(folder, 4)
    assert fail(folder, 4) is not None, "the third of its kind, with others in between"


def test_an_exception_at_a_step_that_was_passed_is_forgotten(folder: Path) -> None:
    for number in range(3):
        attempt(folder, number, step=0 if number < 2 else 8)
        assert fail(folder, number) is None


def test_ten_deaths_without_progress_end_the_chain(folder: Path) -> None:
    waits = []
    for number in range(10):
        beginning = attempt(folder, number)
        assert beginning.refusal is None
        waits.append(beginning.wait_sec)
    refusal = attempt(folder, 10).refusal
    assert refusal is not None
    assert "10 attempts in a row ended without a checkpoint beyond step 0" in refusal
    assert waits == [0, 0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_progress_sets_the_count_of_deaths_back(folder: Path) -> None:
    for number in range(40):
        assert attempt(folder, number, step=number // 5).refusal is None


def test_a_preemption_is_no_death(folder: Path) -> None:
    for number in range(40):
        beginning = attempt(folder, number, stopped=number > 0)
        assert beginning.refusal is None
        assert beginning.wait_sec == 0


def test_attempts_that_never_began_count_as_deaths(folder: Path) -> None:
    attempt(folder, 0)
    assert attempt(folder, 9).refusal is None
    assert attempt(folder, 10).refusal is not None


def test_a_new_command_counts_from_zero(folder: Path) -> None:
    for number in range(11):
        attempt(folder, number)
    assert chain.read(folder).exit_code == 93
    begin(folder, chain="another", attempt=0, world_size=2, step=0, stopped=False)
    memory = chain.read(folder)
    assert (memory.endings, memory.exit_code, memory.failures) == (0, None, [])
    begin(folder, chain="another", attempt=0, world_size=2, step=0, stopped=False)
    assert chain.read(folder).endings == 0, "the same SLURM job, torchrun started again"


def test_the_first_cause_wins(folder: Path) -> None:
    attempt(folder, 0)
    fail(folder, 0, rank=1, message="first")
    fail(folder, 0, rank=0, message="second")
    earlier = attempt(folder, 1).earlier
    assert earlier == "rank 1 failed at step 7: ValueError: first"
    assert "here" in chain.failure_file(folder, 0, 0).read_text(), (
        "its traceback is kept all the same"
    )


def test_the_rank_that_saw_nothing_is_the_one_that_died(folder: Path) -> None:
    attempt(folder, 0)
    chain.witness(folder, CHAIN, rank=0, step=12)
    assert attempt(folder, 1).earlier == "rank 1 died without a word after step 12 (killed?)"


def test_a_torn_file_is_an_empty_memory(folder: Path) -> None:
    attempt(folder, 0)
    whole = (folder / "chain.json").read_text()
    for text in ("", whole[: len(whole) // 2], "[]", "{}", '{"chain": 1}'):
        (folder / "chain.json").write_text(text)
        assert attempt(folder, 3).refusal is None
        assert chain.read(folder).chain == CHAIN


def _notes(config: Any) -> tuple[int | None, int | None]:
    from dist_train.claim import open_run
    from dist_train.distributed import start_ranks

    with start_ranks(config) as ranks, open_run(config, ranks) as run:
        found = run.chain.micro_batch_size
        run.chain.remember_micro_batch(8 * (ranks.rank + 1))
        ranks.barrier()
        return found, chain.read(run.path).micro_batch_size


@pytest.mark.slow
def test_the_next_attempt_of_a_chain_knows_the_micro_batch(tmp_path: Path) -> None:
    config = small(tmp_path)
    assert run_ranks(_notes, 2, config) == [(None, 8)] * 2, "the smallest of all ranks counts"
    env = {"TORCHELASTIC_RESTART_COUNT": "1", "DIST_TRAIN_CHAIN": CHAIN}
    begin(tmp_path, chain=CHAIN, attempt=0, world_size=2, step=0, stopped=False)
    chain.remember_micro_batch(tmp_path, CHAIN, 6)
    outcomes = start_ranks_of(_notes, 2, config, env=env)
    assert [o.value for o in outcomes] == [(6, 6)] * 2, outcomes[0].trace
    assert run_ranks(_notes, 2, config) == [(None, 8)] * 2, "another chain knows nothing"


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", True),
        ("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms for recv", True),
        (
            "[enforce fail at ../gloo/transport/tcp/pair.cc:474] op.preamble.length <= op.nbytes",
            False,
        ),
        ("Connection closed by peer", False),
        ("DataLoader worker (pid 7) is killed by signal: Killed", False),
    ],
)
def test_what_a_rank_says_when_another_ends_is_no_cause(text: str, follows: bool) -> None:
    assert is_follower(RuntimeError(text)) is follows
    assert not is_follower(ValueError(text))


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
REMOTE = (
    f"{NCCL}remote process exited or there was a network error, NCCL version 2.28.9\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer node1<40211>"
)
OF_CUDA = (
    f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure "
)


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        (REMOTE, True),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", True),
        ("NCCL communicator was aborted on rank 1.", True),
        (f"NCCL communicator was aborted on rank 1. Original reason: {REMOTE}", True),
        (f"NCCL communicator was aborted on rank 1. Original reason: {OF_CUDA}999", False),
        (f"{OF_CUDA}700 'an illegal memory access was encountered'", False),
        (f"{OF_CUDA}702 'the launch timed out and was terminated'", False),
        (f"{OF_CUDA}2 'out of memory'", False),
        (f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details)", False),
        (f"{NCCL}internal error - please report this issue to the NCCL developers", False),
        (f"{NCCL}invalid argument (run with NCCL_DEBUG=WARN for details)", False),
        (f"{NCCL}invalid usage (run with NCCL_DEBUG=WARN for details)", False),
        ("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1", True),
        ("[enforce fail at /pytorch/gloo/transport/tcp/pair.cc:474] timeout", False),
    ],
)
def test_what_a_rank_has_itself_is_a_cause_whoever_tells_it(text: str, follows: bool) -> None:
    assert is_follower(torch.distributed.DistBackendError(text)) is follows


KINDS = {
    "exception": "rank 1 failed at step 5: RuntimeError: an injected exception",
    "KeyboardInterrupt": "rank 1 failed at step 5: KeyboardInterrupt:",
    "sys.exit": "rank 1 failed at step 5: SystemExit: 0",
    "segfault": "rank 1 died: Segmentation fault (its stack is in",
    "abort": "rank 1 died: Aborted (its stack is in",
    "exit": "rank 1 died without a word after step 5 (killed?)",
    "exit 0": "rank 1 died without a word after step 5 (killed?)",
    "signal": "rank 1 died without a word after step 5 (killed?)",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_attempt_tells_the_first_cause(kind: str, tmp_path: Path) -> None:
    config = small(tmp_path / "run", "train.steps=9", "checkpoint.every_steps=4")
    mark = tmp_path / "fired"
    fault = Fault(rank=1, step=5, place="after the backward", kind=kind, mark=str(mark))
    variables = {"DIST_TRAIN_CHAIN": CHAIN, "MASTER_ADDR": "127.0.0.1"}
    outcomes = start_ranks_of(
        train_with, 2, config, fault, env=variables | {"TORCHELASTIC_RESTART_COUNT": "0"}
    )
    assert mark.exists(), "the fault never fired"
    assert type(outcomes[0].error).__name__ == "RankFailedError", outcomes[0].trace
    again = start_ranks_of(
        train_with, 2, config, None, env=variables | {"TORCHELASTIC_RESTART_COUNT": "1"}
    )
    assert again[0].error is None, again[0].trace
    log = (tmp_path / "run" / "log" / "rank0.txt").read_text()
    assert f"*** restart 1 from step 4: {KINDS[kind]}" in log
    if kind in ("exception", "segfault", "abort"):
        kept = [p for p in (tmp_path / "run" / "log").iterdir() if "failure-0-rank1" in p.name]
        assert len(kept) == 1
        assert "faults.py" in kept[0].read_text(), "the traceback leads to the place"


@pytest.mark.slow
def test_a_repeated_exception_ends_with_93_on_the_third_attempt(tmp_path: Path) -> None:
    config = small(tmp_path / "run", "train.steps=9")
    for number in range(3):
        mark = tmp_path / f"fired_{number}"
        fault = Fault(rank=1, step=3, place="before the step", kind="exception", mark=str(mark))
        env = {"DIST_TRAIN_CHAIN": CHAIN, "TORCHELASTIC_RESTART_COUNT": str(number)}
        outcomes = start_ranks_of(train_with, 2, config, fault, env=env)
        assert mark.exists(), "the fault never fired"
        ended = type(outcomes[1].error).__name__
        assert ended == ("RepeatedFailureError" if number == 2 else "RuntimeError")
    env = {"DIST_TRAIN_CHAIN": CHAIN, "TORCHELASTIC_RESTART_COUNT": "3"}
    outcomes = start_ranks_of(train_with, 2, config, None, env=env)
    assert {type(o.error).__name__ for o in outcomes} == {"EarlierFailureError"}
    assert {getattr(o.error, "exit_code", None) for o in outcomes} == {93}
    assert run_ranks(train_with, 2, config, None)[0]["state"] == "finished", "a new command may"


def test_notes_outlive_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    assert run_ranks(_told_by_the_store, 2, small(tmp_path), str(tmp_path / "elsewhere")) == [
        "rank 1 failed at step 4: ValueError: far away",
        "none",
    ]


def _told_by_the_store(config: Any, elsewhere: str) -> str:
    from dist_train.claim import open_run
    from dist_train.distributed import start_ranks

    with start_ranks(config) as ranks, open_run(config, ranks) as run:
        if ranks.rank == 1:
            notes = ChainNotes(Path(elsewhere), ranks, None)
            notes.first_cause(ValueError("far away"), 4)
            ranks.barrier()
            return "none"
        ranks.barrier()
        told = run.chain.follow(RuntimeError("gloo: Connection closed"), 4)
        cause = chain.read(run.path).cause
        assert cause is not None
        assert cause.rank == 1
        return str(told)
