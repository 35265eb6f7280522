"""Whether two mathematical answers are the same: readers of formulas, and the comparison."""
