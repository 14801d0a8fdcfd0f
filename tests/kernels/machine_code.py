"""What ``cuobjdump -sass`` prints, searched for registers that are overwritten while wgmma still reads them.

wgmma runs on after it is issued and may read its register operands, the sparse weights and their positions, until a
wait says that its group is done. The compiler takes care of the weights' registers; of the positions' it does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WRITES_NO_REGISTER = re.compile(r"ST|RED|BAR|WARP|BR[AX]|CALL|RET|EXIT|NANOSLEEP|U|CCTL|[HQI]GMMA")
Registers = frozenset[int]


@dataclass(frozen=True)
class InFlight:
    """The registers that groups of products read, oldest first, and those of the group that is not complete yet."""

    groups: tuple[Registers, ...] = ()
    last: Registers = frozenset()

    def after(self, instruction: str) -> InFlight:
        if "GMMA." in instruction:
            last = self.last | operands(instruction)
            return InFlight((*self.groups, last)) if "gsb0" in instruction else InFlight(self.groups, last)
        if wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", instruction):
            left = int(wait[1], 16)
            return InFlight(self.groups[max(0, len(self.groups) - left) :], self.last)
        return self

    def registers(self) -> Registers:
        return self.last.union(*self.groups)


def operands(instruction: str) -> Registers:
    """Return the registers that a wgmma reads beside its accumulators: 4 of weights, one of positions."""
    sums, *others = instruction.split(None, 1)[1].split(", ")
    found: set[int] = set()
    for place, name in enumerate(others):
        if name != sums and (number := re.fullmatch(r"R(\d+)", name)):
            found.update(range(int(number[1]), int(number[1]) + (4 if place == 0 else 1)))
    return frozenset(found)


def written(instruction: str) -> Registers:
    """Return the registers that an instruction writes."""
    name, _, rest = re.sub(r"^@!?U?P\d+ +", "", instruction).partition(" ")
    first = re.match(r" *(?:P[\dT], )?R(\d+)\b", rest)
    if first is None or WRITES_NO_REGISTER.match(name):
        return frozenset()
    width = re.search(r"\.(128|64)\b|\.M88\.([24])|\.(WIDE)|^(HMMA|IMMA|QMMA)", name)
    count = 1 if width is None else {"128": 4, "64": 2, "4": 4, "2": 2, "WIDE": 2}.get(width[width.lastindex or 0], 4)
    return frozenset(range(int(first[1]), int(first[1]) + count))


def overwritten(function: str) -> list[str]:
    """Return the instructions of one function that write a register which wgmma in flight may read.

    Read from the first to the last instruction, and every loop's body twice.
    """
    listing = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", function)
    code = [instruction for _, instruction in listing]
    index = {int(address, 16): i for i, (address, _) in enumerate(listing)}
    found: dict[str, None] = {}

    def run(first: int, last: int, state: InFlight) -> InFlight:
        for i in range(first, last + 1):
            if (state.groups or state.last) and written(code[i]) & state.registers():
                found[f"{listing[i][0]} {code[i]}"] = None
            state = state.after(code[i])
        return state

    state = InFlight()
    for i, instruction in enumerate(code):
        state = run(i, i, state)
        jump = re.search(r"\bBRA .*?0x([0-9a-f]+)", instruction)
        if jump and index.get(int(jump[1], 16), i + 1) <= i:
            run(index[int(jump[1], 16)], i, state)
            if not instruction.startswith("@"):
                state = InFlight()  # what follows is not reached from here
    return list(found)
