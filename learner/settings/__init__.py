"""The settings of a run: their sections, what contradicts what, and how command lines become them."""
