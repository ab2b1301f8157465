"""A made-up `/sys/class/powercap`, in the format of https://docs.kernel.org/power/powercap/powercap.html."""

from pathlib import Path

RANGE_UJ = 262_143_328_850  # of a package's counter, as common ones have it


def write_zone(root: Path, zone: str, name: str, energy_uj: int, range_uj: int | None = RANGE_UJ) -> Path:
    """A zone like `intel-rapl:0`, or `intel-rapl:0:1` in it. Returns the file of its counter."""
    control, *numbers = zone.split(":")
    directory = root / control
    for depth in range(1, len(numbers) + 1):
        directory /= ":".join([control, *numbers[:depth]])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "name").write_text(f"{name}\n")
    (directory / "enabled").write_text("1\n")
    if range_uj is not None:
        (directory / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (directory / "energy_uj").write_text(f"{energy_uj}\n")
    return directory / "energy_uj"
