"""Short distillations on the CPU, in this process or in others."""

import json
import subprocess
import sys

import pytest
from launching import ENVIRONMENT, TRAINING, reset_accelerate

from spar_hf.distillation.recipes import parse_options
from spar_hf.distillation.trainer import Distillation


def distil(base, images, output, *options, recipe=None):
    """A run in this process. Each is a process of its own to accelerate. The options of a recipe are left as they are."""
    arguments = ["--model", base, "--images", images, "--output", output]
    arguments = [*arguments, "--workers", 0, "--holdout_every", 3] if recipe is None else [recipe, *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        try:
            return Distillation(parse_options([*map(str, (*arguments, *options))])).run()
        finally:
            reset_accelerate()


def log_of(folder):
    """The rows of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(folder):
    """Step and loss of each row of a run's log."""
    return [(row["step"], row["loss"]) for row in log_of(folder)]


class Launcher:
    """Runs of one base on one folder of images, each a process or, with a config of accelerate, several."""

    def __init__(self, base, images):
        self.data = base, images

    def start(self, output, *options, config=None, script=TRAINING / "distill.py", launch=(), **environment):
        command = [sys.executable]
        if config:
            command += ["-m", "accelerate.commands.launch", "--config_file", str(TRAINING / "configs" / config)]
            command += ["--main_process_port", "0", "--mixed_precision", "no", *launch]
        command += [*map(str, script if isinstance(script, tuple) else (script,)), "--output", str(output)]
        command += ["--model", str(self.data[0]), "--images", str(self.data[1])]
        return subprocess.Popen(
            [*command, *map(str, options)],
            env={**ENVIRONMENT, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, output, *options, **kwargs):
        run = self.start(output, *options, **kwargs)
        _, said = run.communicate()
        assert run.returncode == 0, said[-4000:]
        return output / "model"
