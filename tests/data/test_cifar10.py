"""CIFAR-10's files: whole and right, or refused by name; downloaded once, from a real server."""

import hashlib
import pickle
import socket
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.config.compose import compose
from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data import cifar10, synthetic
from dist_train.data.cifar10 import CIFAR10
from dist_train.data.loaders import open_data
from dist_train.data.pictures import Pictures
from dist_train.data.sources import load_source
from dist_train.data.splits import Source
from dist_train.distributed import single_process

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny files in the real layout, with the pickles' old dtype state, and their md5 expected."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    md5 = {}
    for number, name in enumerate([*NAMES, "batches.meta"]):
        content: dict[str, object] = {
            "data": np.full((4, 3072), number, np.uint8),
            "labels": [0, 1, 2, 9],
        }
        if name == "batches.meta":
            content = {"label_names": [f"class{i}" for i in range(10)]}
        data = pickle.dumps(content, protocol=2).replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
        (folder / name).write_bytes(data)
        md5[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in NAMES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_batches(tmp_path / "root", monkeypatch)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A host with the archive. Yields the folder that it serves."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = tmp_path / "served"
    folder = write_batches(served, monkeypatch)
    archive = served / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        url = f"http://127.0.0.1:{host.server_port}/{CIFAR10.filename}"
        monkeypatch.setattr(CIFAR10, "url", url)
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        host.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def few_synthetic_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic.SIZES, "num_train", 30)
    monkeypatch.setitem(synthetic.SIZES, "num_test", 10)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:1/{CIFAR10.filename}")


def load(tmp_path: Path, *, name: str = "cifar10", download: bool = False) -> Source:
    return load_source(
        DataConfig(
            name=name,
            root=str(tmp_path / "root"),
            download=download,
            cache_dir=str(tmp_path / "cache"),
        )
    )


@pytest.mark.parametrize("name", ["cifar10", "auto"])
@pytest.mark.usefixtures("folder")
def test_batches_become_pictures(tmp_path: Path, name: str) -> None:
    source = load(tmp_path, name=name)
    assert isinstance(source.train, Pictures)
    assert source.train.images.shape == (20, 32, 32, 3)
    assert source.train.labels.tolist() == [0, 1, 2, 9] * 5
    assert len(source.test) == 4
    assert (source.name, source.classes[9], source.notice) == ("cifar10", "class9", None)


@pytest.mark.parametrize("name", ["cifar10", "auto"])
@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_corrupt_file_is_refused_by_name(
    tmp_path: Path, folder: Path, name: str, download: bool, file: str
) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-5] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file} is corrupt or truncated .*: delete") as raised:
        load(tmp_path, name=name, download=download)
    assert "\n" not in str(raised.value)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    (folder / "data_batch_2").write_bytes((folder / "data_batch_2").read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"data_batch_2 is corrupt or truncated \(100 bytes"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "auto"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, folder: Path, name: str) -> None:
    (folder / "data_batch_4").unlink()
    with pytest.raises(ConfigError, match=r"data_batch_4 \(No such file.*: delete .*download=true"):
        load(tmp_path, name=name)


def test_absent_without_download_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.download=true, or data\.root"):
        load(tmp_path)


@pytest.mark.usefixtures("server")
def test_it_is_downloaded_once_and_then_needs_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(load(tmp_path, download=True).train) == 20
    (tmp_path / "root" / CIFAR10.filename).unlink()
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/")
    assert len(load(tmp_path, name="auto", download=True).train) == 20
    assert not list((tmp_path / "root").glob(".cifar10*"))


@pytest.mark.usefixtures("no_network")
def test_an_archive_in_the_root_is_unpacked_without_network(tmp_path: Path, server: Path) -> None:
    (tmp_path / "root").mkdir()
    (server / CIFAR10.filename).rename(tmp_path / "root" / CIFAR10.filename)
    assert len(load(tmp_path).train) == 20


@pytest.mark.parametrize("name", ["cifar10", "auto"])
@pytest.mark.usefixtures("no_network")
def test_no_network_is_an_error_that_names_folder_and_download(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "root" / CIFAR10.base_folder
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, name=name, download=True)
    told = str(raised.value)
    assert told.startswith(f"CIFAR-10 is not in {folder}, and 127.0.0.1:1 cannot be reached (")
    assert f"put {CIFAR10.filename} from {CIFAR10.url} into {folder.parent}" in told
    assert "data=synthetic" in told
    assert "\n" not in told


@pytest.mark.parametrize("name", ["cifar10", "auto"])
def test_a_failing_server_is_an_error_with_the_reason(
    tmp_path: Path, server: Path, name: str
) -> None:
    (server / CIFAR10.filename).unlink()
    with pytest.raises(ConfigError, match=r"the download failed \(.*404.*put cifar-10-python"):
        load(tmp_path, name=name, download=True)


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.usefixtures("no_network")
def test_generated_images_stand_in_only_where_they_may(tmp_path: Path, download: bool) -> None:
    def stood_in(**settings: Any) -> Source:
        fields = {"name": "auto", "download": download, "cache_dir": str(tmp_path), **settings}
        return load_source(DataConfig(**fields), may_stand_in=True)

    source = stood_in()
    assert source.name == "synthetic"
    assert f"NOT CIFAR-10 but generated images: CIFAR-10 is not in {tmp_path}" in str(source.notice)
    for settings in ({"name": "cifar10"}, {"root": str(tmp_path / "root")}):
        with pytest.raises(ConfigError, match="CIFAR-10 is not in"):
            stood_in(**settings)


@pytest.mark.usefixtures("no_network")
def test_only_the_first_run_trains_on_generated_images_without_being_asked(tmp_path: Path) -> None:
    def trained_on(asked: str) -> str:
        words = [asked, f"data.cache_dir={tmp_path}", "device=cpu"]
        return open_data(compose(words).config, single_process()).name

    for asked in ("experiment=quickstart", "data=synthetic"):
        assert trained_on(asked) == "synthetic"
    for experiment in ("cifar10_resnet9", "cifar10_tutorial", "cifar10_speed"):
        with pytest.raises(ConfigError, match=f"CIFAR-10 is not in {tmp_path}/datasets/cifar-10-"):
            trained_on(f"experiment={experiment}")


def test_a_silent_host_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "PROBE_SEC", 0.05)
    silent = threading.Event()

    def wait(*_: object, **__: object) -> None:
        silent.wait(2)
        raise OSError("late")

    monkeypatch.setattr(cifar10.socket, "create_connection", wait)
    with pytest.raises(ConfigError, match="cannot be reached"):
        cifar10._probe("https://example.org/x")
    silent.set()


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_proxy_is_what_must_answer(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"127.0.0.1:{proxy.getsockname()[1]}"
        monkeypatch.setenv("https_proxy", f"{scheme}{address}")
        cifar10._probe("https://example.invalid/x")
    with pytest.raises(ConfigError, match=f"{address} cannot be reached"):
        cifar10._probe("https://example.invalid/x")


def test_names_and_checksums_are_those_of_torchvision() -> None:
    from torchvision import datasets

    for name in ("base_folder", "url", "filename", "tgz_md5", "train_list", "test_list", "meta"):
        theirs = getattr(datasets.CIFAR10, name)
        ours = getattr(CIFAR10, name)
        if name.endswith("list"):
            ours = [list(pair) for pair in ours]
        assert ours == theirs, name
