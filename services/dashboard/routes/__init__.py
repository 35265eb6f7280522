"""Routers of the API, one module each; ``services.dashboard.app`` includes them."""
