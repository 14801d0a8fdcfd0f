"""The search for registers that are overwritten too early, on machine code written for it."""

from __future__ import annotations

import pytest

from tests.kernels.machine_code import operands, overwritten, written

# Positions of the next step are loaded while the second group of the last step may still run.
LOOP = """
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0020*/                   {first} ;
        /*0030*/                   HGMMA.SP.64x96x32.F32.BF16 R72, R120, gdesc[UR20], R72, UP0, R152, 0x0, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0050*/                   {second} ;
        /*0060*/                   HGMMA.SP.64x96x32.F32.BF16 R72, R128, gdesc[UR12], R72, R153, 0x0, gsb0 ;
        /*0070*/              @!P0 BRA 0x10 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   MOV R120, R128 ;
"""


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("LDS R152, [R14]", "LDS R153, [R14]", []),
        ("LDS.64 R152, [R14]", "NOP", ["0020 LDS.64 R152, [R14]"]),
        ("NOP", "@P1 IMAD.MOV.U32 R121, RZ, RZ, R5", ["0050 @P1 IMAD.MOV.U32 R121, RZ, RZ, R5"]),
        ("LDS.128 R120, [R14]", "LDS.128 R124, [R14]", []),
        ("LDS.128 R124, [R14]", "LDS.128 R128, [R14]", []),
        ("@P1 STS [R153], R128", "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R120+URZ], RZ", []),
    ],
)
def test_overwritten(first: str, second: str, found: list[str]) -> None:
    assert overwritten(LOOP.format(first=first, second=second)) == found


def test_operands_and_results() -> None:
    assert operands("HGMMA.SP.64x96x32.F32 R72, R156, gdesc[UR20], R72, !UPT, R170, 0x1") == {156, 157, 158, 159, 170}
    assert operands("QGMMA.SP.64x16x64.F32.E4M3.E4M3 R24, gdesc[UR8], R24, R5, gsb0") == {5}
    assert written("LDSM.16.M88.4 R8, [R3]") == {8, 9, 10, 11}
    assert written("SHFL.IDX PT, R4, R5, RZ, 0x1f") == {4}
    assert written("R2UR UR4, R5") == written("ISETP.GE.AND P0, PT, R160, RZ, PT") == frozenset()
