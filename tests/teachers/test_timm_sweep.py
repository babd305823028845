"""Vision transformers of timm by name: a few on every run, all of them in the scheduled one."""

import pytest

pytest.importorskip("transformers")
try:
    import timm_sweep

    NAMES = timm_sweep.names()
except ImportError as error:
    pytest.skip(f"timm does not import: {error}", allow_module_level=True)

FEW = (
    "test_vit",
    "test_vit2",
    "test_vit3",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "vit_wee_patch16_reg1_gap_256",
)


def check(name):
    """Parity or a reason, and nothing in silence."""
    row = timm_sweep.measure(name)
    for layout in timm_sweep.LAYOUTS:
        assert row[layout] == "parity" or not row[layout].startswith("WRONG"), row
    assert row["folder"] == row["named file"] or "parity" not in (row["folder"], row["named file"]), row


@pytest.mark.parametrize("name", FEW)
def test_a_few(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FEW])
def test_every_name(name):
    check(name)
