"""What a trajectory's log-probabilities are: the states that are scored, and the forward that scores them."""
