"""
Pre-training of the base of spar-tiny from scratch: a small SigLIP-shaped pair of towers, at one fixed resolution.

[`words`] makes a tokenizer and a text tower that knows its words, [`crops`] cuts training crops, [`losses`] compares patches
with words, and [`trainer`] brings them together.
"""
