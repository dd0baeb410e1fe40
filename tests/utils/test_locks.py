"""One writer at a time: other processes are refused, those that died are not waited for."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from spar_hf.utils.atomic import write_text, writing_folder
from spar_hf.utils.locks import Locked, locked, one_writer

# utils without the package, which imports torch: a process that locks is there at once
HOLD = """
import importlib.util, sys, time, types
from pathlib import Path
root = Path({root!r})
for name, path in (("spar_hf", root), ("spar_hf.utils", root / "utils")):
    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = [str(path)]
from spar_hf.utils.locks import locked, one_writer
{body}
"""


def start(tmp_path, body):
    import spar_hf

    program = HOLD.format(root=str(os.path.dirname(spar_hf.__file__)), body=body)
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("spar_hf.utils.locks.PATIENCE", 0.2)


@pytest.fixture
def holder(tmp_path):
    body = "with locked(Path('run/.lock'), 'run'):\n    print('held', flush=True)\n    sys.stdin.read()"
    process = start(tmp_path, body)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_who_writes(holder, tmp_path):
    with pytest.raises(Locked, match=rf"process {holder.pid} on .* since 20.*another folder"):
        locked(tmp_path / "run" / ".lock", "run").__enter__()
    holder.communicate("")  # it ends
    with locked(tmp_path / "run" / ".lock", "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").is_file()
    with locked(tmp_path / "run" / ".lock", "run"):
        pass


def test_without_locks_of_the_file_system_the_process_id_decides(holder, tmp_path, monkeypatch):
    monkeypatch.setattr("spar_hf.utils.locks.fcntl", None)
    with pytest.raises(Locked, match=str(holder.pid)):
        locked(tmp_path / "run" / ".lock", "run").__enter__()
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run" / ".lock", "run"):
        pass


def test_another_thread_is_refused_and_the_same_may_lock_twice(tmp_path):
    refused = []

    def other():
        try:
            locked(tmp_path / ".lock", "x").__enter__()
        except Locked as error:
            refused.append(error)

    with locked(tmp_path / ".lock", "x"):
        with locked(tmp_path / ".lock", "x"):
            pass
        assert (tmp_path / ".lock").exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and not list(tmp_path.iterdir())


def test_a_folder_that_was_made_for_a_lock_alone_goes_with_it(tmp_path):
    with locked(tmp_path / "run" / ".lock", "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_processes_exactly_one_writes_and_the_others_say_so(tmp_path):
    body = """
try:
    sys.stdin.readline()
    with locked(Path('run/.lock'), 'run'):
        print('wrote', flush=True); time.sleep(8)
except Exception as error:
    print(type(error).__name__, flush=True)
"""
    processes = [start(tmp_path, body) for _ in range(6)]
    for process in processes:  # all at once
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0].strip() for process in processes]
    assert set(said) <= {"wrote", "Locked"} and "wrote" in said and "Locked" in said
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_being_written_is_locked(tmp_path):
    body = """
from spar_hf.utils.atomic import writing_folder
with writing_folder(Path('model')) as temporary:
    temporary.mkdir(); print('held', flush=True); sys.stdin.read()
"""
    process = start(tmp_path, body)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Locked, match="model"), writing_folder(tmp_path / "model"):
        pass
    process.kill()
    process.wait()
    with writing_folder(tmp_path / "model") as temporary:
        temporary.mkdir()
        write_text(temporary / "a", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_jobs_of_one_array_write_side_by_side_and_others_are_refused(tmp_path):
    body = """
with one_writer(Path('masks'), {'labels': ['road']}, '0-of-2'):
    print('held', flush=True); sys.stdin.read()
"""
    process, folder, road = start(tmp_path, body), tmp_path / "masks", {"labels": ["road"]}
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Locked, match=str(process.pid)), one_writer(folder, road, "0-of-2"):
        pass
    with pytest.raises(Locked, match=f"process {process.pid} .*other settings"):
        one_writer(folder, {"labels": ["sky"]}, "1-of-2").__enter__()
    with one_writer(folder, road, "1-of-2"), one_writer(folder, road, "0-of-2", process=1):
        assert len(list(folder.iterdir())) == 3
    process.kill()
    process.wait()
    with one_writer(folder, {"labels": ["sky"]}):
        pass
