"""What can be wrong with a data file, one class each, all `ValueError`."""


class DataError(ValueError):
  """A data set cannot be used; the message says what, where and what to do."""


class MissingDataError(DataError):
  """No readable file lies at the path."""


class CorruptDataError(DataError):
  """A file is damaged or is not what its name says."""


class EmptyDataError(DataError):
  """A file or a client holds no examples."""


class SchemaError(DataError):
  """The fields of a file do not say which are the prompt and the response."""


class EmptyTextError(DataError):
  """Rows lack a prompt, or a response where one is needed."""
