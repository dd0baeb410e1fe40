"""Linear probe and panoptic head, trained on SPAR features."""
