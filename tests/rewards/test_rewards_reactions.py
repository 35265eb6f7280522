"""Equality of molecules with RDKit and without it; the reactions that ship."""

import importlib
from collections import Counter
from pathlib import Path

import pytest

import rewards.data
from rewards import reactions
from rewards.data.make_reactions import LONGEST, TEMPLATES, TEST, TRAIN, WORD
from rewards.files import read_rows
from rewards.reactions import canonical, knows_molecules, same_molecules


@pytest.fixture
def rows():
    path = Path(rewards.data.__file__).parent / "reactions.csv.gz"
    return [row for _, _, row in read_rows(str(path))]


def test_without_rdkit_the_text_decides(monkeypatch):
    def absent(name):
        raise ImportError(name)

    reactions._chemistry.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", absent)
        assert not knows_molecules()
        assert same_molecules("OCC", "OCC") and not same_molecules("OCC", "CCO")
    reactions._chemistry.cache_clear()


@pytest.mark.skipif(not knows_molecules(), reason="RDKit is not installed (the extra science)")
def test_molecules_are_compared_not_texts(capfd):
    assert same_molecules("OCC", "CCO") and same_molecules("C1=CC=CC=C1", "c1ccccc1") and same_molecules("O.C", "C.O")
    assert not same_molecules("CCO", "CCN") and not same_molecules("F/C=C/F", "F/C=C\\F")
    assert canonical("c1ccccc") is canonical("") is None and not same_molecules("c1ccccc", "c1ccccc")
    assert capfd.readouterr().err == ""


def test_the_reactions_that_ship(rows):
    assert Counter(row["split"] for row in rows) == {"train": TRAIN, "test": TEST}
    of = {side: [row for row in rows if row["split"] == side] for side in ("train", "test")}
    for key in ("scaffold", "product"):
        assert not {row[key] for row in of["train"]} & {row[key] for row in of["test"]}, key
    assert all(row["scaffold"] for row in of["test"])
    assert len({row["product"] for row in rows}) == len(rows)
    for side in of.values():
        counted = Counter(row["template"] for row in side)
        assert counted.keys() == TEMPLATES.keys() and min(counted.values()) > 0.03 * len(side)
    assert max(len(WORD.findall(f"{row['reactants']}>>{row['product']}")) for row in rows) <= LONGEST


@pytest.mark.skipif(not knows_molecules(), reason="RDKit is not installed (the extra science)")
def test_what_ships_is_canonical(rows):
    assert all(canonical(row["product"]) == row["product"] for row in rows)
