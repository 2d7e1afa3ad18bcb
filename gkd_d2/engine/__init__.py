"""Training: what happens before the first step, in each step, and at the end of a run."""
