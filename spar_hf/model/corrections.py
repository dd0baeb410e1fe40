"""
Corrections of words by annotated patches.

Let `s cos(f, t)` be the logit of a name with text embedding `t` at a patch of features `f`. Support images add `f . d` to
all names of a class, with `f` of unit length, where the corrections `d` of all classes minimise

    classes x mean over patches of cross-entropy(word logits + f . d, class)  +  penalty / 2 x sum of |d|^2

over the patches of the support images: a logistic regression that starts from the words and is pulled back to them. It is
convex. Where the words are right and sure, its gradient is 0 and nothing changes. A class without support images gets a
correction too, away from patches of others that it would have won.

How far the images are trusted is measured on themselves: of some penalties, that is taken with which the corrections from
some of the images are best on the others. Where the words know a set better, or a class has one image only, that is the
largest, which leaves them nearly as they are.
"""

import torch

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # from nearly the words alone to nearly the images alone
MARGIN = 1.15  # the chosen penalty must be so many times better than the largest: images of one place are much alike
HOPELESS = 0.9  # of the best so far: with less, smaller penalties are not tried
FOLDS = 5  # of the images, to choose a penalty
STEPS = 40  # of L-BFGS at most


@torch.no_grad()
def fit_corrections(
    features: torch.Tensor,
    classes: torch.Tensor,
    logits: torch.Tensor,
    penalty: float,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The corrections `d` of the module's docstring, by L-BFGS.

    Args:
        features (`torch.Tensor` of shape `(patches, dim)`): of unit length.
        classes (`torch.Tensor` of shape `(patches,)`): class of every patch.
        logits (`torch.Tensor` of shape `(patches, classes)`): those of the words.
        penalty: the larger, the nearer to the words.
        start: corrections to start from; 0 by default.

    Returns:
        `(classes, dim)` float32.

    Example:

    ```python
    >>> features, words = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 1.0]])  # the words say class 1 everywhere
    >>> corrections = fit_corrections(features, torch.tensor([0, 1]), words, penalty=0.01)
    >>> (words + features @ corrections.T).argmax(1).tolist()
    [0, 1]
    ```"""
    zero = torch.zeros(logits.shape[1], features.shape[1], device=features.device)
    corrections = zero if start is None else start.clone()
    corrections.grad = torch.zeros_like(corrections)
    optimiser = torch.optim.LBFGS([corrections], max_iter=STEPS, line_search_fn="strong_wolfe")
    rows = torch.arange(len(classes), device=classes.device)
    weight = len(classes.unique()) / len(classes)

    def loss() -> torch.Tensor:
        found = torch.log_softmax(logits + features @ corrections.T, 1)
        value = -weight * found[rows, classes].sum() + penalty / 2 * corrections.square().sum()
        slope = found.exp_()
        slope[rows, classes] -= 1
        corrections.grad = weight * slope.T @ features + penalty * corrections
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    corrections.grad = None
    return corrections


def patch_iou(found: torch.Tensor, classes: torch.Tensor) -> float:
    """Mean IoU of patches over the classes that there are."""
    values = []
    for label in classes.unique().tolist():
        one, other = found == label, classes == label
        values.append(float((one & other).sum()) / float((one | other).sum()))
    return sum(values) / len(values)


def choose_penalty(features: torch.Tensor, classes: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> float:
    """
    The penalty of `PENALTIES` with which images are segmented best by corrections from other images: in `FOLDS` parts, by
    the mean IoU of patches. From the largest on, until one is far worse. The largest, if no other is `MARGIN` times better.

    Args:
        features, classes, logits: as in [`fit_corrections`].
        images (`torch.Tensor` of shape `(patches,)`): image of every patch.
    """
    numbers, place = images.unique(return_inverse=True)
    folds = min(FOLDS, len(numbers))
    if folds < 2:
        return PENALTIES[0]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0)).to(place.device)
    fold = order[place] % folds
    starts: list[torch.Tensor | None] = [None] * folds
    best, chosen, first = -1.0, PENALTIES[0], 0.0
    for penalty in PENALTIES:
        found = torch.zeros_like(classes)
        for k in range(folds):
            inside, out = fold != k, fold == k
            corrections = fit_corrections(features[inside], classes[inside], logits[inside], penalty, starts[k])
            found[out] = (logits[out] + features[out] @ corrections.T).argmax(1)
            starts[k] = corrections
        value = patch_iou(found, classes)
        first = value if penalty == PENALTIES[0] else first
        if value < HOPELESS * best:
            break
        if value > best:
            best, chosen = value, penalty
    return chosen if best > MARGIN * first else PENALTIES[0]


def evenly(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` rows, evenly spread."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count).round().long().to(rows.device)]
