"""Methods compared under one protocol: the same budget, seeds, problems and decoding for each."""
