"""What a measurement says of where it was made."""

import datetime
import platform

from rarefy import environment


def test_a_row_says_machine_versions_date_and_command():
    row = environment.provenance("python benchmarks/x.py")
    assert list(row) == ["cpu", "native_isa", "torch", "rarefy", "python", "threads", "date", "command"]
    assert row["cpu"] == environment.cpu_name()
    assert row["python"] == platform.python_version()
    assert datetime.date.fromisoformat(row["date"])
    assert row["command"] == "python benchmarks/x.py"


def test_a_row_of_a_run_is_of_what_the_run_wrote():
    about = environment.environment(1, "cpu") | {"cpu": "another", "date": "2026-01-02T03:04:05+00:00"}
    row = environment.provenance("rarefy train", about)
    assert (row["cpu"], row["date"], row["command"]) == ("another", "2026-01-02", "rarefy train")
