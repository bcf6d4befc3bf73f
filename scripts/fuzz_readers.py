"""Fuzz the readers of data files guided by coverage, which the random files of tests/faults/test_fuzz_data.py are not.

    pip install atheris
    python scripts/fuzz_readers.py -runs=100000 -max_len=2000 [CORPUS_FOLDER]

Each input is a file of one of the formats, packed or not, read as one of the four kinds of data. What is not read must
be a DataError that names the file. Options and the corpus folder are libFuzzer's; the input that failed is written to
the current folder. Leaves out: data sets on the hub, Parquet's own C++ (it is not instrumented).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # as a script, this file's folder stands there instead

with atheris.instrument_imports(include=["lit_instruct.data", "json", "csv", "gzip"]):
    import lit_instruct.data.records  # noqa: F401

from tests.faults.test_fuzz_data import NAMES, READ, File, as_file, check_file, whole_files  # noqa: E402

_AS_IT_IS = 64
"""Of the second byte: what follows is the file, and not what is to be packed into it."""


def main() -> None:
    """Hand over to libFuzzer, with a good file of each format to start from where no corpus is named."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, (name, content) in enumerate(whole_files()):
            (corpus / str(number)).write_bytes(bytes([NAMES.index(name), _AS_IT_IS + number]) + content)

        def read(data: bytes) -> None:
            if len(data) > 2:
                name, kind = NAMES[data[0] % len(NAMES)], list(READ)[data[1] % len(READ)]
                file = File(name, data[2:])
                check_file((kind, file if data[1] & _AS_IT_IS else as_file(file)), folder)

        named = any(not argument.startswith("-") for argument in sys.argv[1:])
        atheris.Setup(sys.argv if named else [*sys.argv, str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
