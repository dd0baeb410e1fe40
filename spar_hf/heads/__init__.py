"""Linear probes and panoptic heads, trained on the dense features of a SPAR model or of another backbone."""
