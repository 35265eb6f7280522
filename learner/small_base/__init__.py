"""The small base model of the recipes that need no download, and who teaches it."""
