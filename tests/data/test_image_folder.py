"""Folders of pictures: every mistake refused by name; decoded once, and again when files change."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_train.config.compose import compose
from dist_train.config.schema import Config, ConfigError, DataConfig
from dist_train.data import decode, picture_cache, slices
from dist_train.data.pictures import Pictures
from dist_train.data.sources import load_source
from dist_train.data.splits import Source
from dist_train.data.worker_dataset import WorkerPictures
from tests.ranks import run_ranks
from tests.settings import SMALL


def picture(value: int, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, three training pictures and one test picture each, 8x6, lossless."""
    root = tmp_path / "root"
    for label, name in enumerate(("cat", "dog")):
        for split, num in (("train", 3), ("test", 1)):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                picture(10 * label + i).save(root / split / name / f"{i}.png")
    return root


def config_of(folder: Path, **settings: Any) -> DataConfig:
    cache_dir = str(folder.parent / "cache")
    fields = {"name": "image_folder", "root": str(folder), "cache_dir": cache_dir, **settings}
    return DataConfig(**fields)


def load(folder: Path, **settings: Any) -> Source:
    return load_source(config_of(folder, **settings))


def in_memory(split: object) -> Pictures:
    assert isinstance(split, Pictures)
    return split


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load(folder, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_pictures_and_labels_are_those_of_the_files(root: Path) -> None:
    source = load(root)
    train = in_memory(source.train)
    assert (source.name, source.classes) == ("image_folder", ("cat", "dog"))
    assert train.images.shape == (6, 6, 8, 3)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(train.images[4], np.asarray(picture(11)))
    np.testing.assert_array_equal(in_memory(source.test).images[1], np.asarray(picture(10)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(root: Path, mode: str) -> None:
    name = "0.tif" if mode == "CMYK" else "0.PNG"
    (root / "train" / "cat" / "0.png").unlink()
    picture(3, mode=mode).save(root / "train" / "cat" / name)
    expected = picture(3, mode=mode).convert("RGB")
    np.testing.assert_array_equal(in_memory(load(root).train).images[0], np.asarray(expected))


def test_sixteen_bit_grey_keeps_its_scale(root: Path) -> None:
    grey = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(grey).save(root / "train" / "cat" / "0.png")
    images = in_memory(load(root).train).images
    np.testing.assert_array_equal(images[0], np.repeat((grey >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_is_turned_as_its_exif_data_say(
    root: Path, suffix: str, orientation: int
) -> None:
    upright = Image.new("RGB", (8, 6), (200, 0, 0))
    upright.paste((0, 0, 200), (0, 0, 8, 3))  # blue above red, green beside them
    upright.paste((0, 200, 0), (0, 0, 2, 6))
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    turn[8] = Image.Transpose.ROTATE_270
    how = turn[orientation]
    stored = upright if how is None else upright.transpose(how)
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    path = root / "train" / "cat" / f"0.{suffix}"
    (root / "train" / "cat" / "0.png").unlink()
    stored.save(path, exif=exif, lossless=True)
    for loader in ("auto", "workers"):
        source = load(root, loader=loader)
        if isinstance(source.train, Pictures):
            found = source.train.images[0]
        else:
            found = np.asarray(source.train.items[0][0])
        assert found.shape == (6, 8, 3)
        assert found.argmax(-1)[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [1, 2, 1, 0]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, at every start
def test_broken_exif_data_of_a_whole_picture_are_no_reason_to_refuse_it(root: Path) -> None:
    path = root / "train" / "cat" / "0.jpg"
    (root / "train" / "cat" / "0.png").unlink()
    picture(3).save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffnot an IFD")
    assert in_memory(load(root).train).images.shape == (6, 6, 8, 3)


def test_a_missing_root_is_refused(root: Path) -> None:
    assert "nowhere is not a folder" in refusal(root, root=str(root.parent / "nowhere"))
    with pytest.raises(ConfigError, match=r"needs data\.root"):
        compose(["data.name=image_folder"])


def test_what_file_managers_leave_is_passed_over_and_hidden_classes_are_said(root: Path) -> None:
    plain = load(root)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        (root / "train" / "cat" / name).write_bytes(b"no picture")
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / ".cow").mkdir()
    again = load(root)
    assert again.classes == plain.classes
    assert np.array_equal(in_memory(again.train).images, in_memory(plain.train).images)
    assert [remark for remark in again.remarks if "hidden" in remark] == [
        f"{root.resolve() / 'train'}: hidden folders are no classes: .cow"
    ]


def test_a_folder_without_a_test_split_is_told_what_will_do(root: Path) -> None:
    shutil.rmtree(root / "test")
    assert "or val/<class>/: move a part of the images there" in refusal(root)
    assert f"set data.root={root.resolve()}, and move a part" in refusal(root / "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_refused(root: Path, split: str) -> None:
    (root / split).rename(root / "other")
    assert f"root/{split} is missing" in refusal(root)


def test_a_split_without_class_folders_is_refused(root: Path) -> None:
    (root / "train").rename(root / "other")
    (root / "train").mkdir()
    assert "root/train has no class folders" in refusal(root)


def test_an_empty_class_folder_is_refused(root: Path) -> None:
    (root / "train" / "emu").mkdir()
    assert "root/train/emu is an empty class folder" in refusal(root)


def test_a_test_class_that_train_lacks_is_refused(root: Path) -> None:
    (root / "test" / "cat").rename(root / "test" / "emu")
    assert "root/test/emu is a class that" in refusal(root)


def test_an_unexpected_file_is_refused_and_a_hidden_one_is_not(root: Path) -> None:
    (root / "train" / "dog" / ".DS_Store").write_text("hidden")
    load(root)
    (root / "train" / "dog" / "notes.txt").write_text("not hidden")
    assert "train/dog/notes.txt is no picture" in refusal(root)


def test_an_empty_file_is_refused(root: Path) -> None:
    (root / "test" / "dog" / "0.png").write_bytes(b"")
    assert "test/dog/0.png is empty (0 bytes)" in refusal(root)


def test_a_link_to_nowhere_is_refused(root: Path) -> None:
    (root / "test" / "dog" / "1.png").symlink_to(root / "gone.png")
    assert "test/dog/1.png (No such file" in refusal(root)


@pytest.mark.parametrize("loader", ["auto", "workers"])
@pytest.mark.parametrize("file", ["train/cat/0.png", "train/dog/1.png", "test/dog/0.png"])
def test_a_file_that_is_no_picture_is_refused(root: Path, loader: str, file: str) -> None:
    (root / file).write_text("words")
    assert f"{file} is no picture that Pillow can read" in refusal(root, loader=loader)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "ppm", "tif"])
def test_a_truncated_picture_is_refused(root: Path, suffix: str) -> None:
    whole = io.BytesIO()
    picture(1, (64, 48)).save(whole, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    path = root / "train" / "dog" / f"9.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    assert f"train/dog/9.{suffix} " in refusal(root)


def test_many_bad_files_are_counted(root: Path) -> None:
    for i in range(3):
        (root / "train" / "dog" / f"{i}.png").write_text("words")
    assert "train/dog/0.png is no picture that Pillow can read (the first of 3" in refusal(root)


def test_a_warm_cache_opens_no_picture(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = in_memory(load(root).train).images
    monkeypatch.setattr(picture_cache, "_build", None)
    second = in_memory(load(root).train).images
    assert isinstance(second, np.memmap)
    assert not second.flags.writeable
    np.testing.assert_array_equal(first, second)


def test_a_changed_file_invalidates_the_cache(root: Path) -> None:
    load(root)
    path = root / "train" / "cat" / "1.png"
    before = path.stat()
    picture(99).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    images = in_memory(load(root).train).images
    np.testing.assert_array_equal(images[1], np.asarray(picture(99)))


def test_only_a_cache_that_nobody_has_opened_for_a_week_is_deleted(root: Path) -> None:
    def opened_with(mtime_sec: int) -> list[Path]:
        os.utime(root / "train" / "cat" / "1.png", (mtime_sec, mtime_sec))
        load(root)
        return sorted((root.parent / "cache").rglob("*.u8"))

    [first] = opened_with(1)
    _age(first, days=6)
    [second] = {*opened_with(2)} - {first}  # as a node builds it that sees other times
    _age(first, days=8)
    _age(second, days=8)
    assert {*opened_with(1)} == {first, second}, "nothing is built, so nothing is deleted"
    [third] = {*opened_with(3)} - {first}  # the first one has just been opened
    assert {*opened_with(3)} == {first, third}
    assert not second.with_suffix(".json").exists()


def _age(cache: Path, *, days: float) -> None:
    then = time.time() - 86400 * days
    for path in (cache, cache.with_suffix(".json")):
        os.utime(path, (then, then))


def test_an_added_and_a_renamed_file_invalidate_the_cache(root: Path) -> None:
    load(root)
    picture(50).save(root / "train" / "cat" / "9.png")
    assert len(load(root).train) == 7
    (root / "train" / "cat" / "9.png").rename(root / "train" / "cat" / "00.png")
    images = in_memory(load(root).train).images
    np.testing.assert_array_equal(images[1], np.asarray(picture(50)))


@pytest.mark.parametrize("suffix", ["u8", "json"])
def test_a_cache_file_of_wrong_size_is_rebuilt(root: Path, suffix: str) -> None:
    expected = np.array(in_memory(load(root).train).images)
    (path,) = (root.parent / "cache").rglob(f"*.{suffix}")
    path.write_bytes(path.read_bytes()[:-3])
    np.testing.assert_array_equal(in_memory(load(root).train).images, expected)


def test_uneven_pictures_go_to_workers_and_it_is_said(root: Path) -> None:
    assert load(root).remarks == ()
    picture(7, (9, 6)).save(root / "train" / "dog" / "1.png")
    source = load(root, image_size=64)
    assert isinstance(source.train, WorkerPictures)
    [remark] = source.remarks
    assert "images go through workers, to data.image_size=64, as they differ in size" in remark
    assert "train/cat/0.png is 8x6" in remark
    assert "train/dog/1.png is 9x6" in remark
    assert load(root, loader="workers").remarks == (), "as was asked for"
    told = refusal(root, loader="memory")
    assert "train/cat/0.png is 8x6" in told
    assert "train/dog/1.png is 9x6" in told


def test_pictures_larger_than_the_limit_go_to_workers(root: Path) -> None:
    source = load(root, in_memory_gib=1e-9)
    assert isinstance(source.train, WorkerPictures)
    assert (
        "GiB of memory, more than data.in_memory_gib=1e-09; data.loader=memory"
        in (source.remarks[0])
    )
    assert not list((root.parent / "cache").rglob("*.u8"))
    assert isinstance(load(root, in_memory_gib=1e-9, loader="memory").train, Pictures)


def test_processes_and_one_process_make_the_same_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = np.array(in_memory(load(root).train).images)
    monkeypatch.setattr(slices, "INLINE_PICTURES", 0)
    monkeypatch.setattr(slices, "SLICE_PICTURES", 3)
    again = load(root, cache_dir=str(root.parent / "again"))
    np.testing.assert_array_equal(in_memory(again.train).images, expected)
    (root / "test" / "dog" / "0.png").write_text("words")
    assert "test/dog/0.png is no picture" in refusal(root)


def test_a_refused_folder_leaves_nothing_half_done(root: Path) -> None:
    (root / "test" / "dog" / "0.png").write_text("words")
    refusal(root)
    assert [p.name for p in (root.parent / "cache").rglob("*") if p.is_file()] == [".lock"]


def test_a_decoding_process_that_dies_is_told_of_with_its_words(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = root.parent / "dies.py"
    script.write_text("import sys; sys.stderr.write('no memory'); sys.exit(3)")
    monkeypatch.setattr(slices, "INLINE_PICTURES", 0)
    monkeypatch.setattr(decode, "__file__", str(script))
    with pytest.raises(RuntimeError, match="a decoding process ended with 3: no memory"):
        load(root)


@pytest.mark.parametrize("inline", [0, 256])
def test_decoding_tells_how_far_it_is(
    inline: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "INLINE_PICTURES", inline)
    monkeypatch.setattr(slices, "SLICE_PICTURES", 2)
    monkeypatch.setattr(slices, "RECORD_SEC", 0.0)
    told: list[str | None] = []
    load_source(config_of(root), told.append)
    if not inline:
        assert (told.pop(0) or "").startswith("decoding 8 pictures: once, then ")
    numbers = [(line or "").partition(" pictures, about ")[0] for line in told]
    assert numbers == [f"decoded {num} of 8" for num in (2, 4, 6, 8)]
    assert (told[-1] or "").endswith("about 0 s left")
    told.clear()
    load_source(config_of(root), told.append)
    assert told == []


START_SEC = 6.0


def train_on_slow_pictures(config: Config) -> dict[str, Any]:
    """Train where decoding a slice takes a third of the start's limit, and all of them more."""
    from dist_train.train import train

    def slow(path: str) -> Image.Image:
        time.sleep(START_SEC / 3 / slices.SLICE_PICTURES)
        return decode_rgb(path)

    decode_rgb = decode.read_rgb
    decode.read_rgb = slow
    slices.SLICE_PICTURES, slices.RECORD_SEC = 2, 0.0
    return train(config)


@pytest.mark.slow
def test_a_start_may_take_longer_than_its_limit_while_pictures_are_decoded(root: Path) -> None:
    run_dir = root.parent / "run"
    words = [word for word in SMALL if not word.startswith("data.")]
    words += ["data.name=image_folder", f"data.root={root}", "data.crop_padding=0"]
    words += [f"data.cache_dir={root.parent / 'cache'}", "data.val_fraction=0"]
    words += [f"run_dir={run_dir}", "train.steps=2", "train.global_batch_size=6"]
    config = compose([*words, f"parallel.start_timeout_sec={START_SEC}"]).config
    assert run_ranks(train_on_slow_pictures, 2, config)[0]["state"] == "finished"
    said = (run_dir / "log" / "rank0.txt").read_text()
    assert said.count("decoded 2 of 8 pictures, about ") == 1
    assert said.count("decoded 6 of 8 pictures, about ") == 1


BUILD = """
import os
import sys
import time
from pathlib import Path
from dist_train.config.schema import DataConfig
from dist_train.data import decode, picture_cache, slices
from dist_train.data.folder_scan import scan_folder
from dist_train.data.picture_cache import verified_pictures
fate, max_bytes = sys.argv[3], int(sys.argv[4])
build, read_rgb = picture_cache._build, decode.read_rgb
def told(*args, **kwargs):
    print("built")
    if fate == "die":
        os.kill(os.getpid(), 9)
    build(*args, **kwargs)
reads = []
def read(path):
    reads.append(path)
    if fate == f"die at picture {len(reads)}":
        os.kill(os.getpid(), 9)
    if fate == "live slowly":
        time.sleep(0.3)
    return read_rgb(path)
picture_cache._build, decode.read_rgb = told, read
slices.SLICE_PICTURES, slices.RECORD_SEC = 2, 0.0
folder = scan_folder(sys.argv[1])
files = [*folder.train, *folder.test]
verified_pictures(folder.root, files, cache_dir=Path(sys.argv[2]), max_bytes=max_bytes)
"""


def build(root: Path, fate: str, *, max_bytes: int = 2**20) -> subprocess.Popen[str]:
    """Decode in a process of its own, in slices of two, which are recorded at once."""
    command = [sys.executable, "-u", "-c", BUILD, str(root), str(root.parent / "cache"), fate]
    return subprocess.Popen([*command, str(max_bytes)], stdout=subprocess.PIPE, text=True)


def opened_by(
    root: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Source, list[str]]:
    """Return what a load in this process makes, and the pictures that it opens."""
    opened: list[str] = []

    def read_rgb(path: str) -> Image.Image:
        opened.append(str(Path(path).relative_to(root.resolve()).with_suffix("")))
        return decode_rgb(path)

    decode_rgb = decode.read_rgb
    monkeypatch.setattr(decode, "read_rgb", read_rgb)
    monkeypatch.setattr(slices, "SLICE_PICTURES", 2)
    return load(root, **settings), opened


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_killed_process_has_decoded_is_not_decoded_again(
    kept: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = in_memory(load(root, cache_dir=str(root.parent / "other")).train).images
    killed = build(root, "die at picture 6", max_bytes=2**20 if kept else 0)
    assert (killed.communicate()[0], killed.returncode) == ("built\n", -signal.SIGKILL)
    source, opened = opened_by(root, monkeypatch, loader="auto" if kept else "workers")
    assert opened == ["train/cat/0", "train/dog/1", "train/dog/2", "test/cat/0", "test/dog/0"]
    if kept:
        np.testing.assert_array_equal(in_memory(source.train).images, expected)
    assert not list((root.parent / "cache").rglob(".partial*"))


def test_a_picture_of_another_size_is_remembered_of_a_killed_process(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(7, (9, 6)).save(root / "train" / "cat" / "1.png")
    build(root, "die at picture 6").communicate()
    source, opened = opened_by(root, monkeypatch)
    assert len(opened) == 5
    assert isinstance(source.train, WorkerPictures)
    assert "train/cat/1.png is 9x6" in refusal(root, loader="memory")


@pytest.mark.parametrize(
    "changed",
    ["a picture", "a picture and back", "the record", "the pixels", "no pixels", "max_bytes"],
)
def test_what_a_killed_process_has_decoded_of_other_files_or_not_whole_is_not_used(
    changed: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(root / "train" / "cat" / "0.png", (2, 2))
    killed = build(root, "die at picture 6", max_bytes=0 if changed == "max_bytes" else 2**20)
    killed.communicate()
    [record] = (root.parent / "cache").rglob(".partial.json")
    if changed == "a picture":
        picture(99).save(root / "train" / "cat" / "0.png")
    elif changed == "a picture and back":
        os.utime(root / "train" / "cat" / "0.png", (1, 1))
        build(root, "die at picture 2").communicate()
        os.utime(root / "train" / "cat" / "0.png", (2, 2))
    elif changed == "the record":
        record.write_bytes(record.read_bytes()[:-9])
    elif changed == "the pixels":
        record.with_suffix(".u8").write_bytes(b"half")
    elif changed == "no pixels":
        record.with_suffix(".u8").unlink()
    source, opened = opened_by(root, monkeypatch)
    assert len(opened) == 9, "eight, and the first one for its size"
    expected = in_memory(load(root, cache_dir=str(root.parent / "other")).train).images
    np.testing.assert_array_equal(in_memory(source.train).images, expected)


def test_who_waits_for_another_process_sees_how_far_it_is(root: Path) -> None:
    told: list[str | None] = []
    with build(root, "live slowly") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "built\n"
        assert len(load_source(config_of(root), told.append).train) == 6
    assert other.returncode == 0
    assert len(told) >= 2
    assert all((line or "").startswith("decoded ") for line in told)
    assert len(set(told)) == len(told), "a line that is there still is no sign of life"


def test_of_several_processes_one_builds(root: Path) -> None:
    outputs = [process.communicate()[0] for process in [build(root, "live"), build(root, "live")]]
    assert sorted(outputs) == ["", "built\n"]


def test_the_lock_of_a_dead_process_is_free(root: Path) -> None:
    assert build(root, "die").communicate()[0] == "built\n"
    assert build(root, "live").communicate()[0] == "built\n"


def test_a_cache_dir_that_cannot_be_written_names_the_setting(root: Path) -> None:
    (root.parent / "file").write_text("")
    assert "set data.cache_dir" in refusal(root, cache_dir=str(root.parent / "file"))


def test_an_unguarded_script_can_decode(root: Path) -> None:
    script = f"""
from dist_train.config.schema import DataConfig
from dist_train.data import picture_cache, slices
from dist_train.data.folder_scan import scan_folder
slices.INLINE_PICTURES = 0
folder = scan_folder({str(root)!r})
from pathlib import Path
cache = Path({str(root.parent / "cache")!r})
verified = picture_cache.verified_pictures(
    folder.root, folder.train, cache_dir=cache, max_bytes=2**20)
print(verified.pixels.shape)
"""
    path = root.parent / "script.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.stdout == "(6, 6, 8, 3)\n", done.stderr
