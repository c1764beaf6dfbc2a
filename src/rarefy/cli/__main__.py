"""``python -m rarefy.cli``: the ``rarefy`` command."""

from rarefy.cli.main import script

if __name__ == "__main__":
    script()
