"""Engines: what draws completions with the weights that it holds; ``base`` says what an actor needs of one."""
