"""
Suite `distill` of `benchmark.py`: a training step relative to its bare parts, a step with few sampled windows relative to
one with all, the memory of training the last two blocks relative to training everything, and `distill.py` on two processes
relative to one.

The last launches the script itself, two processes and one in turn, with the same number of images per step: on the CPU
(gloo) with one thread per process, on GPUs (NCCL) with one GPU per process. Images per second are those of the later half of
the steps; the start (imports, models, process group) and the end (the folder that is written) have a row of their own. With
only one core or GPU both rows are left out. Other work on the machine slows two processes down more than one.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from benchmark import compare, load, ratio_row
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from spar_hf import SlidingWindowTeacher, SparImageProcessorPil
from spar_hf.distillation.losses import distillation_loss
from spar_hf.distillation.trainable import choose_parameters
from spar_hf.utils.devices import clock, peak_bytes

logger = logging.getLogger("benchmark")

TRAINING = Path(__file__).parents[1]
IMAGES_PER_STEP = 4  # of all processes of a launched run
HALF_STEPS = 6  # steps before timing starts, and timed steps
MOST_LAUNCHES = 5  # pairs of launched runs at most


def training_step(options, pixel_values: torch.Tensor, teacher: SlidingWindowTeacher, windows: int | None) -> Callable:
    """A step as distillation composes it, with accelerate; the teacher runs about so many windows, or all."""
    accelerator = Accelerator(cpu=options.device == "cpu")
    student = load(options).to(options.device).eval()
    parameters = choose_parameters(student, "2")
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=10_000)
    wrapped, optimizer, schedule = accelerator.prepare(student, optimizer, schedule)

    def step():
        with accelerator.autocast():
            if windows is None:
                target, weight = teacher(pixel_values).feature_map, None
            else:
                target, weight = teacher.sample(pixel_values, windows)
        with accelerator.accumulate(wrapped):
            with accelerator.autocast():
                features = wrapped(pixel_values).feature_map
            loss = distillation_loss(features.float(), target, weight)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return step


def bare_step(options, pixel_values: torch.Tensor, teacher: SlidingWindowTeacher) -> Callable:
    """The same work without the library's stitching and accelerate: all windows, one student step."""
    student = load(options).to(options.device).eval()
    optimizer = torch.optim.AdamW(choose_parameters(student, "2"), lr=1e-6)
    plan = teacher.plan(*pixel_values.shape[-2:])
    windows = torch.randn(options.window_batch_size, 3, *plan.window, device=options.device)
    with torch.no_grad():
        target = torch.randn_like(student(pixel_values).feature_map)

    def step():
        with torch.no_grad():
            for done in range(0, len(plan), options.window_batch_size):
                teacher.model(windows[: min(options.window_batch_size, len(plan) - done)])
        nn.functional.mse_loss(student(pixel_values).feature_map, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def student_memory(options, blocks: int | None) -> float:
    """Megabytes that two student steps add to a process that holds the model."""
    torch.manual_seed(0)
    student = load(options).to(options.device).eval()
    parameters = choose_parameters(student, "all" if blocks is None else str(blocks))
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    pixel_values = torch.randn(1, 3, options.height, options.width, device=options.device)
    before = peak_bytes(options.device)
    for _ in range(2):
        student(pixel_values).feature_map.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (peak_bytes(options.device) - before) / 2**20


def memory_in_new_process(options, blocks: int | None) -> float:
    """[`student_memory`] in a process of its own, whose peak nothing else has raised."""
    call = [sys.executable, str(Path(__file__)), json.dumps({"blocks": blocks, "options": vars(options)})]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The memory could not be measured:\n{done.stderr[-3000:]}")
    return float(done.stdout.splitlines()[-1])


def short_distillation(base: Path, images: Path, output: Path, processes: int, options) -> tuple[float, float]:
    """
    Launch a short distillation. Returns images per second of the later half of its steps, and the seconds of everything
    else. Both come from its log, whose rate is the mean over all steps so far.
    """
    cpu = options.device == "cpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    settings = {
        "model": base,
        "images": images,
        "output": output,
        "steps": 2 * HALF_STEPS,
        "log_steps": HALF_STEPS,
        "gradient_accumulation_steps": IMAGES_PER_STEP // processes,
        "holdout_images": 0,
        "workers": 0,  # each worker would want a core of its own
        "teacher_windows": 10,
        "stride": options.stride,
        "crop_probability": 0,
        "min_scale": 1,
        "report_to": "none",
    }
    command.append(str(TRAINING / "distill.py"))
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
    start = clock("cpu")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    whole = clock("cpu") - start
    if done.returncode:
        raise RuntimeError(f"distill.py failed:\n{done.stderr[-3000:]}")
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    half, end = (line["step"] * IMAGES_PER_STEP / line["images_per_second"] for line in lines)  # seconds of steps
    return HALF_STEPS * IMAGES_PER_STEP / (end - half), whole - end


