"""The CUDA kernels without a GPU: they compile, their plans are correct, and their emulation agrees with the reference.

The emulation (``cuda_host/simt.h``) runs the kernels' own source, a fiber per thread, with mma, ldmatrix and cp.async
implemented as PTX defines them. It cannot show speed, or instructions whose hardware differs from that implementation.
``tests/gpu/test_cuda_kernels.py`` is for a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels import cases, cuda_cases
from tests.kernels.test_operators import run_examples
from vllm_nld.errors import NLDError
from vllm_nld.ops import cuda_ops

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
HOST = ROOT / "tests/kernels/cuda_host"
# -Og takes two thirds of -O1's time. _FORTIFY_SOURCE, which some systems set, forbids jumps between the fibers' stacks.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
GXX = ["g++", "-std=c++17", "-Og", "-fPIC", *WARNINGS, "-U_FORTIFY_SOURCE", "-DNLD_EMULATE"]
INCLUDES = [f"-I{ROOT / 'csrc/cuda'}", f"-I{HOST}"]
NVCC = shutil.which("nvcc")
ARCHITECTURES = {"attention_bf16.cu": (80, 100)}
"""A100, H100 and B200. No line of the source depends on them, only the compiler's use of registers, which the
tensor-core kernels of one type show for both: of bfloat16 on A100 and B200, of float16 on H100. All else is compiled
for H100 only, in a third of the time."""


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    sources = [*SOURCES, HOST / "emulate.cpp"]
    objects = [folder / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            [*GXX, *INCLUDES, "-x", "c++", "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        list(pool.map(run, commands))
    path = folder / "libnld_emulated.so"
    run(["g++", "-shared", *map(str, objects), "-o", str(path)])
    return path


@pytest.fixture
def emulated(library: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv(cuda_ops.LIBRARY, str(library))
    steer(library)
    assert cuda_ops.unavailable(torch.device("cpu")) is None
    return cuda_ops


def steer(library: Path, seed: int = 1, processors: int = 8, shared_limit: int = 227 * 1024) -> None:
    """Set the order of threads, and the properties of the emulated device."""
    ctypes.CDLL(str(library)).nld_emulate(seed, processors, shared_limit)


def test_plans(tmp_path: Path) -> None:
    program = tmp_path / "test_plan"
    run([*GXX, *INCLUDES, str(HOST / "test_plan.cpp"), "-o", str(program)])
    print(run([str(program)]))


@pytest.mark.parametrize("name", cuda_cases.BATCHES)
def test_attention(emulated: ModuleType, name: str) -> None:
    cuda_cases.check(emulated, cuda_cases.small(cuda_cases.BATCHES[name]), "cpu")


@pytest.mark.parametrize("seed", range(16))
def test_random_attention(emulated: ModuleType, library: Path, seed: int) -> None:
    steer(library, seed, processors=1 << (seed % 6))
    cuda_cases.check(emulated, cuda_cases.random_batch(seed), "cpu")


@pytest.mark.parametrize("name", ["bfloat16", "float32", "5 splits bfloat16"])
def test_order_of_threads_does_not_matter(emulated: ModuleType, library: Path, name: str) -> None:
    outputs = []
    batch = cuda_cases.small(cuda_cases.BATCHES[name])
    for seed in range(3):
        steer(library, seed)
        call = cuda_cases.build(batch)[0]
        emulated.block_attention(call, split_limit=batch.split_limit)
        outputs.append(call.output)
    for output in outputs[1:]:
        assert torch.equal(output.nan_to_num(), outputs[0].nan_to_num())


def test_small_shared_memory(emulated: ModuleType, library: Path) -> None:
    """A device with 99 KiB gets smaller tiles, or reports that it has too little."""
    steer(library, shared_limit=99 * 1024)
    rows = ((70, 30, 1),)
    cuda_cases.check(emulated, cuda_cases.Batch(rows, head_size=256, kv_heads=1), "cpu")
    with pytest.raises(NLDError, match="too little shared memory"):
        cuda_cases.check(emulated, cuda_cases.Batch(rows, torch.float32, head_size=256, kv_heads=1), "cpu")


@pytest.mark.parametrize("rows", [1, 31, 1024, 1025, 2500])
def test_accept_prefix(emulated: ModuleType, rows: int) -> None:
    cuda_cases.check_accept(emulated, rows, rows, "cpu")


@pytest.mark.parametrize("name", cases.BEST_SPECS)
def test_best_tokens(emulated: ModuleType, name: str) -> None:
    cases.check_best(emulated, cases.BEST_SPECS[name])


@pytest.mark.parametrize("seed", range(4))
def test_random_best_tokens(emulated: ModuleType, library: Path, seed: int) -> None:
    steer(library, seed)
    run_examples(10, cases.best_specs(2 * cases.GPU_SEGMENT), lambda spec: cases.check_best(emulated, spec))


def test_best_tokens_of_unaligned_rows(emulated: ModuleType) -> None:
    cases.check_best_anywhere(emulated)
    cases.check_best_alone(emulated)


def test_every_float16_is_widened(emulated: ModuleType) -> None:
    """A value per row: read 16 bytes at a time (8 columns), and one by one (5)."""
    values = torch.arange(0, 1 << 16, 61).to(torch.uint16).view(torch.float16)
    for columns in (8, 5):
        largest = emulated.best_tokens(values[:, None].expand(-1, columns).contiguous(), False)[1]
        torch.testing.assert_close(largest, values.float(), rtol=0, atol=0, equal_nan=True)


def test_mistakes_have_messages(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    call = cuda_cases.build(cuda_cases.BATCHES["bfloat16"])[0]
    with pytest.raises(NLDError, match="all four must be the same"):
        cuda_ops.block_attention(call._replace(key=call.key.float()))
    with pytest.raises(NLDError, match="prefix_lens must be contiguous and"):
        cuda_ops.block_attention(call._replace(prefix_lens=call.prefix_lens.long()))
    with pytest.raises(NLDError, match="a size is out of range"):
        cuda_ops.block_attention(call._replace(query=call.query[..., :24]))
    with pytest.raises(NLDError, match="logits has inner stride 2; needed: 1"):
        cuda_ops.best_tokens(torch.zeros(3, 8)[:, ::2])
    with pytest.raises(NLDError, match="more rows, heads or tokens than a grid"):
        cuda_ops.best_tokens(torch.empty(1, 1 << 29, dtype=torch.bfloat16))
    monkeypatch.setenv(cuda_ops.LIBRARY, "/nowhere.so")
    with pytest.raises(NLDError, match="cannot load the CUDA operators"):
        cuda_ops.accept_prefix(*(torch.zeros(1, dtype=d) for d in (torch.int64, torch.int64, torch.int32)))


def test_library_of_another_version_is_reported_without_crash(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would read the structs wrongly."""
    other = shutil.copy(library, tmp_path)  # a library is loaded once per path
    monkeypatch.setenv(cuda_ops.LIBRARY, str(other))
    monkeypatch.setattr(cuda_ops, "ABI_VERSION", cuda_ops.ABI_VERSION + 1)
    reason = cuda_ops.unavailable(torch.device("cuda"))
    assert f"have version {cuda_ops.ABI_VERSION - 1}, needed is {cuda_ops.ABI_VERSION}" in str(reason)
    monkeypatch.setenv(cuda_ops.LIBRARY, str(Path(torch.__file__).parent / "lib/libc10.so"))  # has no version
    assert "have version 1, needed" in str(cuda_ops.unavailable(torch.device("cuda")))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles(source: Path, tmp_path: Path) -> None:
    """Without a warning; the tensor-core kernels up to head size 128 spill nothing."""
    archs = ARCHITECTURES.get(source.name, (90,))
    # One PTX for all of them, because no line of the sources depends on which it is: that compiles each kernel once.
    codes = ["-gencode", f"arch=compute_{archs[0]},code=[{','.join(f'sm_{arch}' for arch in archs)}]"]
    options = ["-O3", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra", "-Xptxas", "-v"]
    log = run([str(NVCC), *options, "-t2", *codes, "-c", str(source), "-o", str(tmp_path / "out.o")])
    for kernel, spilled in re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", log, re.DOTALL):
        head = re.search(r"attention_mma.*?Li(\d+)E", kernel)
        if head and int(head[1]) <= 128:
            assert spilled == "0", kernel
