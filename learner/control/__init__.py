"""The loop of a run, from its start to its end, and what people ask of it meanwhile."""
