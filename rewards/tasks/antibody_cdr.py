"""Loops for antibodies: a heavy chain with a loop masked, to be filled with one that has no known liability.

The verdict: as many amino acids as were asked for; no motif of ``rewards.antibodies.MOTIFS`` that touches a loop; and
over all loops a net charge and a mean hydropathy in their windows. All are rules about the sequence. None says that a
loop folds, binds or can be made.

Reward components, each from 0 to 1: ``motifs`` 1 / (1 + motifs that touch a loop); ``charge`` and ``hydropathy`` 1 in
the window, and by the distance from it less, 0 from 2 charges and 2 units of hydropathy on; ``value`` 1 when the
verdict is right. What is no amino acid earns nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rewards.antibodies import AMINO_ACIDS, hydropathy, liabilities, loops, net_charge
from rewards.cells import listed
from rewards.errors import ConfigError, DataError
from rewards.files import shipped_rows
from rewards.infill import Infill, contents, infill
from rewards.task import Grade, InfillTask, Problem, Split
from rewards.tasks.hub import problems_from_source

LONGEST = 300
"""Residues of a chain."""


class AntibodyCdr(InfillTask):
    """The third loop of a heavy chain (CDR-H3).

    Fields: ``chain`` (amino acids, one letter each) and ``loops`` ([start, end] of each loop to fill, counted from 0,
    the end not included). Problems are the chains that ship (``rewards/data``), split by antibody; a file's rows need
    ``chain`` alone.
    """

    name: ClassVar[str] = "antibody_cdr"
    components: ClassVar[tuple[str, ...]] = ("motifs", "charge", "hydropathy", "value")
    largest: ClassVar[Mapping[str, float]] = dict.fromkeys(components, 1.0)

    LOOPS: ClassVar[tuple[str, ...]] = ("h3",)
    CHARGE: ClassVar[tuple[float, float]] = (0.5, 1.5)
    """Net charge at pH 7.4 of the loops together, in elementary charges."""
    HYDROPATHY: ClassVar[tuple[float, float]] = (-1.5, 0.0)
    """Mean of Kyte and Doolittle over the loops together."""

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        if path is not None:
            return problems_from_source(path, task=self.name, size=size, convert=self._fields_from_row)
        if size < 1:
            raise ConfigError(f"{self.name}: size is {size}; ask for at least 1 problem")
        return [
            Problem(
                f"{self.name}-{row['name']}",
                {
                    "chain": row["sequence"],
                    "loops": [[int(row[f"{loop}_start"]), int(row[f"{loop}_end"])] for loop in self.LOOPS],
                },
            )
            for row in shipped_rows("heavy_chains.csv", split, size)
        ]

    def prompt(self, fields: dict[str, Any]) -> Infill:
        chain, at = fields["chain"], 0
        parts: list[str | int] = []
        for start, end in fields["loops"]:
            parts += [chain[at:start], end - start]
            at = end
        return infill(*parts, chain[at:], form="single")

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        spans = fields["loops"]
        written = ["".join(text.split()) for text in contents(completion)]
        if (fault := _fault(written, [end - start for start, end in spans])) is not None:
            return Grade(False, dict.fromkeys(self.components, 0.0), fault)
        chain = _filled(fields["chain"], spans, written)
        found = [motif for start, end in spans for motif in liabilities(chain, start, end)]
        residues = "".join(written)
        charge, mean = net_charge(residues), hydropathy(residues)
        faults = [f"{motif.name} of {chain[motif.start : motif.end]} at {motif.start + 1}" for motif in found]
        for what, value, window in (("net charge", charge, self.CHARGE), ("hydropathy", mean, self.HYDROPATHY)):
            if not window[0] <= value <= window[1]:
                faults.append(f"{what} {value:.2f}, not from {window[0]:g} to {window[1]:g}")
        components = {
            "motifs": 1 / (1 + len(found)),
            "charge": _near(charge, self.CHARGE),
            "hydropathy": _near(mean, self.HYDROPATHY),
            "value": float(not faults),
        }
        return Grade(not faults, components, "; ".join(faults[:3]) or None)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        chain, spans = fields.get("chain"), fields.get("loops")
        if not isinstance(chain, str) or not 0 < len(chain) <= LONGEST or set(chain) - set(AMINO_ACIDS):
            raise DataError(f"chain is {str(chain)[:60]!r}; it must be 1 to {LONGEST} of the letters {AMINO_ACIDS}")
        ends, given = [0], spans if isinstance(spans, list) else []
        for span in given:
            if isinstance(span, list) and len(span) == 2 and all(type(at) is int for at in span):
                ends += span
        fits = len(ends) == 1 + 2 * len(self.LOOPS) and len(given) == len(self.LOOPS)
        if not fits or ends[-1] >= len(chain) or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise DataError(
                f"loops is {str(spans)[:60]}; it must be {len(self.LOOPS)} [start, end] within the chain, with "
                "residues before, between and behind them"
            )

    def leak_key(self, fields: dict[str, Any]) -> str:
        """The third loop, which a chain that differs elsewhere may share."""
        return self.original(fields)[-1]

    def original(self, fields: dict[str, Any]) -> list[str]:
        return [fields["chain"][start:end] for start, end in fields["loops"]]

    def _fields_from_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        spans = listed(row.get("loops"))
        if spans is None and isinstance(row.get("chain"), str):
            found = loops(row["chain"])
            if found is None:
                raise DataError(f"no loops are found in the chain {row['chain'][:60]!r}; give them in the field loops")
            spans = [list(getattr(found, loop)) for loop in self.LOOPS]
        fields = {"chain": row.get("chain"), "loops": spans}
        self.validate_fields(fields)
        return fields


class AntibodyCdrs(AntibodyCdr):
    """All three loops at once."""

    name: ClassVar[str] = "antibody_cdrs"
    LOOPS: ClassVar[tuple[str, ...]] = ("h1", "h2", "h3")


def _fault(written: Sequence[str], lengths: Sequence[int]) -> str | None:
    if len(written) != len(lengths):
        return f"{len(written)} loops, not {len(lengths)}"
    for number, (text, length) in enumerate(zip(written, lengths, strict=True), start=1):
        if len(text) != length:
            return f"loop {number} has {len(text)} residues, not {length}"
        if strange := set(text) - set(AMINO_ACIDS):
            return f"{min(strange)} in loop {number} is no amino acid"
    return None


def _filled(chain: str, spans: Sequence[Sequence[int]], written: Sequence[str]) -> str:
    for (start, end), text in zip(spans, written, strict=True):
        chain = chain[:start] + text + chain[end:]
    return chain


def _near(value: float, window: tuple[float, float]) -> float:
    """1 in the window, 0 from 2 units off it on."""
    off = max(window[0] - value, value - window[1], 0.0)
    return max(0.0, 1 - off / 2)
