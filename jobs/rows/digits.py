"""Handwritten digits, 8 by 8, which scikit-learn ships: rows for task classification (data.entrypoint)."""

import numpy as np


def rows(split: str, options: dict) -> list[dict]:
    """A fifth of the images, in a fixed random order, is the validation split."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    cut = len(labels) // 5
    chosen = order[:cut] if split == "validation" else order[cut:]
    return [{"inputs": (images[i] / 16).reshape(8, 8).astype(np.float32), "labels": int(labels[i])} for i in chosen]
