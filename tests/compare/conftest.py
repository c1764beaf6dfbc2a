"""Ray is an extra: without it there is nothing to test with it."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("ray") else ["test_ray.py"]
