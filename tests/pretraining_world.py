"""Runs of the pre-training for tests: their smallest options, and a command line."""

SMALL = {"window_size": 32, "hidden_size": 64, "layers": 1, "vocab_size": 400, "batch_size": 4, "text_steps": 5}
SMALL |= {"warmup_steps": 1, "workers": 0, "foreign_names": 2}
COLOURS = {"sky": (90, 150, 240), "road": (90, 90, 90), "grass": (60, 170, 50), "bus": (220, 40, 40)}


def arguments(world, output, **options):
    """A command line of the pre-training."""
    values = {"data": world, "recipe": world / "recipe.yaml", "output": output, **options}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
