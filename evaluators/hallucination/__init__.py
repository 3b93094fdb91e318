"""Does a vision-language model invent things? CHAIR and POPE as published, and the same measures in the shapes world.

`python -m evaluators.hallucination chair|pope --help`
"""
