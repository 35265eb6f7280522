"""Where trajectory groups come from: the rollout actors, how many, what they are given, and the weights they use."""