def step_rows(options) -> list[dict]:
    """A training step relative to its bare parts, and a sampled step relative to a full one."""
    torch.manual_seed(0)
    size = f"{options.height}×{options.width}"
    model = load(options).to(options.device).eval().requires_grad_(False)
    teacher = SlidingWindowTeacher(model, stride=options.stride, window_batch_size=options.window_batch_size)
    pixel_values = torch.randn(1, 3, options.height, options.width, device=options.device)
    plan = teacher.plan(options.height, options.width)
    few = max(1, len(plan) // 10)
    full = training_step(options, pixel_values, teacher, None)
    bare = bare_step(options, pixel_values, teacher)
    name = f"training step over its bare parts ({len(plan)} windows, student step), {size}"
    over_bare = compare(name, full, bare, "≤ 1.10", options)
    sampled = training_step(options, pixel_values, teacher, few)
    name = f"step with {few} sampled windows over one with all {len(plan)}, stride {options.stride}, {size}"
    return [over_bare, compare(name, sampled, full, "≤ 0.25", options)]


def memory_row(options) -> dict:
    """Memory of training the last two blocks relative to training everything."""
    pair = (memory_in_new_process(options, 2), memory_in_new_process(options, None))
    name = (
        f"memory of a student step above the model's, last 2 blocks over everything, {options.height}×{options.width}"
    )
    return ratio_row(name, "megabytes", [pair], "< 1")


def count_devices(device: str) -> int:
    """How many processes can have a core, or a GPU, of their own."""
    if device != "cpu":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_rows(options) -> list[dict]:
    """`distill.py` on two processes relative to one with as many images per step: the steps, and everything else."""
    kind = "core" if options.device == "cpu" else "GPU"
    if count_devices(options.device) < 2:
        logger.warning("Two processes over one are left out: they need two %ss, and this machine has fewer.", kind)
        return []
    model, noise = load(options), np.random.default_rng(0)
    rates, starts = [], []
    with tempfile.TemporaryDirectory() as folder:
        base, images = Path(folder, "base"), Path(folder, "images")
        images.mkdir()
        model.save_pretrained(base)
        SparImageProcessorPil().save_pretrained(base)
        for i in range(4):
            pixels = noise.integers(0, 256, (options.height, options.width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{i}.jpg")
        for number in tqdm(range(min(MOST_LAUNCHES, options.repeats)), desc="two processes over one", leave=False):
            two = short_distillation(base, images, Path(folder, f"two-{number}"), 2, options)
            one = short_distillation(base, images, Path(folder, f"one-{number}"), 1, options)
            rates.append((two[0], one[0]))
            starts.append((two[1], one[1]))
    name = f"two processes over one, one {kind} each, {IMAGES_PER_STEP} images per step"
    return [
        ratio_row(f"images/s of {name}, steps alone", "images_per_second", rates, "→ 2"),
        ratio_row(f"start and end of {name}: imports, models, the folder written", "seconds", starts, ""),
    ]


def rows(options) -> list[dict]:
    """The rows of the suite; options of `benchmark.py`."""
    return [*step_rows(options), memory_row(options), *process_rows(options)]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    sys.stdout.write(f"{student_memory(SimpleNamespace(**asked['options']), asked['blocks'])}\n")
