"""Coverage-guided fuzzing of the readers, with atheris (which nothing depends on).

    python -m tests.formats.fuzz_with_coverage FOLDER -max_total_time=60 -max_len=20000 -rss_limit_mb=3000

FOLDER collects inputs that reach new code; those worth keeping go to ``tests/formats/corpus``, which the tests replay.
"""

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vllm_sparse.formats", "vllm_sparse.weight"]):
    from tests.formats import fuzz


def main() -> None:
    """Fuzz until the limits on the command line; a finding is written as a file and ends the run."""
    folder = Path(tempfile.mkdtemp())
    fuzz.torch.set_num_threads(1)

    def one_input(data: bytes) -> None:
        fuzz.run(data, folder)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random_source = random.Random(seed)
        if random_source.randrange(3) == 0:
            return atheris.Mutate(data, max_size)
        return fuzz.mutate(data, random_source)[:max_size]

    starts = Path(tempfile.mkdtemp())
    for number, seed in enumerate(fuzz.seeds()):
        (starts / f"seed-{number:02}").write_bytes(seed)
    atheris.Setup([*sys.argv, str(starts)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
