"""Numba's passes for kernels: what a kernel calls is compiled into it, and not by itself."""

from collections import Counter

from numba.core import codegen, config

from normkit.kernels.numba import moments
from normkit.kernels.numba.channels.kernels import KERNELS
from normkit.kernels.numba.compiled import Kernels


def test_machine_code_is_made_of_the_kernel_alone(monkeypatch, tmp_path):
    made = Counter()
    finalize = codegen.JITCodeLibrary._finalize_specific

    def counted(library):
        made[library.name] += 1
        finalize(library)

    monkeypatch.setattr(codegen.JITCodeLibrary, "_finalize_specific", counted)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    # Another revision than that of the kernels that other tests have compiled.
    kernels = Kernels({"given": KERNELS.functions["given"]}, sources=("pipeline", "slots"))
    assert kernels.address("given", "float32", None, residual=False)
    assert made["given"] == 1
    assert not made.keys() & vars(moments).keys()
