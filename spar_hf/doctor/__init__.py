"""Checks of one model in one command: weights, features, teacher, words, speed, and VOC20 beside its published figure."""
