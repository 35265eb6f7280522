"""Makes reactions.csv.gz: reaction templates applied to common building blocks, with RDKit.

python -m rewards.data.make_reactions --vocabulary vocab.txt --out rewards/data/reactions.csv.gz

A row is a reaction: its split, template, reactants with what else is in the flask, product, and the product's scaffold
(Bemis and Murcko 1996, https://doi.org/10.1021/jm9602928), all as canonical SMILES. Train and test share no scaffold,
and no product. Every word of a reaction is in the vocabulary, a word a line, which is the model's that learns from it.

The templates are textbook reactions, the building blocks reagents of every laboratory. What a template writes is what
the reaction is run for; that it works on these very reactants, nobody has tried.
"""

import csv
import gzip
import io
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as pairs
from pathlib import Path
from typing import Any, NamedTuple

from rewards.command import Parser, reported
from rewards.errors import ConfigError

TRAIN, TEST = 2000, 300
LONGEST = 110
"""Words of a reaction, the arrow included."""
WORD = re.compile(r"\[[^\]]+\]|%[0-9]{2}|Br|Cl|>>|.")


def _words(text: str) -> list[str]:
    return text.split()


_ACIDS = _words("""
OC(=O)c1ccccc1 OC(=O)c1ccc(F)cc1 OC(=O)c1ccc(Cl)cc1 OC(=O)c1ccc(OC)cc1 OC(=O)c1cccc(C(F)(F)F)c1 OC(=O)c1ccc(C#N)cc1
OC(=O)c1ccncc1 OC(=O)c1cccnc1 OC(=O)c1ccccn1 OC(=O)c1ccco1 OC(=O)c1cccs1 OC(=O)c1ccc2ccccc2c1 OC(=O)c1cc2ccccc2[nH]1
OC(=O)Cc1ccccc1 OC(=O)Cc1ccc(F)cc1 OC(=O)C1CC1 OC(=O)C1CCCC1 OC(=O)C1CCCCC1 OC(=O)C1CCOCC1 OC(=O)C(C)(C)C OC(=O)CC(C)C
OC(=O)c1ccc(C(=O)OC)cc1 OC(=O)c1cccc(C(=O)OC)c1 OC(=O)CCC(=O)OC OC(=O)C1CCN(C(=O)OC(C)(C)C)CC1
OC(=O)CNC(=O)OC(C)(C)C OC(=O)c1ccc([N+](=O)[O-])cc1 OC(=O)c1ccc(Br)cc1 OC(=O)c1cccc(Br)c1 OC(=O)c1ccc(-c2ccccc2)cc1
OC(=O)COc1ccccc1 OC(=O)c1cnn(C)c1 OC(=O)c1csc(C)n1 OC(=O)/C=C/c1ccccc1 OC(=O)c1ccc2c(c1)OCO2 OC(=O)c1cnccn1
OC(=O)c1ccc(C(C)(C)C)cc1 OC(=O)c1cc(Cl)cc(Cl)c1 OC(=O)CCc1ccccc1 OC(=O)c1c(F)cccc1F
""")
_AMINES = _words("""
Nc1ccccc1 Nc1ccc(F)cc1 Nc1ccc(Cl)cc1 Nc1ccc(OC)cc1 Nc1cccc(C(F)(F)F)c1 Nc1ccc(C#N)cc1 Nc1cccnc1 Nc1ccc(C)cc1
NCc1ccccc1 NCc1ccc(F)cc1 NCc1ccncc1 NCc1ccco1 NCCc1ccccc1 NC1CC1 NC1CCCCC1 NC1CCCC1 NCC1CC1 NCC(C)C NC(C)(C)C
C1CCNC1 C1CCNCC1 C1COCCN1 CN1CCNCC1 c1ccc(N2CCNCC2)cc1 CNC CCNCC CNCc1ccccc1 C1Cc2ccccc2CN1 C1CSCCN1
O=C(OC(C)(C)C)N1CCNCC1 NC1CCN(C(=O)OC(C)(C)C)CC1 NCCNC(=O)OC(C)(C)C COC(=O)C1CCNCC1 COC(=O)c1ccc(N)cc1 COC(=O)CNC
Nc1ccc([N+](=O)[O-])cc1 Nc1ccc(Br)cc1 NCCN1CCOCC1 NC1CCOCC1 NCCOC FC1(F)CCNCC1 NCc1cccs1 Nc1ccc2c(c1)OCO2 NCC1CCCO1
""")
_BROMIDES = _words("""
Brc1ccccc1 Brc1ccc(F)cc1 Brc1ccc(OC)cc1 Brc1ccc(C#N)cc1 Brc1ccc(C(C)=O)cc1 Brc1ccc(C=O)cc1 Brc1cccc(C(F)(F)F)c1
Brc1cccnc1 Brc1ccncc1 Brc1ccccn1 Brc1cncnc1 Brc1cccs1 Brc1ccc2ccccc2c1 Brc1ccc(C(=O)OC)cc1 Brc1cccc(C(=O)OC)c1
Brc1ccc([N+](=O)[O-])cc1 Brc1ccc(C)cc1 Brc1ccc2[nH]ccc2c1 Brc1ccc2ncccc2c1 Brc1ccc(N2CCOCC2)cc1 Brc1cnn(C)c1
Brc1ccc(NC(C)=O)cc1 Brc1ccc(CO)cc1 Brc1cc(F)cc(F)c1 Brc1ccc(C(=O)N2CCOCC2)cc1 Brc1ccc(CN(C)C)cc1 Brc1ccc(OC)nc1
""")
_BORONIC_ACIDS = _words("""
OB(O)c1ccccc1 OB(O)c1ccc(F)cc1 OB(O)c1ccc(Cl)cc1 OB(O)c1ccc(OC)cc1 OB(O)c1ccc(C)cc1 OB(O)c1cccc(C(F)(F)F)c1
OB(O)c1ccc(C#N)cc1 OB(O)c1cccs1 OB(O)c1ccsc1 OB(O)c1ccco1 OB(O)c1cccnc1 OB(O)c1ccncc1 OB(O)c1ccc2ccccc2c1
OB(O)c1cnn(C)c1 OB(O)c1ccc(C(C)(C)C)cc1 OB(O)c1ccc2c(c1)OCO2 OB(O)c1ccccc1OC OB(O)c1cc(F)cc(F)c1 OB(O)c1ccc(C=O)cc1
OB(O)c1cccc(C#N)c1 OB(O)c1ccc(N(C)C)cc1 OB(O)c1ccc(-c2ccccc2)cc1 OB(O)c1ccc(OC)nc1
""")
_ALDEHYDES = _words("""
O=Cc1ccccc1 O=Cc1ccc(F)cc1 O=Cc1ccc(Cl)cc1 O=Cc1ccc(OC)cc1 O=Cc1ccc(C#N)cc1 O=Cc1cccnc1 O=Cc1ccncc1 O=Cc1ccccn1
O=Cc1ccco1 O=Cc1cccs1 O=Cc1ccc2ccccc2c1 O=CC1CCCCC1 O=CC1CC1 O=CCC(C)C O=CCc1ccccc1 O=Cc1ccc(C(=O)OC)cc1
O=Cc1ccc2c(c1)OCO2 O=Cc1cccc(Br)c1 O=Cc1ccc(C(F)(F)F)cc1 O=Cc1cnn(C)c1 O=CC1CCN(C(=O)OC(C)(C)C)CC1 O=Cc1ccc(C)cc1
O=Cc1ccc([N+](=O)[O-])cc1 O=Cc1ccc(-c2ccccc2)cc1
""")
_HALOARENES = _words("""
Fc1ccc([N+](=O)[O-])cc1 Fc1ccccc1[N+](=O)[O-] Clc1ncccn1 Clc1ccnc(C)n1 Clc1ncc(C#N)cc1 Clc1ncc([N+](=O)[O-])cc1
Fc1ccc(C#N)cc1 Fc1ccc(C=O)cc1 Clc1ncnc2ccccc12 Clc1ccnc2ccccc12 Clc1cnccn1 Clc1ccc(C(F)(F)F)cn1 Clc1nc2ccccc2s1
Clc1ncc(Br)cn1 Fc1ccc(C(=O)OC)cc1[N+](=O)[O-] Clc1ncc(C(=O)OC)cc1 Clc1ncc(F)cn1
""")
_SULFONYL_CHLORIDES = _words("""
CS(=O)(=O)Cl O=S(=O)(Cl)c1ccccc1 Cc1ccc(S(=O)(=O)Cl)cc1 COc1ccc(S(=O)(=O)Cl)cc1 O=S(=O)(Cl)c1ccc(F)cc1
O=S(=O)(Cl)c1cccs1 O=S(=O)(Cl)C1CC1 O=S(=O)(Cl)c1ccc(Br)cc1 O=S(=O)(Cl)c1ccc([N+](=O)[O-])cc1 N#Cc1ccc(S(=O)(=O)Cl)cc1
""")
_PHENOLS = _words("""
Oc1ccccc1 Oc1ccc(F)cc1 Oc1ccc(OC)cc1 Oc1ccc(C#N)cc1 Oc1ccc(C(=O)OC)cc1 Oc1ccc(C=O)cc1 Oc1cccnc1 Oc1ccc2ccccc2c1
Oc1ccc([N+](=O)[O-])cc1 Oc1ccc(Br)cc1 Oc1ccc(-c2ccccc2)cc1 Oc1cccc(Cl)c1 Oc1ccc(C(C)=O)cc1 Oc1ccc2ncccc2c1
""")
_ALKYL_BROMIDES = _words("""
BrCc1ccccc1 BrCc1ccc(F)cc1 BrCc1ccc(C#N)cc1 BrCCC BrCC(C)C BrCC1CC1 BrCC=C BrCC#C BrCC(=O)OC BrCCOC BrCc1cccnc1
BrCc1ccc(C(=O)OC)cc1 BrCCc1ccccc1 BrCc1ccc2ccccc2c1 BrCCN1CCOCC1 BrCC(=O)c1ccccc1
""")
_ISOCYANATES = _words("O=C=Nc1ccccc1 O=C=Nc1ccc(F)cc1 O=C=Nc1ccc(Cl)cc1 O=C=NC1CCCCC1 O=C=Nc1ccc(OC)cc1 O=C=NCc1ccccc1")

