"""Every error that llm-os raises on purpose.

    Error
    ├── ConfigError            an option that does not exist or is out of range
    ├── RequestError           a request that cannot be run as it stands
    │   └── Refused            well formed, but not now: queue full, memory too small
    ├── ModelError             a model that cannot be used
    │   ├── ModelNotFound      no such alias, file or package
    │   ├── FormatError        the file is damaged, hostile, or not a model
    │   └── Unsupported        a sound model that this version cannot run
    ├── StoreError             a download or the model store failed
    ├── DriverError            the device failed, or the driver is not available here
    ├── PluginError            a plugin raised, took too long, or gave something of the wrong type
    └── Closed                 the kernel is closing or closed

A message is one line: it names the thing, the limit, and the way out.
"""


class Error(Exception):
    """Base of the tree. Catch this to catch whatever llm-os reports."""


class ConfigError(Error):
    """A configuration field is unknown or has a value out of range."""


class RequestError(Error):
    """The request cannot be run: a field is missing, contradictory or out of range."""


class Refused(RequestError):
    """The request is sound but is not admitted now; the message says what would have to change.

    `retry_after_s` is when there may be room again, if that is known.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(Error):
    """A model cannot be used."""


class ModelNotFound(ModelError):
    """The name is no alias, file, directory or package that can be found."""


class FormatError(ModelError):
    """A model file is truncated, malformed or hostile. Names the file, the field and the limit."""


class Unsupported(ModelError):
    """The model is sound but uses an architecture, tensor type or tokenizer that is not supported."""


class StoreError(Error):
    """A download or a change of the model store failed; nothing was left behind."""


class DriverError(Error):
    """The device failed, or the driver cannot be used on this machine."""


class PluginError(Error):
    """A plugin failed a request: it raised, overran its time or gave a wrong type. Names the plugin and the hook."""


class Closed(Error):
    """The kernel was closed while the call was in flight, or before it."""


def as_error(error: BaseException, kind: type[Error]) -> Error:
    """What people see of a failure: our own errors as they are, anything else as `kind`, named by its type."""
    return error if isinstance(error, Error) else kind(f"{type(error).__name__}: {error}")
