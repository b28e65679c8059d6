// Memory of outputs, and of the work of one call.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>

#include "plans.h"

namespace normkit {

constexpr size_t LINE = 64;

// Whether torch has been asked to fill uninitialized memory, which shows what a kernel leaves unwritten.
inline bool is_filled() {
  const auto& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

// An uninitialized tensor of the shape, type and layout of x, which is packed in some memory format. Where memory is
// kept for large ones, Python keeps it: there is one share for all that is kept.
inline Tensor output_like(const Tensor& x) {
  if (x.nbytes() < callbacks().kept_from) return at::empty_like(x);
  return under_lock([&] {
    Owned given(THPVariable_Wrap(x.detach())), made(PyObject_CallOneArg(callbacks().empty_like, given.object));
    if (!made) throw PythonError();
    return THPVariable_Unpack(made.object);
  });
}

// Working memory of one call, of float64 numbers; none where it is of none.
class Scratch {
 public:
  explicit Scratch(int64_t numbers) {
    if (numbers == 0) return;
    const size_t bytes = (static_cast<size_t>(numbers) * sizeof(double) + LINE - 1) / LINE * LINE;
    numbers_ = static_cast<double*>(std::aligned_alloc(LINE, bytes));
    if (numbers_ == nullptr) throw std::bad_alloc();
    if (is_filled()) std::fill_n(numbers_, numbers, std::numeric_limits<double>::quiet_NaN());
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(numbers_); }

  int64_t address() const { return reinterpret_cast<int64_t>(numbers_); }

 private:
  double* numbers_ = nullptr;
};

}  // namespace normkit
