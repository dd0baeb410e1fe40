"""
The decision for every pixel as an ONNX graph, with the rule of `spar_hf.model.segmentation`.

The image is decided in strips of rows by a `Loop`, so that nothing of the size names × height × width is in memory. Pixel
positions between patches are fractions of whole numbers, computed exactly.
"""

import re

from spar_hf.model.results import check_class_count

STRIP_VALUES = 2**19  # logits of a strip that are computed at once; their buffers then stay in the cache
LABEL_TYPES = {"uint8": 2, "uint16": 4}  # numbers of onnx.TensorProto


def label_type(classes: int | None) -> str:
    """
    Type of the label map: `uint16` for more than 256 classes, or an unknown number of them.

    Raises:
        ValueError: more than 65,536 classes.
    """
    check_class_count(classes or 0)
    return "uint8" if classes is not None and classes <= 256 else "uint16"


def decision_graph(head: str, patch_size: int, labels: str, class_of_name: list[int] | None) -> str:
    """
    A graph in ONNX's text form that continues one with the input `pixel_values` and the output `logits`.

    Its inputs are `logits` `(batch, names, rows, columns)`, `pixel_values`, `image_size` `(2,)` and, unless given here,
    `class_of_name` `(names,)`. All values in it are called `spar_…`.

    Args:
        head: `classmap` or `probabilities`.
        patch_size: side of a patch in pixels.
        labels: type of the label map, see [`label_type`].
        class_of_name: the class of every name, if it is known.
    """
    inputs = ["float[batch,names,rows,columns] logits", "float[batch,3,height,width] pixel_values"]
    constants = {"minus_1": [-1], "0": [0], "1": [1], "2": [2], "patch": [patch_size], "two_patches": [2 * patch_size]}
    constants |= {"axes_12": [1, 2], "axes_123": [1, 2, 3], "values": [STRIP_VALUES]}
    maxima = CLASS_MAXIMA_IF_ANY
    if class_of_name is None:
        inputs.append("int64[names] class_of_name")
    else:
        constants["class_of_name"] = class_of_name
        several = len(set(class_of_name)) < len(class_of_name)
        named = f"{CLASS_MAXIMA}    s_best = Identity(s_best_of_names)\n"
        maxima = named if several else "    s_best = Identity(s_pixels)\n"
    inputs.append("int64[2] image_size")
    loop, outputs = HEAD_OUTPUTS[head]
    initial = [f"int64[{len(v)}] spar_{name} = {{{','.join(map(str, v))}}}" for name, v in constants.items()]
    initial += [
        "int64 spar_zero = {0}",
        "int64 spar_one = {1}",
        "bool spar_true = {1}",
        "float spar_lowest = {-3.0e38}",
        "float spar_zero_float = {0}",
    ]
    known = "class_of_name" if class_of_name is None else "spar_class_of_name"
    strip = STRIP + maxima + STRIP_ENDS[head]
    loop = loop.replace("BODY", strip).replace("LABEL_NAME", labels).replace("LABEL_TYPE", str(LABEL_TYPES[labels]))
    loop = re.sub(r"\bs_", "spar_inside_", loop)
    signature = f"spar_decision ({', '.join(inputs)}) => ({outputs.format(labels=labels)})"
    return (
        f'<ir_version: 10, opset_import: ["" : 18]>\n{signature}\n'
        f"<{', '.join(initial)}>\n{{\n"
        + SIZES
        + axis("row", "spar_row_index", "spar_height", "spar_working_height", "spar_rows")
        + axis("column", "spar_column_index", "spar_width", "spar_working_width", "spar_columns")
        + STRIPS.replace("class_of_name", known)
        + loop
        + "}\n"
    )


def axis(name: str, index: str, length: str, working: str, patches: str) -> str:
    """
    The two patches around every pixel of an axis and the weight of the second, as `patch_coordinates`: the pixel `i` lies at
    `((2 i + 1) * working - length * patch) / (2 * length * patch)` patches, here with a whole numerator and denominator.
    """
    return f"""
  spar_{name}_whole = Mul({length}, spar_two_patches)
  spar_{name}_twice = Mul({index}, spar_2)
  spar_{name}_odd = Add(spar_{name}_twice, spar_1)
  spar_{name}_centre = Mul(spar_{name}_odd, {working})
  spar_{name}_half = Mul({length}, spar_patch)
  spar_{name}_free = Sub(spar_{name}_centre, spar_{name}_half)
  spar_{name}_last = Sub({patches}, spar_1)
  spar_{name}_end = Mul(spar_{name}_last, spar_{name}_whole)
  spar_{name}_from_0 = Max(spar_{name}_free, spar_0)
  spar_{name}_at = Min(spar_{name}_from_0, spar_{name}_end)
  spar_{name}_lower = Div(spar_{name}_at, spar_{name}_whole)
  spar_{name}_next = Add(spar_{name}_lower, spar_1)
  spar_{name}_upper = Min(spar_{name}_next, spar_{name}_last)
  spar_{name}_rest = Mod(spar_{name}_at, spar_{name}_whole)
  spar_{name}_rest_float = Cast<to = 1>(spar_{name}_rest)
  spar_{name}_whole_float = Cast<to = 1>(spar_{name}_whole)
  spar_{name}_weight = Div(spar_{name}_rest_float, spar_{name}_whole_float)
"""


