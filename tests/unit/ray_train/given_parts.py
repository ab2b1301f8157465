"""Functions that tests give to `ElasticTrainer`."""


def task(options: object) -> None: ...


def build(spec: object, vocab_size: int, experts: object) -> None: ...


def rows(split: str, options: object) -> None: ...
