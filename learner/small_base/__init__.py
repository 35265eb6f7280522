"""The small base model of the recipes that need no download."""
