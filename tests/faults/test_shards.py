"""Folders of shards: killed at any step of saving, cut off anywhere, disks full: a whole checkpoint is always found."""

from __future__ import annotations

import errno
import faulthandler
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from lit_instruct.models.sharded_checkpoint import read_shards, write_shards
from lit_instruct.modules import checkpoint_files
from lit_instruct.modules.checkpoint_files import begin_part, is_whole, newest_whole, old_of, part_of
from lit_instruct.modules.fsdp2 import Fsdp2Strategy, _complete
from lit_instruct.types import SaveError
from tests.distributed.stages import enter_process, fit, write_inputs

LIMIT_S = 200  # a rank that waits for ever ends the test

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process, which is what is meant


def save(number: int, target: Path) -> None:
    """As ``Fsdp2Strategy`` does, in one process."""
    begin_part(target)
    write_shards({"state_dict": {"weight": torch.full((500,), float(number))}}, part_of(target))
    _complete({"number": number}, target)


def read(folder: Path) -> int:
    state = {"state_dict": {"weight": torch.zeros(500)}}
    read_shards(state, folder)
    number = torch.load(folder / "meta.pt", weights_only=True)["number"]
    assert torch.equal(state["state_dict"]["weight"], torch.full((500,), float(number)))
    return int(number)


class Killed(BaseException):
    """In the place of SIGKILL: nothing here may catch it."""


_watched: list[Any] = []  # one: called with each change of the file system


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
        event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    )
    if _watched and changes:
        _watched[0]()


sys.addaudithook(_hear)


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Let so many changes of the file system happen, and not one more."""
    left = step

    def change() -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1

    _watched.append(change)
    try:
        yield
    finally:
        _watched.clear()


def save_until(step: int, number: int, target: Path) -> bool:
    """Whether the save came to its end before it was killed."""
    try:
        with killed_at(step):
            save(number, target)
    except Killed:
        return False
    except CheckpointException as error:  # in which torch hands on what is raised while shards are written
        if "Killed" not in repr(error):
            raise
        return False
    return True


@pytest.mark.parametrize("before", ["folder", "file", "nothing"])
def test_killed_between_any_two_steps(tmp_path: Path, before: str) -> None:
    """And the next save goes through, whatever was left, and leaves nothing but its checkpoint."""
    found_new = []
    for step in range(60):
        folder = tmp_path / str(step)
        folder.mkdir()
        target = folder / "last.ckpt"
        if before == "folder":
            save(1, target)
        elif before == "file":
            checkpoint_files.WholeCheckpointIO().save_checkpoint({"number": 1}, target)
        if save_until(step, 2, target):
            break
        found, damaged = newest_whole([folder])
        assert damaged == []
        if found is None:
            assert before == "nothing"
        elif found.is_dir():
            found_new.append(read(found) == 2)
            assert read(found) in (1, 2)
        else:
            assert torch.load(found, weights_only=True) == {"number": 1}
        save(3, target)
        assert read(target) == 3
        assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    else:
        raise AssertionError("it takes more steps than were tried")
    assert step > 8
    assert before == "nothing" or True in found_new  # some kills came after the mark, and lost nothing
    assert found_new == sorted(found_new)


def test_what_a_killed_save_left_is_not_lost_by_the_next(tmp_path: Path) -> None:
    """Killed between the two renames, and again in the next save: the first one's checkpoint is still there."""
    target = tmp_path / "last.ckpt"
    save(1, target)
    target.rename(old_of(target))
    save(2, tmp_path / "other.ckpt")
    (tmp_path / "other.ckpt").rename(part_of(target))
    found, _ = newest_whole([tmp_path])
    assert found == part_of(target).resolve()
    for step in range(12):
        again = tmp_path / f"again{step}"
        shutil.copytree(tmp_path, again, ignore=lambda folder, names: [name for name in names if "again" in name])
        assert not save_until(step, 3, again / "last.ckpt")
        found, _ = newest_whole([again])
        assert found is not None
        assert read(found) == 2


