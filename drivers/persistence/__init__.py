"""What outlives the device, or the program: the journal of sessions, the store of swapped pages. Light to import."""

from llm_os.drivers.persistence.cipher import AesGcm, Cipher
from llm_os.drivers.persistence.files import File, Files, LocalFiles
from llm_os.drivers.persistence.log import FileLog
from llm_os.drivers.persistence.swap import SlotStore

__all__ = ["AesGcm", "Cipher", "File", "FileLog", "Files", "LocalFiles", "SlotStore"]
