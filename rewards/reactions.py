"""Molecules as SMILES: whether two texts mean the same one."""

import importlib
import re
from functools import cache
from typing import Any

WORD = r"\[[^\]]+\]|%[0-9]{2}|Br|Cl|>>|[\s\S]"
"""Regular expression whose matches are the words of SMILES: atoms in brackets, ring closures of two digits, elements of
two letters, the arrow of a reaction; else a character (Schwaller et al. 2019,
https://doi.org/10.1021/acscentsci.9b00576)."""
_WORD = re.compile(WORD)


def words(smiles: str) -> list[str]:
    """The words of SMILES, as tokenizers of reactions cut them."""
    return _WORD.findall(smiles)


def same_molecules(one: str, other: str) -> bool:
    """Whether both texts mean the same molecules, written in whatever way and order; a text that means none equals
    nothing. Without RDKit (``pip install 'unmask-rl[science]'``): whether they are the same text."""
    if not knows_molecules():
        return one == other
    canonical_one = canonical(one)
    return canonical_one is not None and canonical_one == canonical(other)


def knows_molecules() -> bool:
    """Whether RDKit is installed."""
    return _chemistry() is not None


def told_by() -> str:
    """By what two texts are compared here, in a few words."""
    if not knows_molecules():
        return "the same text, since RDKit isn't installed"
    return "the same molecules, by RDKit"


def canonical(smiles: str) -> str | None:
    """RDKit's canonical SMILES of what the text means; None when it means no molecule. Needs RDKit."""
    chemistry = _chemistry()
    assert chemistry is not None, "ask knows_molecules first"
    molecule = chemistry.MolFromSmiles(smiles) if smiles else None
    return None if molecule is None else chemistry.MolToSmiles(molecule)


@cache
def _chemistry() -> Any | None:
    try:
        chemistry = importlib.import_module("rdkit.Chem")
    except ImportError:
        return None
    importlib.import_module("rdkit.RDLogger").DisableLog("rdApp.*")  # why a text means nothing is not news here
    return chemistry
