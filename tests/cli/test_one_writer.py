"""Two commands that write one folder at the same time: the second is refused, unless both are jobs of one array."""

import threading

import pytest
from PIL import Image
from typer.testing import CliRunner

from spar_hf.batch import ahead
from spar_hf.cli.main import app

SEGMENT = ["segment", "--labels", "road;sky", "--format", "map"]


@pytest.fixture
def run_two(base_folder, tmp_path, monkeypatch):
    """Runs a command, and another one on the same folder when the first has begun."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(tmp_path / "in" / f"{name}.png")

    def run_two(first, second, output):
        def run(command):
            where = [tmp_path / "in", "--model", base_folder, "--output", tmp_path / output, "--workers", 0]
            results.append(CliRunner().invoke(app, [*command, *map(str, where)]))

        def with_the_second(*given, **options):
            monkeypatch.setattr(ahead, "process_ahead", process_ahead)
            thread = threading.Thread(target=run, args=(second,))
            thread.start()
            thread.join()
            return process_ahead(*given, **options)

        results, process_ahead = [], ahead.process_ahead
        monkeypatch.setattr(ahead, "process_ahead", with_the_second)
        run(first)
        return results

    return run_two


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (SEGMENT, "masks"),
        (SEGMENT, "masks.tar"),
        (["features"], "features"),
        (["features", "--shard-size", "1"], "shards"),
        (["features"], "features.parquet"),
    ],
)
def test_a_second_command_is_refused_and_the_first_goes_on(run_two, tmp_path, command, output):
    second, first = run_two(command, [*command, "--skip-existing"], output)
    assert second.exit_code == 2 and "being written" in second.output, second.output
    assert first.exit_code == 0 and "2 done" in first.output, first.output
    assert not list((tmp_path / output).glob(".*.lock"))


@pytest.mark.parametrize("command", [SEGMENT, ["features"], ["features", "--shard-size", "1"]])
def test_jobs_of_one_array_write_side_by_side(run_two, command):
    second, first = run_two([*command, "--shard", "0/2"], [*command, "--shard", "1/2"], "out")
    assert first.exit_code == second.exit_code == 0, first.output + second.output


def test_shards_of_one_number_are_never_written_by_two(run_two):
    """All of the work and the first job of an array would give their shards the same names."""
    command = ["features", "--shard-size", "1"]
    second, first = run_two(command, [*command, "--shard", "0/2"], "shards")
    assert second.exit_code == 2 and first.exit_code == 0, first.output + second.output
