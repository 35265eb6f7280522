"""Molecules as SMILES: whether two texts mean the same one."""

import importlib
from functools import cache
from typing import Any


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
