"""One file per method; `mmalign.method.load("diffusion", name)` finds it by its name."""
