"""The policy that acts: models, denoising, engines, actors, ledger and replay."""
