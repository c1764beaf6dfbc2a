"""The command line: ``rarefy train``, ``compare``, ``bench``, ``export``, ``rtl`` and the others, one file a command.

Every file of a command has ``add(commands)``, which describes it, and what it runs. They are light to import: the work
is in the other rooms, which a command imports when it runs.
"""

from rarefy.cli.main import leave, main, script

__all__ = ["leave", "main", "script"]
