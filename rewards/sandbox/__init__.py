"""Runs programs that a model wrote: ``runner`` is the protocol, ``local`` the sandbox on this machine."""
