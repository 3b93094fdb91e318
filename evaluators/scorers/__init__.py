"""One file per scorer; `evaluators.scorer.load(name)` finds it by its name."""
