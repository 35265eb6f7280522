"""The first ten minutes on a GPU, for a table that whoever has one can send back: ``learner.bench.gpu --all``."""
