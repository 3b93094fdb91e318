"""Does a vision-language model invent things? CHAIR, POPE, AMBER, MME and MMHal as published, and in the shapes world.

`mmalign eval vlm --help`
"""
