"""URLs of places in buckets."""

from dataclasses import dataclass

# What the names of environment variables begin with, by scheme.
PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}


@dataclass(frozen=True)
class BucketUrl:
    """A place in a bucket, such as `s3://bucket/runs/demo`, with a path's `/`, `name` and `parent`."""

    text: str

    def __truediv__(self, name: str) -> "BucketUrl":
        return BucketUrl(f"{self.text}/{name}")

    def __str__(self) -> str:
        return self.text

    @property
    def scheme(self) -> str:
        return self.text.partition(":")[0]

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> "BucketUrl":
        """The place above; the bucket itself has none and returns itself."""
        above = self.text.rpartition("/")[0]
        return self if above.endswith("/") else BucketUrl(above)
