"""Row C9: damaged data sets, and many who want one at once."""

import hashlib
import os
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks.reliability.in_ranks import keep_output
from benchmarks.reliability.row import Row, Trial, check
from dist_train.config import ConfigError
from dist_train.data.cifar10 import CIFAR10
from dist_train.data.loaders import open_data
from dist_train.distributed import start_ranks
from tests.data.test_cifar10 import NAMES, write_batches
from tests.ranks import run_ranks
from tests.settings import small

DATA_FAULTS = ("truncated", "bit flipped", "missing", "archive damaged", "all at once")


def c9(trial: Trial) -> float | None:
    """CIFAR-10's files damaged, or downloaded by several processes at once."""
    kind = trial.one_of(DATA_FAULTS)
    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        served = trial.folder / "served"
        batches = write_batches(served, patch)
        if kind in ("archive damaged", "all at once"):
            return _download(trial, served, batches, damaged=kind == "archive damaged")
        root = trial.folder / "root"
        shutil.copytree(served, root)
        name = trial.dice.choice([*NAMES, "batches.meta"])
        path = root / CIFAR10.base_folder / name
        whole = bytearray(path.read_bytes())
        if kind == "truncated":
            path.write_bytes(whole[: trial.dice.randrange(len(whole))])
        elif kind == "bit flipped":
            whole[trial.dice.randrange(len(whole))] ^= 1 << trial.dice.randrange(8)
            path.write_bytes(whole)
        else:
            path.unlink()
        trial.fired = True
        told = run_ranks(load_here, 2, trial.folder, _facts(), False)
        for text in told:
            check(text is not None and name in text, f"{name} is not refused by name: {text}")
            check("\n" not in str(text), "the message has several lines")
    return time.monotonic() - begin


def _download(trial: Trial, served: Path, batches: Path, *, damaged: bool) -> float:
    """Three jobs of two ranks want an archive that none of them has."""
    archive = served / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, CIFAR10.base_folder)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    if damaged:
        data = bytearray(archive.read_bytes())
        data[trial.dice.randrange(len(data))] ^= 1 << trial.dice.randrange(8)
        archive.write_bytes(data)
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if "Method" not in self.headers:  # how torchvision looks for redirections
                asked.append(self.path)
            super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    begin = time.monotonic()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served))) as host:
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{host.server_port}/{CIFAR10.filename}"
        facts = _facts() | {"url": url, "tgz_md5": digest}
        (trial.folder / "root").mkdir()
        jobs = 1 if damaged else 3
        with ThreadPoolExecutor(jobs) as threads:
            futures = [
                threads.submit(run_ranks, load_here, 2, trial.folder, facts, True)
                for _ in range(jobs)
            ]
            told = [text for future in futures for text in future.result()]
        host.shutdown()
        thread.join()
    trial.fired = bool(asked)
    trial.notes["downloads"] = len(asked)
    if damaged:
        check(all(told), f"a damaged archive was believed: {told}")
        check(not list((trial.folder / "root").glob("cifar-10-batches-py")), "it was unpacked")
    else:
        check(told == [None] * 6, f"a rank failed: {told}")
        check(len(asked) == 1, f"downloaded {len(asked)} times")
    return time.monotonic() - begin


def _facts() -> dict[str, Any]:
    names = ("train_list", "test_list", "meta", "url", "tgz_md5")
    return {name: getattr(CIFAR10, name) for name in names}


def load_here(folder: Path, facts: dict[str, Any], download: bool) -> str | None:
    """Load CIFAR-10 as this rank does at a start; returns what it was told, or None."""
    keep_output(folder / f"out.{os.environ.get('RANK', '0')}.{os.getpid()}")
    os.environ["no_proxy"] = "127.0.0.1"
    words = ["data.name=cifar10", f"data.root={folder / 'root'}", "data.val_fraction=0.3"]
    words += [f"data.download={str(download).lower()}", "data.args={}"]
    config = small(folder / "run", *words, f"data.cache_dir={folder / 'cache'}")
    with ExitStack() as stack:
        for name, value in facts.items():
            stack.enter_context(mock.patch.object(CIFAR10, name, value))
        try:
            with start_ranks(config) as ranks:
                open_data(config, ranks)
        except ConfigError as error:
            return str(error)
    return None


ROWS = (
    Row(
        id="C9",
        promise="a damaged data set is refused before step 0 by the file's name; one download "
        "serves all ranks and jobs",
        injection=f"CIFAR-10: {', '.join(DATA_FAULTS)}",
        num_trials=100,
        measures="to the refusal, or the data",
        work=c9,
        small=3,
    ),
)
