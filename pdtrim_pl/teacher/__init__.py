"""The teacher's distributions over a run's training text, on disk: written once, and read in place of a teacher."""

from pdtrim_pl.teacher.identity import CacheIdentity, example_key
from pdtrim_pl.teacher.index import CacheIndex, Making
from pdtrim_pl.teacher.of_run import identity_of, training_keys
from pdtrim_pl.teacher.offline import OfflineTeacher
from pdtrim_pl.teacher.reader import StoredTeacher
from pdtrim_pl.teacher.writer import Writing, write_cache

__all__ = [
    "CacheIdentity", "CacheIndex", "Making", "OfflineTeacher", "StoredTeacher", "Writing", "example_key", "identity_of",
    "training_keys", "write_cache",
]  # fmt: skip
