"""`spar-hf`, the command line."""
