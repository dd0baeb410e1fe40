"""The distillation script as processes: killed, on two of them, sharded over them. They are slow to start, so few."""

import shutil
import signal
import time

import pytest
import torch
from distilling import Launcher, curve, distil, log_of
from launching import TRAINING, signal_all
from transformers import AutoModel

from spar_hf.utils.errors import UsageError

pytestmark = pytest.mark.slow

# four images a step, on one process or two
SETTING = ("--steps", 8, "--learning_rate", 1e-3, "--train_layers", "all", "--teacher_windows", 3, "--save_steps", 1)
SETTING += ("--eval_steps", 4, "--picture_steps", 0, "--log_steps", 1, "--holdout_every", 3, "--workers", 0)
SETTING += ("--report_to", "none", "--cutmix_probability", 0.5)


@pytest.fixture(scope="module")
def launcher(base_folder, image_folder):
    return Launcher(base_folder, image_folder)


def accumulate(processes):
    return ("--gradient_accumulation_steps", 4 // processes)


@pytest.fixture(scope="module")
def whole(launcher, tmp_path_factory):
    """The same run on one process and on two, never stopped: by the number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        1: distil(*launcher.data, folder / "1", *SETTING, *accumulate(1)),
        2: launcher.finish(folder / "2", *SETTING, *accumulate(2), config="multi_gpu.yaml"),
    }


# the checkpoint of step 4 stays half written: its weights are missing, and the run waits to be killed
STOP_WHILE_WRITING = """
import runpy, sys, time
from pathlib import Path
from accelerate import Accelerator
save_state = Accelerator.save_state
def save_half(self, folder, *args, **kwargs):
    save_state(self, folder, *args, **kwargs)
    if "checkpoint-4" in folder:
        if self.is_main_process:
            (Path(folder) / "model.safetensors").unlink()
            (Path(folder) / "half").touch()
        time.sleep(600)
Accelerator.save_state = save_half
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_in_the_middle_of_writing(run, half):
    """Kill -9 all processes of a run once the checkpoint `half` is half written."""
    while run.poll() is None and not (half / "half").exists():
        time.sleep(0.02)
    assert run.poll() is None, run.communicate()[1][-2000:]
    signal_all(run, signal.SIGKILL)
    run.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_while_writing_resumes_to_the_last_bit(launcher, whole, tmp_path, processes):
    output, config = tmp_path / "killed", "multi_gpu.yaml" if processes == 2 else None
    (tmp_path / "stop.py").write_text(STOP_WHILE_WRITING)
    script = (tmp_path / "stop.py", TRAINING / "distill.py")
    run = launcher.start(output, *SETTING, *accumulate(processes), config=config, script=script)
    half = output / ".checkpoint-4.partial"
    kill_in_the_middle_of_writing(run, half)
    assert half.is_dir() and sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    with (output / "log.jsonl").open("a") as log:  # what else a kill can leave behind
        log.write('{"step": 8, "lo')
    if processes == 2:
        shutil.copytree(output, tmp_path / "fewer")
    options = (*SETTING, *accumulate(processes), "--resume")
    resume = launcher.finish if config else lambda output, *options, config: distil(*launcher.data, output, *options)
    found = resume(output, *options, config=config)

    assert curve(output) == curve(whole[processes].parent) and len(curve(output)) == 8
    weights, resumed = (AutoModel.from_pretrained(folder).state_dict() for folder in (whole[processes], found))
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]
    if processes == 2:
        check_one_process_goes_on(launcher, whole[2], tmp_path / "fewer")


def check_one_process_goes_on(launcher, whole, output):
    """One process resumes a run of two, with the same images in each of its steps and the same learning rates."""
    with pytest.raises(UsageError, match=r"4 images per step, from 2 .*--gradient_accumulation_steps 4\."):
        distil(*launcher.data, output, *SETTING, *accumulate(2), "--resume")
    found = distil(*launcher.data, output, *SETTING, *accumulate(1), "--resume")
    rows, expected = log_of(output), log_of(whole.parent)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for name in ("loss", "learning_rate"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=1e-3)
    assert_same_weights(found, whole, launcher.data[0])


def assert_same_weights(found, expected, base):
    start, expected = (AutoModel.from_pretrained(folder).state_dict() for folder in (base, expected))
    for name, weight in AutoModel.from_pretrained(found).state_dict().items():
        # the key's bias changes nothing: its gradient is noise, which Adam makes as large as any other
        if "k_proj.bias" not in name and "head.attention.in_proj" not in name:
            torch.testing.assert_close(weight, expected[name], atol=5e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            assert (weight - start[name]).abs().max() > 1e-3 or "head.probe" in name


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_doubled_batch(whole, base_folder):
    assert_same_weights(whole[2], whole[1], base_folder)
    one, two = curve(whole[1].parent), curve(whole[2].parent)
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-3)


@pytest.mark.slow
def test_processes_agree_after_a_prior_was_fitted(launcher, tmp_path):
    options = (*SETTING, "--steps", 2, "--local_start", 0.5, "--position_extent", 128, "--fit_prior", 2)
    one = distil(*launcher.data, tmp_path / "1", *options, *accumulate(1))
    two = launcher.finish(tmp_path / "2", *options, *accumulate(2), config="multi_gpu.yaml")
    pixels = torch.randn(1, 3, 96, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (AutoModel.from_pretrained(folder)(pixels).feature_map for folder in (two, one))
    # the second process's gradients are half of what was learned: with weights of its own it was 0.3 off
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


# accelerate shards on accelerators only; this lets it shard on the CPU, where torch's FSDP2 runs over gloo as well
SHARD_ON_CPU = """
import runpy, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_sharded_student_is_the_same_and_a_plain_folder(launcher, whole, base_folder, tmp_path):
    (tmp_path / "shard_on_cpu.py").write_text(SHARD_ON_CPU)
    script = (tmp_path / "shard_on_cpu.py", TRAINING / "distill.py")
    device = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu"}
    options = (*SETTING, *accumulate(2), "--save_steps", 3)
    found = launcher.finish(tmp_path / "run", *options, config="fsdp.yaml", script=script, **device)
    assert list((tmp_path / "run" / "checkpoint-6").glob("pytorch_model_fsdp_0/*.distcp"))  # it was sharded
    assert_same_weights(found, whole[2], base_folder)


@pytest.mark.slow
def test_replicas_of_a_sharded_student_train_as_one(launcher, whole, base_folder, tmp_path):
    """HSDP: two replicas, each in two shards. The config is of two machines; all four processes run on this one."""
    (tmp_path / "shard_on_cpu.py").write_text(SHARD_ON_CPU)
    script = (tmp_path / "shard_on_cpu.py", TRAINING / "distill.py")
    device = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": "cpu"}
    options = (*SETTING, "--gradient_accumulation_steps", 1, "--save_steps", 3)
    here = ("--num_machines", "1")
    found = launcher.finish(tmp_path / "run", *options, config="hsdp.yaml", launch=here, script=script, **device)
    assert_same_weights(found, whole[2], base_folder)
