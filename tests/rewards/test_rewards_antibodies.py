"""Loops, motifs, charge and hydrophobicity of heavy chains against published values; the chains that ship."""

import csv
from itertools import product
from pathlib import Path

import pytest

import rewards.data
from rewards.antibodies import AMINO_ACIDS, MOTIFS, Liability, Loops, hydropathy, liabilities, loops, net_charge
from rewards.diversity import distance, distances_to_others, distinct_share

TRASTUZUMAB = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC"
    "SRWGGDGFYAMDYWGQGTLVTVSS"
)


def test_the_loops_of_trastuzumab_are_imgts():
    found = loops(TRASTUZUMAB)
    assert found == Loops((25, 33), (50, 58), (96, 109))
    assert [TRASTUZUMAB[slice(*loop)] for loop in (found.h1, found.h2, found.h3)] == [
        "GFNIKDTY",
        "IYPTNGYT",
        "SRWGGDGFYAMDY",  # holds the motif of tryptophan 118 itself
    ]


@pytest.mark.parametrize("chain", ["", "EVQL", TRASTUZUMAB[30:], TRASTUZUMAB[:100], TRASTUZUMAB.replace("C", "S")])
def test_what_is_no_heavy_chain_has_no_loops(chain):
    assert loops(chain) is None


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("ANGSA", [("glycosylation", (1, 4)), ("deamidation", (1, 3))]),
        ("ANPSA", []),
        ("ANFTA", [("glycosylation", (1, 4))]),
        ("ADGA", [("isomerization", (1, 3))]),
        ("ADPA", [("cleavage", (1, 3))]),
        ("ACMWA", [("oxidation", (2, 3)), ("oxidation", (3, 4)), ("cysteine", (1, 2))]),
        ("NNSS", [("glycosylation", (0, 3)), ("glycosylation", (1, 4)), ("deamidation", (1, 3))]),
    ],
)
def test_motifs(chain, expected):
    assert liabilities(chain, 0, len(chain)) == [Liability(name, *place) for name, place in expected]


def test_motifs_that_reach_into_the_framework_count_and_others_do_not():
    chain = "NGAAADPAAN" + "GT"
    assert [found.name for found in liabilities(chain, 5, 10)] == ["glycosylation", "deamidation", "cleavage"]
    assert liabilities(chain, 2, 4) == []
    assert {found.name for found in liabilities(chain, 0, 2)} == {"deamidation"}
    assert set(MOTIFS) == {"glycosylation", "deamidation", "isomerization", "oxidation", "cysteine", "cleavage"}


def test_net_charge():
    assert net_charge("K", ph=10.8) == pytest.approx(0.5) and net_charge("D", ph=3.9) == pytest.approx(-0.5)
    assert net_charge("KKRR") == pytest.approx(4, abs=2e-3) and net_charge("DE") == pytest.approx(-2, abs=2e-3)
    assert net_charge("H") == pytest.approx(1 / (1 + 10**0.9)) and net_charge("AGSW") == 0.0


def test_hydropathy():
    assert hydropathy("I") == 4.5 and hydropathy("R") == -4.5 and hydropathy("") == 0.0
    assert hydropathy("AGVLK") == pytest.approx((1.8 - 0.4 + 4.2 + 3.8 - 3.9) / 5)
    assert sum(map(hydropathy, AMINO_ACIDS)) == pytest.approx(-9.8)  # the table's sum
    with pytest.raises(KeyError):
        hydropathy("X")


def test_diversity():
    assert distance("kitten", "sitting") == pytest.approx(3 / 7) and distance("", "") == 0.0 and distance("", "ab") == 1
    assert (distinct_share([]), distinct_share(["a", "a"]), distinct_share(["a", "b"])) == (0.0, 0.5, 1.0)
    texts = ["ARDY", "ARDY", "ARGY", "W"]
    assert distances_to_others(texts) == pytest.approx([1.25 / 3, 1.25 / 3, 1.5 / 3, 3 / 3])
    long = ["ab" * 2000, "ab" * 1990 + "c" * 20]
    assert distances_to_others(long) == [20 / 4000] * 2, "in milliseconds"
    assert distances_to_others(["a", "a"]) == [0.0, 0.0] and distances_to_others(["a"]) == [0.0], "one text for all"


def shipped() -> list[dict[str, str]]:
    with (Path(rewards.data.__file__).parent / "heavy_chains.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_chains_that_ship_have_their_loops_where_the_file_says():
    rows = shipped()
    assert len({row["name"] for row in rows}) == len({row["sequence"] for row in rows}) == len(rows) == 86
    for row in rows:
        chain = row["sequence"]
        written = [(int(row[f"{loop}_start"]), int(row[f"{loop}_end"])) for loop in ("h1", "h2", "h3")]
        assert set(chain) <= set(AMINO_ACIDS) and chain.endswith(("TVSS", "TVSA")), row["name"]
        assert loops(chain) == Loops(*written), row["name"]
        h1, h2, h3 = (end - start for start, end in written)
        assert 8 <= h1 <= 10 and 7 <= h2 <= 10 and 5 <= h3 <= 20, row["name"]
        assert row["source"].startswith("doi:")
    assert next(row["sequence"] for row in rows if row["name"] == "trastuzumab") == TRASTUZUMAB


def test_no_third_loop_of_a_test_chain_is_near_one_of_training():
    thirds = {side: [_third(row) for row in shipped() if row["split"] == side] for side in ("train", "test")}
    assert (len(thirds["train"]), len(thirds["test"])) == (65, 21)
    assert min(distance(a, b) for a, b in product(thirds["train"], thirds["test"])) >= 0.4


def _third(row: dict[str, str]) -> str:
    return row["sequence"][int(row["h3_start"]) : int(row["h3_end"])]