def test_cut_off_anywhere(tmp_path: Path) -> None:
    """Twenty times another file of the newest is cut off at another place: the one before it is taken."""
    stream = random.Random(0)
    save(1, tmp_path / "first.ckpt")
    save(2, tmp_path / "second.ckpt")
    files = sorted((tmp_path / "second.ckpt").iterdir())
    assert [path.name for path in files] == [".metadata", "__0_0.distcp", "meta.pt", "whole.json"]
    for number in range(20):
        path = files[number % 4]
        content = path.read_bytes()
        assert newest_whole([tmp_path]) == ((tmp_path / "second.ckpt").resolve(), [])
        path.write_bytes(content[: stream.randrange(len(content))])
        found, damaged = newest_whole([tmp_path])
        assert found == (tmp_path / "first.ckpt").resolve()
        assert [one.name for one in damaged] == ["second.ckpt"]
        path.write_bytes(content)
        path.rename(tmp_path / "lost")
        assert is_whole(tmp_path / "second.ckpt") == (path.name == "whole.json")  # as those of earlier versions
        (tmp_path / "lost").rename(path)


def test_folders_of_earlier_versions(tmp_path: Path) -> None:
    save(1, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "whole.json").unlink()
    assert newest_whole([tmp_path])[0] == (tmp_path / "a.ckpt").resolve()
    (tmp_path / "a.ckpt" / "meta.pt").unlink()
    assert newest_whole([tmp_path]) == (None, [(tmp_path / "a.ckpt").resolve()])


def test_a_file_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    save(1, target)
    checkpoint_files.WholeCheckpointIO().save_checkpoint({"number": 2}, target)
    assert torch.load(target, weights_only=True) == {"number": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One with room for a checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here; a writer that runs out of room is tried elsewhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    """A real one: the file, and the folder, that were there before still are, and nothing else."""
    target = small_disk / "a.ckpt"
    content = {"weights": torch.ones(80_000)}
    checkpoint_files.WholeCheckpointIO().save_checkpoint(content, target)
    with pytest.raises(SaveError, match=r"a.ckpt' could not be written: .*as it was. Do: make room"):
        checkpoint_files.WholeCheckpointIO().save_checkpoint(content, target)
    assert torch.equal(checkpoint_files.WholeCheckpointIO().load_checkpoint(target)["weights"], content["weights"])
    target.unlink()
    save(1, target)
    begin_part(target)
    with pytest.raises(OSError, match=r"unexpected pos|No space left"):  # the former is what torch says of it
        write_shards({"weights": torch.ones(200_000)}, part_of(target))
    said = str(checkpoint_files.save_error(target, "Reason."))
    assert re.search(r"a.ckpt' could not be written: Reason. .0.\d MB are free there.. The one .* is as it was", said)
    assert [path.name for path in small_disk.iterdir()] == ["a.ckpt"]
    assert read(target) == 1


def full(rank: int, port: int, inputs: str, out: str) -> None:
    """The disk of one rank is full, while it writes its shard and while the first writes the one file for all."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    enter_process(rank, port)

    def run(name: str, **settings: Any) -> None:
        with pytest.raises(
            SaveError, match=rf"{name}/step=2.ckpt' could not be written: .*No space left.*Do: make room"
        ):
            fit("sft", "plain", Path(inputs), Path(out) / name, devices=2, strategy=Fsdp2Strategy(**settings))

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(FileSystemWriter, "write_data", no_room)
        run("shards", save_distributed_checkpoint=True)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(TorchCheckpointIO, "save_checkpoint", no_room)
        run("file")


def test_all_ranks_hear_of_a_full_disk(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    torch.multiprocessing.spawn(full, args=(find_free_network_port(), str(inputs), str(tmp_path)), nprocs=2)
    assert list((tmp_path / "shards").iterdir()) == []
