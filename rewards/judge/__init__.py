"""A language model behind an OpenAI-compatible server that scores completions by a rubric."""
