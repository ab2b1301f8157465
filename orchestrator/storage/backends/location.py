"""Where run storage is: a directory, or a bucket by its URL.

objects_at(location_of("s3://bucket/runs") / "demo").create("job.json", data)
"""

import re
from pathlib import Path

from orchestrator.errors import UsageError, nearest
from orchestrator.storage.backends.bucket_url import PREFIXES, BucketUrl
from orchestrator.storage.backends.patience import PATIENCE, Patience
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.objects import LargeObjects

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


Location = Path | BucketUrl


def location_of(text: str) -> Location:
    """The location that a user names: an absolute path, of one relative to the current directory; or a bucket's URL.

    Raises:
        UsageError: no storage has URLs of this scheme, or the URL names no bucket.
    """
    found = _URL.fullmatch(text)
    if found is None:
        if text.partition(":")[0] in PREFIXES and ":" in text:
            raise _no_storage(text, f"a bucket's URL begins with {text.partition(':')[0]}://", "")
        return Path(text).expanduser().absolute()
    scheme, path = found[1], found[2].rstrip("/")
    if scheme not in PREFIXES:
        raise _no_storage(text, f"{scheme}:// is none of {_schemes()}", nearest(scheme, PREFIXES))
    if not re.fullmatch(r"[^/?#%\s]+(/[^/?#%\s]+)*", path) or {".", ".."} & {*path.split("/")}:
        rule = "without names that are empty, . or .., and without spaces, ?, # or %"
        raise _no_storage(text, f"a URL is {scheme}://BUCKET or {scheme}://BUCKET/PATH, {rule}", "")
    return BucketUrl(f"{scheme}://{path}")


def objects_at(location: Location, patience: Patience = PATIENCE) -> LargeObjects:
    """The objects below a location.

    Args:
        patience: with a bucket. Calls to a directory take as long as its file system does.
    """
    if isinstance(location, Path):
        return DirectoryObjects(location)
    from orchestrator.storage.backends.bucket_objects import BucketObjects  # imports obstore, which few runs need

    return BucketObjects(str(location), patience)


def is_there(location: Location) -> bool:
    """Whether anything is at a location. Raises OSError."""
    return location.exists() if isinstance(location, Path) else bool(objects_at(location).names(""))


def _schemes() -> str:
    *others, last = (f"{scheme}://" for scheme in PREFIXES)
    return f"{', '.join(others)} and {last}"


def _no_storage(text: str, rule: str, offer: str) -> UsageError:
    return UsageError(
        f"{text} can't be run storage: {rule}",
        remedy=f"{offer}Name a directory that all nodes share, or a bucket such as s3://bucket/runs.",
        unchanged="Nothing was started.",
    )
