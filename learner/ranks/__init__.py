"""The learner group: DeepSpeed ranks that compute the gradient and take the optimizer's steps."""
