"""Batch processing: features of many images as files."""
