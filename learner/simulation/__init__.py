"""The control plane in virtual time: the product's own ledger, replay buffer and feed, with actors and ranks that only
take their time."""
