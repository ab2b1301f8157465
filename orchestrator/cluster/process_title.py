"""Title of an actor's process, as `ps` and `top` show it: what it is, and of which run.

    ray::scheduler    ray::controller RUN    ray::worker RUN/w0    ray::tracker RUN

Ray shows `ray::CLASS` while an actor is idle and `ray::CLASS.METHOD` during a call, and all our actors of a kind have
one class.
"""

import ray


def title_of(name: str) -> str:
    """The title for an actor's name, such as `RUN/worker/w0`."""
    run, _, rest = name.partition("/")
    role, _, worker = rest.partition("/")
    return f"{role} {run}/{worker}" if worker else f"{role} {run}" if role else run


def name_process(actor: object) -> str:
    """Show this process, which Ray started for `actor`, by the actor's name. Returns the title."""
    name = ray.get_runtime_context().get_actor_name() if ray.is_initialized() else None
    if not name:  # a test has made the object itself
        return ""
    title = title_of(name)
    type(actor).__name__ = title  # Ray takes it as the title after each call
    show_title(title)
    return title


def show_title(title: str) -> None:
    """Show the title also during a call that lasts."""
    if title:
        ray._raylet.setproctitle(f"ray::{title}")  # type: ignore[attr-defined]
