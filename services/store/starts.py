"""The start of a run, as the store knows it."""

BEGUN = "begun"
"""Kind of the event of each start. Its text is the command; ``data`` has what ``learner.reporting.starts`` notes of it:
command, folder, place, recipe and recipe_settings, code, versions, machine."""
