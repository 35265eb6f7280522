"""What the sequence of an antibody's heavy chain says: its loops, motifs that make trouble, charge, hydrophobicity.

Sequences are one-letter amino acids. Everything here is a rule about text. A rule is not a measurement: a motif that is
buried does no harm, and a loop without any may still not fold.
"""

import re
from dataclasses import dataclass

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"

_FRAMEWORK_3 = 38
"""Residues from IMGT position 66 to cysteine 104; position 73 is empty in heavy chains."""
_TRYPTOPHAN = re.compile(r"W[AFILV][KR]")
_SECOND_CYSTEINE = re.compile(r"Y[FLY]C")
_J_TRYPTOPHAN = re.compile(r"W[DG][A-Z]G")


@dataclass(frozen=True)
class Loops:
    """(start, end) of the three loops of a heavy chain, counted from 0, the end not included."""

    h1: tuple[int, int]
    h2: tuple[int, int]
    h3: tuple[int, int]


def loops(chain: str) -> Loops | None:
    """The complementarity-determining regions of a heavy chain's variable domain, in the borders of IMGT: positions 27
    to 38, 56 to 65 and 105 to 117 (Lefranc et al. 2003, https://doi.org/10.1016/S0145-305X(02)00039-3).

    Found by the residues that heavy chains share, not by an alignment: cysteine 23, tryptophan 41 in ``W[AFILV][KR]``,
    cysteine 104 in ``Y[FLY]C`` and tryptophan 118 in ``W[DG]xG``. None for a chain that doesn't show them where they
    belong.
    """
    cysteine_23 = chain.find("C", 18, 26)
    tryptophan_41 = _TRYPTOPHAN.search(chain, cysteine_23 + 11, cysteine_23 + 20)
    cysteine_104 = tryptophan_41 and _SECOND_CYSTEINE.search(chain, tryptophan_41.start() + 45)
    if cysteine_23 < 0 or tryptophan_41 is None or cysteine_104 is None:
        return None
    tryptophans_118 = [found.start() for found in _J_TRYPTOPHAN.finditer(chain, cysteine_104.end())]
    second = (tryptophan_41.start() + 15, cysteine_104.end() - _FRAMEWORK_3)
    if not tryptophans_118 or second[0] >= second[1]:
        return None
    return Loops(
        h1=(cysteine_23 + 4, tryptophan_41.start() - 2),
        h2=second,
        h3=(cysteine_104.end(), tryptophans_118[-1]),  # the last: a loop may hold such a motif itself
    )


@dataclass(frozen=True)
class Liability:
    """A motif at residues ``start`` to ``end``, the end not included."""

    name: str
    start: int
    end: int


MOTIFS = {
    "glycosylation": "N[^P][ST]",
    "deamidation": "N[GST]",
    "isomerization": "D[GS]",
    "oxidation": "[MW]",
    "cysteine": "C",
    "cleavage": "DP",
}
"""Motifs of chemical liability.

- glycosylation: an N-linked sugar (the sequon; Gavel and von Heijne 1990, https://doi.org/10.1093/protein/3.5.433).
- deamidation: asparagine loses its amide, quickest before G, then S and T (Robinson and Robinson 2001,
  https://doi.org/10.1073/pnas.98.3.944; in antibodies Lu et al. 2019, https://doi.org/10.1080/19420862.2018.1548233).
- isomerization: of aspartate, before G and S (Lu et al. 2019).
- oxidation: of methionine and tryptophan (Yang et al. 2017, https://doi.org/10.1080/19420862.2017.1290753). It takes
  place where they are exposed, which a sequence doesn't tell; in a loop they often are.
- cysteine: without a partner in the loop's frame it pairs with that of another molecule. Every one counts.
- cleavage: the bond between aspartate and proline breaks in acid (Piszkiewicz et al. 1970,
  https://doi.org/10.1016/0006-291X(70)90918-6).
"""
_FINDERS = {name: re.compile(f"(?=({motif}))") for name, motif in MOTIFS.items()}


def liabilities(chain: str, start: int, end: int) -> list[Liability]:
    """Every motif that has a residue at ``start`` to ``end`` of the chain, the end not included; overlapping ones too,
    and those that begin or end in the framework. In the order of ``MOTIFS``, then of places."""
    return [
        Liability(name, found.start(1), found.end(1))
        for name, finder in _FINDERS.items()
        for found in finder.finditer(chain)
        if found.start(1) < end and found.end(1) > start
    ]


_PKA_OF_BASES = {"K": 10.8, "R": 12.5, "H": 6.5}
_PKA_OF_ACIDS = {"D": 3.9, "E": 4.1, "C": 8.5, "Y": 10.1}


def net_charge(residues: str, ph: float = 7.4) -> float:
    """Of the side chains, in elementary charges, by Henderson and Hasselbalch with EMBOSS's pKa values (the file
    Epk.dat; https://emboss.sourceforge.net/apps/cvs/emboss/apps/iep.html). No ends of the chain: a loop has none."""
    positive = sum(1 / (1 + 10 ** (ph - _PKA_OF_BASES[residue])) for residue in residues if residue in _PKA_OF_BASES)
    negative = sum(1 / (1 + 10 ** (_PKA_OF_ACIDS[residue] - ph)) for residue in residues if residue in _PKA_OF_ACIDS)
    return positive - negative


# fmt: off
_HYDROPATHY = {
    "A": 1.8, "C": 2.5, "D": -3.5, "E": -3.5, "F": 2.8, "G": -0.4, "H": -3.2, "I": 4.5, "K": -3.9, "L": 3.8,
    "M": 1.9, "N": -3.5, "P": -1.6, "Q": -3.5, "R": -4.5, "S": -0.8, "T": -0.7, "V": 4.2, "W": -0.9, "Y": -1.3,
}
# fmt: on


def hydropathy(residues: str) -> float:
    """The mean over the residues (GRAVY) of Kyte and Doolittle 1982 (https://doi.org/10.1016/0022-2836(82)90515-0):
    above 0 hydrophobic. 0 for no residue; what is no amino acid raises KeyError."""
    return sum(_HYDROPATHY[residue] for residue in residues) / len(residues) if residues else 0.0
