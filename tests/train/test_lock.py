"""One run at a time in a folder."""

import os
import platform

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from support.training_runs import SMALL, TINY, train

from fastcaps import _atomic, cli
from fastcaps.train import lock, run
from fastcaps.train.lock import locked

pytestmark = pytest.mark.train


@pytest.mark.parametrize("options", [TINY, [*TINY, "--overwrite"], ["--resume"]], ids=["new", "overwrite", "resume"])
def test_a_second_run_refuses_at_once_and_names_the_first(whole, capsys, options):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    with locked(whole):
        assert train(whole, *options) == 1
        found = capsys.readouterr()
    assert found.out == ""
    assert f"a run is going on in {whole} (process {os.getpid()} on {platform.node()} since 2" in found.err
    assert len(found.err.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_readers_are_not_kept_out(whole, colours, tmp_path):
    picture = str(colours / "test" / "red" / "0.png")
    with locked(whole):
        assert cli.main(["evaluate", str(whole / "model.safetensors")]) == 0
        assert cli.main(["show", str(whole / "model.safetensors"), picture, "--out", str(tmp_path / "show.html")]) == 0


@pytest.mark.usefixtures("no_figures")
def test_what_a_dead_process_leaves_keeps_nobody_out(tmp_path):
    (tmp_path / lock.NAME).write_bytes(b"process 1 on another since long ago")
    assert train(tmp_path, *TINY) == 0
    assert not (tmp_path / lock.NAME).exists()


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [lock.NAME]
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_lock_that_is_removed_before_it_is_ours(tmp_path, monkeypatch):
    """The run before ends between our opening of its file and our locking it."""
    calls = []

    def slow(file):
        calls.append(file.name)
        if len(calls) == 1:
            (tmp_path / lock.NAME).unlink()
        return _atomic.lock(file)

    monkeypatch.setattr(lock, "lock", slow)
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    assert len(calls) == 3


def test_the_lock_of_another_run_in_a_new_folder_of_the_same_name_stays(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / lock.NAME).write_text("theirs")
    assert (tmp_path / "run" / lock.NAME).read_text() == "theirs"


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"two\nlines"])
def test_a_holder_that_does_not_say_who_it_is(tmp_path, content):
    with locked(tmp_path):
        (tmp_path / lock.NAME).write_bytes(content)
        with pytest.raises(BlockingIOError, match=r"another process\)"), locked(tmp_path):
            pass


def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(_atomic, "fcntl", None)
    warned = pytest.warns(RuntimeWarning, match=r"cannot be locked .*: a second run there would not be noticed")
    with warned, locked(tmp_path):
        pass
    _atomic.write_whole(tmp_path / "a", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.usefixtures("no_figures")
def test_only_the_first_process_of_a_run_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with locked(tmp_path), pytest.raises(ValueError, match="the same for all processes"):
        run.train({"stem": 4, "types": 1, "accelerator": "cpu", "epochs": 1}, tmp_path)


def test_a_second_machine_is_no_second_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with locked(tmp_path), pytest.raises(ValueError, match="the same for all processes"):
        run.train({"stem": 4, "types": 1, "accelerator": "cpu", "epochs": 1}, tmp_path)


def test_a_refused_run_leaves_no_lock(tmp_path):
    assert train(tmp_path, *SMALL, "--kernel-size", "9") == 1
    assert list(tmp_path.iterdir()) == []
