"""Data sets: found on the machine, or fetched with a checked hash."""

from rarefy.data import fashion_mnist
from rarefy.data.fashion_mnist import DataNotFoundError, FashionMNIST

__all__ = ["DataNotFoundError", "FashionMNIST", "fashion_mnist"]