_FREE_AMINE = "[N;H1,H2;X3;!$(N[C,S]=[O,S,N]);!$(N[#7,#8]):3]"


@dataclass(frozen=True)
class Template:
    """``change`` is a reaction SMARTS; ``flask`` what else is there. With ``of`` in place of ``reactants`` it is
    applied to products of other templates."""

    change: str
    reactants: tuple[list[str], ...] = ()
    flask: tuple[str, ...] = ()
    of: tuple[str, ...] = ()


TEMPLATES = {
    "amide coupling": Template(f"[C:1](=[O:2])[OH].{_FREE_AMINE}>>[C:1](=[O:2])[N:3]", (_ACIDS, _AMINES)),
    "Suzuki coupling": Template("[c:1]Br.[c:2]B(O)O>>[c:1]-[c:2]", (_BROMIDES, _BORONIC_ACIDS), ("[Pd]",)),
    "reductive amination": Template(f"[CH1:1]=O.{_FREE_AMINE}>>[CH2:1][N:3]", (_ALDEHYDES, _AMINES), ("[BH4-].[Na+]",)),
    "aromatic substitution": Template(f"[c:1][F,Cl].{_FREE_AMINE}>>[c:1][N:3]", (_HALOARENES, _AMINES)),
    "sulfonamide": Template(f"[S:1](=O)(=O)Cl.{_FREE_AMINE}>>[S:1](=O)(=O)[N:3]", (_SULFONYL_CHLORIDES, _AMINES)),
    "ether": Template("[c:1][OH:2].[CH2:3]Br>>[c:1][O:2][CH2:3]", (_PHENOLS, _ALKYL_BROMIDES), ("[K+].[OH-]",)),
    "urea": Template(f"[N:1]=[C:2]=[O:4].{_FREE_AMINE}>>[N:1][C:2](=[O:4])[N:3]", (_ISOCYANATES, _AMINES)),
    "ester hydrolysis": Template(
        "[C:1](=[O:2])O[CH3]>>[C:1](=[O:2])O", flask=("[Na+].[OH-]",), of=("amide coupling", "Suzuki coupling", "ether")
    ),
    "Boc deprotection": Template(
        "[N:1]C(=O)OC(C)(C)C>>[N:1]",
        flask=("O=C(O)C(F)(F)F",),
        of=("amide coupling", "reductive amination", "sulfonamide", "aromatic substitution"),
    ),
    "nitro reduction": Template(
        "[c:1][N+](=O)[O-]>>[c:1]N",
        flask=("[H][H]", "[Pd]"),
        of=("amide coupling", "aromatic substitution", "sulfonamide", "ether"),
    ),
}


