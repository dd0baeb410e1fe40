"""The small data set that tests of the evaluation share."""

CLASSES = ["road", "sky-other-merged", "null", "tree-merged", "car", "dog"]  # no mask holds the last one
LABELS = ["road", "sky", "background", "tree", "car", "dog"]
SIZES = [(70, 101), (64, 64), (47, 90), (131, 66), (80, 83)]  # height, width