# sizes, and how many rows of the image a strip has; the last strip repeats the last row
SIZES = """
  spar_height = Slice(image_size, spar_0, spar_1)
  spar_width = Slice(image_size, spar_1, spar_2)
  spar_working_height = Shape<start = 2, end = 3>(pixel_values)
  spar_working_width = Shape<start = 3, end = 4>(pixel_values)
  spar_batch = Shape<start = 0, end = 1>(logits)
  spar_names = Shape<start = 1, end = 2>(logits)
  spar_rows = Shape<start = 2, end = 3>(logits)
  spar_columns = Shape<start = 3, end = 4>(logits)
  spar_batch_names = Mul(spar_batch, spar_names)
  spar_row_values = Mul(spar_batch_names, spar_width)
  spar_fit = Div(spar_values, spar_row_values)
  spar_some = Max(spar_fit, spar_1)
  spar_strip_rows = Min(spar_some, spar_height)
  spar_height_and_strip = Add(spar_height, spar_strip_rows)
  spar_rounded_up = Sub(spar_height_and_strip, spar_1)
  spar_strips = Div(spar_rounded_up, spar_strip_rows)
  spar_padded_height = Mul(spar_strips, spar_strip_rows)
  spar_padded_height_scalar = Squeeze(spar_padded_height)
  spar_padded_index = Range(spar_zero, spar_padded_height_scalar, spar_one)
  spar_last_row = Sub(spar_height, spar_1)
  spar_row_index = Min(spar_padded_index, spar_last_row)
  spar_width_scalar = Squeeze(spar_width)
  spar_column_index = Range(spar_zero, spar_width_scalar, spar_one)
"""
# names last: those of a pixel are neighbours in memory. `nothing` is 0 for each image, and NaN if one of its logits is not
# finite, since maximum and exponential of OpenVINO give numbers for NaN. Zeros are summed: sums of logits overflow float16.
STRIPS = """
  spar_zeros = Mul(logits, spar_zero_float)
  spar_nothing = ReduceSum<keepdims = 1>(spar_zeros, spar_axes_123)
  spar_nothing_of_pixels = Squeeze(spar_nothing, spar_1)
  spar_strip_count = Squeeze(spar_strips)
  spar_split = Concat<axis = 0>(spar_strips, spar_strip_rows)
  spar_above = Reshape(spar_row_lower, spar_split)
  spar_below = Reshape(spar_row_upper, spar_split)
  spar_down = Reshape(spar_row_weight, spar_split)
  spar_across = Unsqueeze(spar_column_weight, spar_1)
  spar_grid = Transpose<perm = [0, 2, 3, 1]>(logits)
  spar_last_class = Gather<axis = 0>(class_of_name, spar_minus_1)
  spar_classes = Add(spar_last_class, spar_1)
  spar_classes_are_names = Equal(spar_classes, spar_names)
  spar_one_name_each = Squeeze(spar_classes_are_names)
  spar_class_index = Unsqueeze(class_of_name, spar_1)
"""
# (batch, rows, columns, names) of the patches -> (batch, strip rows, width, names)
STRIP = """
    s_go_on = Identity(s_on)
    s_above = Gather<axis = 0>(spar_above, s_number)
    s_below = Gather<axis = 0>(spar_below, s_number)
    s_down = Gather<axis = 0>(spar_down, s_number)
    s_upper = Gather<axis = 1>(spar_grid, s_above)
    s_lower = Gather<axis = 1>(spar_grid, s_below)
    s_down_weight = Unsqueeze(s_down, spar_axes_12)
    s_change_down = Sub(s_lower, s_upper)
    s_part_down = Mul(s_change_down, s_down_weight)
    s_narrow = Add(s_upper, s_part_down)
    s_left = Gather<axis = 2>(s_narrow, spar_column_lower)
    s_right = Gather<axis = 2>(s_narrow, spar_column_upper)
    s_change_across = Sub(s_right, s_left)
    s_part_across = Mul(s_change_across, spar_across)
    s_pixels = Add(s_left, s_part_across)
"""
# The largest logit of each class's names: rows of names are written to rows of classes. `ScatterND` is faster, but the
# threads of ONNX Runtime overwrite each other's rows where several names have one class: up to 3 % of labels changed from
# run to run.
CLASS_MAXIMA = """
      s_place = Shape<start = 0, end = 3>(s_pixels)
      s_flat_shape = Concat<axis = 0>(spar_minus_1, spar_names)
      s_flat = Reshape(s_pixels, s_flat_shape)
      s_by_name = Transpose<perm = [1, 0]>(s_flat)
      s_count = Shape<start = 1, end = 2>(s_by_name)
      s_class_shape = Concat<axis = 0>(spar_classes, s_count)
      s_start = Expand(spar_lowest, s_class_shape)
      s_names_shape = Shape(s_by_name)
      s_class_of_value = Expand(spar_class_index, s_names_shape)
      s_by_class = ScatterElements<axis = 0, reduction = "max">(s_start, s_class_of_value, s_by_name)
      s_by_pixel = Transpose<perm = [1, 0]>(s_by_class)
      s_best_shape = Concat<axis = 0>(s_place, spar_classes)
      s_best_of_names = Reshape(s_by_pixel, s_best_shape)
"""
# where every class has one name, there is nothing to choose
CLASS_MAXIMA_IF_ANY = f"""
    s_best = If<
      then_branch = same () => (float[batch, r, w, c] s_same) {{ s_same = Identity(s_pixels) }},
      else_branch = several () => (float[batch, r, w, c] s_best_of_names) {{ {CLASS_MAXIMA} }}
    >(spar_one_name_each)
"""
STRIP_ENDS = {
    "classmap": """
    s_highest = ReduceMax<keepdims = 1>(s_best, spar_minus_1)
    s_class = ArgMax<axis = -1, keepdims = 0>(s_best)
    s_below_best = Sub(s_best, s_highest)
    s_shares = Exp(s_below_best)
    s_sum = ReduceSum<keepdims = 0>(s_shares, spar_minus_1)
    s_share_of_best = Reciprocal(s_sum)
    s_probability = Add(s_share_of_best, spar_nothing_of_pixels)
    s_labels = Cast<to = LABEL_TYPE>(s_class)
    s_confidence = Cast<to = 10>(s_probability)
""",
    "probabilities": """
    s_soft = Softmax<axis = -1>(s_best)
    s_shares = Add(s_soft, spar_nothing)
    s_probabilities = Transpose<perm = [0, 3, 1, 2]>(s_shares)
""",
}
# the `Loop`, and its outputs put together and cut to the height of the image
HEAD_OUTPUTS = {
    "classmap": (
        """
  spar_label_strips, spar_confidence_strips = Loop<
    body = strip (int64 s_number, bool s_on) =>
    (bool s_go_on, LABEL_NAME[batch, r, w] s_labels, float16[batch, r, w] s_confidence) {
BODY
    }>(spar_strip_count, spar_true)
  spar_labels_by_image = Transpose<perm = [1, 0, 2, 3]>(spar_label_strips)
  spar_confidence_by_image = Transpose<perm = [1, 0, 2, 3]>(spar_confidence_strips)
  spar_map_shape = Concat<axis = 0>(spar_batch, spar_padded_height, spar_width)
  spar_all_labels = Reshape(spar_labels_by_image, spar_map_shape)
  spar_all_confidence = Reshape(spar_confidence_by_image, spar_map_shape)
  labels = Slice(spar_all_labels, spar_0, spar_height, spar_1)
  confidence = Slice(spar_all_confidence, spar_0, spar_height, spar_1)
""",
        "{labels}[batch, image_height, image_width] labels, float16[batch, image_height, image_width] confidence",
    ),
    "probabilities": (
        """
  spar_probability_strips = Loop<
    body = strip (int64 s_number, bool s_on) => (bool s_go_on, float[batch, c, r, w] s_probabilities) {
BODY
    }>(spar_strip_count, spar_true)
  spar_probabilities_by_image = Transpose<perm = [1, 2, 0, 3, 4]>(spar_probability_strips)
  spar_map_shape = Concat<axis = 0>(spar_batch, spar_classes, spar_padded_height, spar_width)
  spar_all_probabilities = Reshape(spar_probabilities_by_image, spar_map_shape)
  probabilities = Slice(spar_all_probabilities, spar_0, spar_height, spar_2)
""",
        "float[batch, classes, image_height, image_width] probabilities",
    ),
}
