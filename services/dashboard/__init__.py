"""The dashboard: pages, REST API and Prometheus figures of the runs in a folder or a PostgreSQL store.

Reads the run store, writes only requested actions, and imports neither the learner nor the rollout:
``python -m services.dashboard --runs DIR``.
"""
