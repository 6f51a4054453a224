"""Several kernels as one, a few rows at a time: `stages` of kernels, their `progress`, and what `weave` makes of it."""
