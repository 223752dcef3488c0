"""Records of WARC and WET files, decoded by datatrove; what it would pass over silently is reported."""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from datatrove.data import Document

from orogen.data.curate.inputs import HTML

KINDS = ("response", "conversion")  # pages of a WARC file, and texts of a WET file; other records are no documents


def read_records(stream: BinaryIO, key: str, report: Callable[[str, str, str], None]) -> Iterator[Document]:
    """The pages and texts of an uncompressed stream of records; ids are `key:record`, which counts from 1.

    report: gets the number of a record, or an empty text for the rest of the file, the reason and the detail. Pages of
    other media types than HTML are not documents and not broken. Metadata: url, date, and HTML for pages.
    """
    import pylibmagic  # noqa: F401  before magic, which then finds the library in this package
    from datatrove.pipeline.readers.warc import process_record
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    number, records = 0, iter(ArchiveIterator(_Pieces(stream)))
    while True:
        try:
            record = next(records, None)
        except ArchiveLoadFailed as error:
            report("", "damaged file", f"the rest is not read: {error}")
            return
        if record is None:
            if not number:
                report("", "empty file", "no record of WARC")
            return
        number += 1
        if record.rec_type not in KINDS:
            continue
        try:
            found = process_record(record)
        except (KeyError, AttributeError, LookupError, ArchiveLoadFailed) as error:  # headers that a record must have
            report(str(number), "malformed record", f"{type(error).__name__}: {error}")
            continue
        if missing := _missing_bytes(record):
            report(str(number), "truncated record", f"{missing} bytes are missing")
        elif found is not None:
            metadata = {name: found[name] for name in ("url", "date")}
            yield Document(found["text"], f"{key}:{number}", metadata=metadata | _html(record))
        elif _is_text(record):
            report(str(number), "not text", "no character set decodes it")


class _Pieces:
    """Reads what one read of the file below gives. Of a damaged file, a read of a whole buffer would lose the records
    in front of the damage."""

    def __init__(self, stream: BinaryIO):
        self._stream: Any = stream

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        return self._stream.read1(size)


def _html(record: Any) -> dict[str, bool]:
    return {HTML: True} if record.rec_type == "response" else {}


def _missing_bytes(record: Any) -> int:
    """How many bytes of the record's content the file did not have."""
    while record.raw_stream.read(2**16):
        pass
    return record.raw_stream.limit


def _is_text(record: Any) -> bool:
    """Whether the record says that it is of a media type which datatrove reads."""
    media = record.rec_headers.get_header("WARC-Identified-Payload-Type")
    texts = ("text/html", "application/xhtml+xml", *(["text/plain"] if record.rec_type == "conversion" else []))
    return media in texts
