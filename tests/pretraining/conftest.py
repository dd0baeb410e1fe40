"""Images and a recipe for the pre-training."""

import numpy as np
import pytest
import yaml
from coloured_world import COLOURS
from PIL import Image


@pytest.fixture
def world(tmp_path):
    """Images of coloured rectangles with masks, and images of one colour with its name in the file name."""
    rng = np.random.default_rng(0)
    scenes, tagged = tmp_path / "scenes", tmp_path / "tagged"
    for folder in (scenes / "images", scenes / "masks", tagged):
        folder.mkdir(parents=True)
    (scenes / "classes.txt").write_text("\n".join(COLOURS))
    for i in range(12):
        mask = rng.integers(0, 4, (3, 4)).astype(np.uint8).repeat(40, 0).repeat(40, 1)
        noise = rng.normal(0, 12, (*mask.shape, 3))
        pixels = (np.array(list(COLOURS.values()))[mask] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(scenes / "images" / f"{i:02}.png")
        Image.fromarray(mask).save(scenes / "masks" / f"{i:02}.png")
    for i, name in enumerate(("blue_ball", "green_ball", "bus", "red_ball", "grey_ball")):
        Image.new("RGB", (90, 80), tuple(rng.integers(0, 255, 3).tolist())).save(tagged / f"n{i}_{name}.jpg")
    recipe = {
        "sets": [{"path": "scenes", "weight": 3, "crop": [40, 110], "holdout_every": 4, "exclude": ["00"]}],
        "tagged": [{"path": "tagged", "weight": 1, "crop": [40, 80]}],
        "held_out": ["bus"],
        "held_out_tags": ["bus"],
        "synonyms": {"sky": ["blue sky"], "grass": ["lawn"]},
        "groups": [["n0", "n1", "ball"]],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path
