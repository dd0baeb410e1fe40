"""Measures open-vocabulary segmentation: protocols, inference, metrics, reports."""
