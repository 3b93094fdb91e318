"""A page on which people vote blindly between models, and the votes as training data: `mmalign arena`."""
