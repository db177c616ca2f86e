"""The header reader over real files: the same values as pydicom, at any prefix size, without the pixels."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from sphere.conf.errors import RejectReason
from sphere.ingest.header import Header, HeaderReader, Rejected, identify
from sphere.ingest.header.columns import COLUMNS
from tests.support.headers import (
    Source,
    json_differences,
    packaged_files,
    pydicom_dataset,
    read,
    typed_differences,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("ignore"),  # pydicom complains of the broken files
]

# Files of the corpus that are no instance of a study, by what is wrong with them. All others are rows.
REJECTED = {
    RejectReason.MEDIA_DIRECTORY: (
        "dcm_qa_ct/Philips/DICOMDIR",
        "dcm_qa_ct/Philips/S21570/DIRFILE",
        "dcm_qa_ct/S21570/S1000/DIRFILE",
        "dcm_qa_ct/S21570/S2010/DIRFILE",
        "fo-dicom/DICOMDIR",
        "pydicom/dicomdirtests/DICOMDIR",
        "pydicom/dicomdirtests/DICOMDIR-bigEnd",
        "pydicom/dicomdirtests/DICOMDIR-empty.dcm",
        "pydicom/dicomdirtests/DICOMDIR-implicit",
        "pydicom/dicomdirtests/DICOMDIR-nopatient",
    ),
    RejectReason.MISSING_UID: (
        "fo-dicom/GH220.dcm",
        "fo-dicom/GH223.dcm",
        "fo-dicom/GH626.dcm",
        "fo-dicom/multiframe.dcm",
        "nibabel/decimal_rescale.dcm",
        "pydicom-data/HTJ2KLossless_08_RGB.dcm",
        "pydicom-data/JLSL_08_07_0_1F.dcm",
        "pydicom-data/JLSL_RGB_ILV0.dcm",
        "pydicom/JPEGLSNearLossless_16.dcm",
        "pydicom/SC_rgb_jls_lossy_line.dcm",
        "pydicom/UN_sequence.dcm",
        "pydicom/chrSQEncoding.dcm",
        "pydicom/empty_charset_LEI.dcm",
        "pydicom/hotiron.dcm",
        "pydicom/nested_priv_SQ.dcm",
        "pydicom/no_meta_group_length.dcm",
        "pydicom/priv_SQ.dcm",
        "weasis-dicom-tools/NeurosurgeryPlan.dcm",
    ),
    RejectReason.BAD_UID: (
        "dcm4che/3gb-bulk-data-truncated",  # "3gb_native.0"
        "pydicom-data/bad_sequence.dcm",  # a "/" in the UID
        "weasis-dicom-tools/jpeg2000-multiframe-multifragments.dcm",  # 67 characters
    ),
    RejectReason.TRUNCATED: ("dcm4che/no_preamble_dicm_in_data",),  # cut within a private element
    RejectReason.NOT_DICOM: ("pydicom/no_meta.dcm",),  # its first byte is missing
}
WARNED = {
    "dcmjs/no-meta-length-test.dcm": "leading zeros",
    "dicomParser/IM00001.fragmented_no_bot_jpeg_baseline.50.dcm": "(0008,0005) SpecificCharacterSet: unknown",
    "fo-dicom/GH133.dcm": "(0010,0030) PatientBirthDate: a value does not fit its column",
    "fo-dicom/GH195.dcm": "(0009,1105) private: 1 of 1 values are not numbers",
    "pydicom/MR_truncated.dcm": "(7FE0,0010) PixelData: truncated, 8130 of 8192 bytes are there",
    "pydicom/badVR.dcm": "(0028,0008) NumberOfFrames: 1 of 1 values are not numbers",
}


@pytest.fixture(scope="module")
def files(corpus: Path, corpus_index: list[dict[str, str]]) -> dict[str, bytes]:
    """Every file of the corpus by its name in the index."""
    return {row["file"]: (corpus / row["file"]).read_bytes() for row in corpus_index}


def test_every_file_is_a_row_or_rejected_for_its_reason(files: dict[str, bytes]):
    found = {name: read(data) for name, data in files.items()}
    rejected = {name: result.reason for name, result in found.items() if isinstance(result, Rejected)}
    expected = {name: reason for reason, names in REJECTED.items() for name in names}
    assert rejected == expected
    for name, warning in WARNED.items():
        header = found[name]
        assert isinstance(header, Header)
        assert any(warning in text for text in header.warnings), (name, header.warnings)


def _check(path: Path, reader: HeaderReader) -> list[str]:
    data = path.read_bytes()
    source = Source(data)
    header = reader.read(data[:4096], size=len(data), fetch=source.fetch)
    if isinstance(header, Rejected):
        return []
    dataset = pydicom_dataset(path)
    differences = [
        *typed_differences(header.values, dataset, COLUMNS),
        *json_differences(orjson.loads(header.dataset), dataset),
    ]
    return [f"{path.name}: {text}" for text in differences]


def test_corpus_equals_pydicom(corpus: Path, files: dict[str, bytes]):
    reader = HeaderReader(max_header=1 << 26)
    differences = [text for name in files for text in _check(corpus / name, reader)]
    assert differences == []


def test_packaged_files_equal_pydicom():
    reader = HeaderReader(max_header=1 << 26)
    differences = [text for path in packaged_files() for text in _check(path, reader)]
    # pydicom gives a value that the end of the file cuts; here it costs that element
    assert [text for text in differences if "rtplan_truncated" not in text] == []


def test_what_was_read_before_does_not_change_a_header(files: dict[str, bytes]):
    """One reader over everything, forwards and backwards, gives what a fresh reader gives."""
    fresh = {name: read(data) for name, data in files.items()}
    reader = HeaderReader(max_header=1 << 26)
    for name in [*files, *reversed(files)]:
        data = files[name]
        assert reader.read(data[:16_384], size=len(data), fetch=Source(data).fetch) == fresh[name], name


@pytest.mark.parametrize("prefix", [1, 132, 300, 4096, 1 << 30])
def test_any_prefix_gives_the_same(files: dict[str, bytes], prefix: int):
    for name, data in files.items():
        if len(data) < 1 << 20:
            assert read(data, prefix=prefix) == read(data), name


def test_pixels_are_not_fetched(files: dict[str, bytes]):
    checked = 0
    for name, data in files.items():
        source = Source(data)
        header = HeaderReader(max_header=1 << 26).read(data[:132], size=len(data), fetch=source.fetch)
        if isinstance(header, Rejected) or header.pixel_offset is None:
            continue
        checked += 1
        taken = sum(count for _, count in source.fetched)
        assert taken <= 2 * header.pixel_offset + 16_384, name
        assert header.pixel_offset < len(data)
        assert data[header.pixel_offset : header.pixel_offset + 4] in (
            *(b"\xe0\x7f\x08\x00", b"\xe0\x7f\x09\x00", b"\xe0\x7f\x10\x00"),
            b"\x7f\xe0\x00\x10",
        ), name
    assert checked > 200


def test_identify_equals_the_reader(files: dict[str, bytes]):
    for name, data in files.items():
        header = read(data)
        if isinstance(header, Rejected):
            identify(data[:65_536], size=len(data))
            continue
        identity = identify(data[:65_536], size=len(data))
        assert identity.complete, name
        for keyword in ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"):
            assert getattr(identity, keyword) == header.values.get(keyword, ""), name
        assert identity.TransferSyntaxUID == header.TransferSyntaxUID, name
        assert identity.dataset_offset == header.dataset_offset, name
        bare = identify(
            data[header.dataset_offset :][:65_536],
            transfer_syntax_uid=header.TransferSyntaxUID,
            size=len(data) - header.dataset_offset,
        )
        assert bare.dataset_offset == 0
        assert bare.StudyInstanceUID == identity.StudyInstanceUID, name