class Reaction(NamedTuple):
    template: str
    reactants: str
    product: str
    scaffold: str


def main(argv: Sequence[str] | None = None) -> int:
    return reported(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m rewards.data.make_reactions", description="Reaction problems, made with RDKit.")
    parser.add_argument("--vocabulary", required=True, type=Path, metavar="FILE", help="the model's words, a line each")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="what to write, a .csv.gz")
    given = parser.parse_args(argv)
    if not given.vocabulary.is_file():
        raise ConfigError(f"--vocabulary {given.vocabulary} is no file; take vocab.txt of the wheel of rxnfp")
    try:
        splits = split(reactions(set(given.vocabulary.read_text(encoding="utf-8").split())))
    except ImportError as error:
        raise ConfigError(f"this needs RDKit ({error}); pip install 'unmask-rl[science]'") from error
    write(given.out, splits)
    print(f"{given.out}: {', '.join(f'{len(found)} {name}' for name, found in splits.items())}")
    return 0


def reactions(words: set[str]) -> list[Reaction]:
    """Every reaction that one product is written for, by template, whose words are known, and that isn't too long."""
    found: dict[str, list[Reaction]] = {}
    for name, template in TEMPLATES.items():
        made = sorted(set(_applied(name, template, [row for of in template.of for row in found[of]])))
        found[name] = [row for row in made if _fits(row, words)]
    return [row for rows in found.values() for row in rows]


