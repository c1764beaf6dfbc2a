"""``python -m rarefy``: the command line."""

from rarefy.cli import script

if __name__ == "__main__":
    script()
