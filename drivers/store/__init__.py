"""The model store: names of models, where their files are, and how they get there. Light to import."""

from llm_os.drivers.store.shelf import StoredModel
from llm_os.drivers.store.store import Store
from llm_os.drivers.store.transfer import Progress

__all__ = ["Progress", "Store", "StoredModel"]
