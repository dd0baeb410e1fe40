"""Image sources, augmentation, sample order and segmentation data sets."""
