"""``python -m sparc3_lightning`` is ``sparc3``."""

from sparc3_lightning.cli import entry_point

if __name__ == "__main__":
    entry_point()
