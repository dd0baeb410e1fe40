"""Pre-trains the base of spar-tiny from scratch."""
