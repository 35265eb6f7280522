"""The policy that learns: objectives, the DeepSpeed ranks, the controller."""
