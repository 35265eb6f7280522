"""The three worked puzzles that SPG puts before a Sudoku question; AGRPO took them over. The texts are part of both
protocols, so they are word for word theirs (SPG: MIT licence)."""

EXAMPLES = (
    (
        "3014002020004130",
        """\
Interpret puzzle as 4 rows of 4:
R1: 3 0 1 4
R2: 0 0 2 0
R3: 2 0 0 0
R4: 4 1 3 0

Fill easy singles:
R1 missing 2 \u2192 R1C2=2.
R4 missing 2 \u2192 R4C4=2.
Box D (R3-4,C3-4) then needs {1,4}; column4 can only accept 1 \u2192 R3C4=1, R3C3=4.
R3 now missing 3 \u2192 R3C2=3.
Column1 missing 1 \u2192 R2C1=1.
Column2 missing 4 \u2192 R2C2=4.
Last cell R2C4=3.

Final grid:
R1: 3 2 1 4
R2: 1 4 2 3
R3: 2 3 4 1
R4: 4 1 3 2""",
        "3214142323414132",
    ),
    (
        "0000100420013142",
        """\
Interpret puzzle as 4 rows of 4:
R1: 0 0 0 0
R2: 1 0 0 4
R3: 2 0 0 1
R4: 3 1 4 2

Fill easy singles:
Col1 missing 4 \u2192 R1C1=4.
Col4 missing 3 \u2192 R1C4=3.
Box A (R1-2,C1-2) missing {2,3} and R1 now needs {1,2} \u2192 R1C2=2, R2C2=3.
R1C3=1.
R2 now missing 2 \u2192 R2C3=2.
Col2 missing 4 \u2192 R3C2=4, then R3C3=3.

Final grid:
R1: 4 2 1 3
R2: 1 3 2 4
R3: 2 4 3 1
R4: 3 1 4 2""",
        "4213132424313142",
    ),
    (
        "2001403002001420",
        """\
Interpret puzzle as 4 rows of 4:
R1: 2 0 0 1
R2: 4 0 3 0
R3: 0 2 0 0
R4: 1 4 2 0

Fill easy singles:
R1 missing {3,4}; Col2 can't be 1 so R1C2=3 \u2192 R1C3=4.
R4 missing 3 \u2192 R4C4=3.
Col4 missing {2,4}; R2 must take 2 \u2192 R2C4=2 \u2192 R2C2=1.
Col1 missing 3 \u2192 R3C1=3.
Col3 missing 1 \u2192 R3C3=1 \u2192 R3C4=4.

Final grid:
R1: 2 3 4 1
R2: 4 1 3 2
R3: 3 2 1 4
R4: 1 4 2 3""",
        "2341413232141423",
    ),
)
"""Puzzle, reasoning and answer of each. The solutions are among the 288 grids, so they also occur in the data."""
