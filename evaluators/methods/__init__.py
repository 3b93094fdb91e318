"""What a scorer is trained by: a file for each objective."""
