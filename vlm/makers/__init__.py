"""How preference data are made, one way per file: `Options` and `records(options, model)`. See `vlm.making`."""