def split(rows: Sequence[Reaction]) -> dict[str, list[Reaction]]:
    """Train and test, ``TRAIN`` and ``TEST`` of them, as even over templates as can be; a scaffold, and a product,
    belongs to one. Products without a ring, whose scaffold is empty, are for training."""
    rng = random.Random("reactions")
    scaffolds = sorted({row.scaffold for row in rows} - {""})
    held_out = set(rng.sample(scaffolds, len(scaffolds) // 6))
    sides = {
        "train": ([row for row in rows if row.scaffold not in held_out], TRAIN),
        "test": ([row for row in rows if row.scaffold in held_out], TEST),
    }
    return {name: _even(side, size, rng) for name, (side, size) in sides.items()}


def write(path: Path, splits: dict[str, list[Reaction]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["split", *Reaction._fields])
    writer.writerows((name, *row) for name, rows in splits.items() for row in rows)
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def _applied(name: str, template: Template, earlier: Iterable[Reaction]) -> Iterator[Reaction]:
    from rdkit import Chem, RDLogger
    from rdkit.Chem import AllChem
    from rdkit.Chem.Scaffolds import MurckoScaffold

    RDLogger.DisableLog("rdApp.*")
    change = AllChem.ReactionFromSmarts(template.change)
    starts = pairs(*template.reactants) if template.reactants else ((row.product,) for row in earlier)
    for reactants in starts:
        products = {_smiles(made) for (made,) in change.RunReactants(tuple(map(Chem.MolFromSmiles, reactants)))}
        if len(products) == 1 and (product := products.pop()) is not None:
            flask = sorted({*(Chem.CanonSmiles(one) for one in reactants), *template.flask})
            scaffold = MurckoScaffold.MurckoScaffoldSmiles(product)
            yield Reaction(name, ".".join(flask), product, scaffold)


def _smiles(molecule: Any) -> str | None:
    """Canonical; None for what is no molecule."""
    from rdkit import Chem

    try:
        Chem.SanitizeMol(molecule)
    except ValueError:
        return None
    return Chem.MolToSmiles(molecule)


def _fits(row: Reaction, words: set[str]) -> bool:
    found = WORD.findall(f"{row.reactants}>>{row.product}")
    return len(found) <= LONGEST and words.issuperset(found)


def _even(rows: Sequence[Reaction], size: int, rng: random.Random) -> list[Reaction]:
    """``size`` rows with different products, one after the other of each template, in an order of their own."""
    by_template = {name: [row for row in rows if row.template == name] for name in TEMPLATES}
    for held in by_template.values():
        rng.shuffle(held)
    chosen: dict[str, Reaction] = {}
    while len(chosen) < size and any(by_template.values()):
        for held in by_template.values():
            if held and len(chosen) < size:
                row = held.pop()
                chosen.setdefault(row.product, row)
    return rng.sample(list(chosen.values()), len(chosen))


if __name__ == "__main__":
    sys.exit(main())
