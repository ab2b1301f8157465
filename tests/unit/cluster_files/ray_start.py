"""What the installed `ray start` takes."""

import warnings
from functools import cache


@cache
def ray_start_options() -> frozenset[str]:
    """Every option with its dashes, `--head` for one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's command line imports Ray Serve, which warns of its own models
        from ray.scripts.scripts import start
    return frozenset(option for parameter in start.params for option in parameter.opts)
