"""What goes wrong in an export."""


class ExportError(Exception):
    """A student can't be exported; the text says why and what to do."""
