"""CIFAR-10 in torchvision's layout, every file's md5 checked at every start."""

import hashlib
import pickle
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data.cache import cache_root, locked
from dist_train.data.pictures import Pictures
from dist_train.data.splits import Source

PROBE_SEC = 3.0
STALL_SEC = 30.0  # a download that sends nothing for so long is given up


class CIFAR10:
    """Names and md5 of the files, as torchvision.datasets.CIFAR10 has them.

    Importing that one costs every start half a second or more.
    """

    base_folder = "cifar-10-batches-py"
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    filename = "cifar-10-python.tar.gz"
    tgz_md5 = "c58f30108f718f92721af3b95e74349a"
    train_list: Sequence[Sequence[str]] = (
        ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        ("data_batch_4", "634d18415352ddfa80567beed471001a"),
        ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    )
    test_list: Sequence[Sequence[str]] = (("test_batch", "40351d587109b95175f43aff81a1287e"),)
    meta: Mapping[str, str] = {
        "filename": "batches.meta",
        "key": "label_names",
        "md5": "5ff9c542aee3614f3951f8cda6e48888",
    }


class UnavailableError(ConfigError):
    """CIFAR-10 is not there and cannot be had: no fault of the files."""


def load_cifar10(config: DataConfig) -> Source:
    """Read CIFAR-10 from `data.root`, downloading it there first if it is absent.

    Without data.root it is `datasets` in data.cache_dir (see cache.cache_root). An archive
    cifar-10-python.tar.gz already in the root is unpacked without a network.

    Raises:
        UnavailableError: it is absent, and downloading is off or fails.
        ConfigError: a file is missing, truncated or corrupt (named).
    """
    root = _root(config)
    folder = root / CIFAR10.base_folder
    if not folder.exists():
        archive = root / CIFAR10.filename
        if not config.download and not archive.exists():
            raise UnavailableError(
                f"CIFAR-10 is not in {folder}: set data.download=true, or data.root to the "
                f"folder that holds {CIFAR10.base_folder} or {CIFAR10.filename}, or give "
                "data=synthetic to train on generated images"
            )
        if not archive.exists():
            try:
                _probe(CIFAR10.url)
            except UnavailableError as error:
                raise UnavailableError(_no_download(folder, str(error))) from error
        with locked(root, key="data.cache_dir" if config.root is None else "data.root"):
            if not folder.exists():  # another process or node may have made it meanwhile
                _fetch(root, folder)
    (names,) = _read(folder, [(CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    return Source(
        name="cifar10",
        classes=tuple(names[CIFAR10.meta["key"]]),
        train=_split(_read(folder, CIFAR10.train_list)),
        test=_split(_read(folder, CIFAR10.test_list)),
    )


def is_unpacked(config: DataConfig) -> bool:
    """Say whether it need only be read."""
    return (_root(config) / CIFAR10.base_folder).is_dir()


def _root(config: DataConfig) -> Path:
    if config.root is not None:
        return Path(config.root).expanduser().resolve()
    return cache_root(config) / "datasets"


def _read(folder: Path, files: Sequence[Sequence[str]]) -> list[dict]:
    """Unpickle files whose md5 is right, and no other."""
    batches = []
    for name, md5 in files:
        cure = f"delete {folder} and start again with data.download=true"
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {folder / name} ({error.strerror}): {cure}") from error
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise ConfigError(
                f"{folder / name} is corrupt or truncated ({len(content)} bytes, md5 {found} "
                f"instead of {md5}): {cure}"
            )
        with warnings.catch_warnings():  # the files are of 2009, NumPy of now complains
            warnings.simplefilter("ignore")
            batches.append(pickle.loads(content, encoding="latin1"))
    return batches


def _split(batches: list[dict]) -> Pictures:
    planes = np.concatenate([batch["data"] for batch in batches])
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([batch["labels"] for batch in batches])
    return Pictures(images=np.ascontiguousarray(images), labels=labels.astype(np.int64))


def _fetch(root: Path, folder: Path) -> None:
    """Download if need be, unpack beside, and rename: the folder is whole or not there."""
    from torchvision.datasets.utils import download_and_extract_archive

    unpacked = root / ".cifar10-unpacking"
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with _socket_timeout(STALL_SEC):
            download_and_extract_archive(
                CIFAR10.url,
                str(root),
                extract_root=str(unpacked),
                filename=CIFAR10.filename,
                md5=CIFAR10.tgz_md5,
            )
        (unpacked / CIFAR10.base_folder).rename(folder)
    except (RuntimeError, TimeoutError, urllib.error.URLError, ConnectionError) as error:
        reason = f"the download failed ({error})"
        raise UnavailableError(_no_download(folder, reason)) from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _probe(url: str) -> None:
    """Refuse within PROBE_SEC if nothing answers; also when the name server is silent."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy is not None and not urllib.request.proxy_bypass(host):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    failures = ["no answer"]

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=PROBE_SEC).close()
            failures.clear()
        except OSError as error:
            failures[0] = str(error)

    thread = threading.Thread(target=connect, daemon=True)  # looking a name up has no time-out
    thread.start()
    thread.join(PROBE_SEC)
    if failures:
        raise UnavailableError(f"{address[0]}:{address[1]} cannot be reached ({failures[0]})")


def _no_download(folder: Path, reason: str) -> str:
    return (
        f"CIFAR-10 is not in {folder}, and {reason}: put {CIFAR10.filename} from {CIFAR10.url} "
        f"into {folder.parent}, set data.root to a folder that holds it, or give data=synthetic "
        "to train on generated images"
    )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the default time-out, the only one that torchvision's download obeys."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
