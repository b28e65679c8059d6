// Memory of outputs, and of the work of one call.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>

#include "kept.h"

namespace normkit {

// Whether torch has been asked to fill uninitialized memory, which shows what a kernel leaves unwritten.
inline bool is_filled() {
  const auto& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

// An uninitialized tensor of the shape, type and layout of x, which is packed in some memory format.
inline Tensor output_like(const Tensor& x) {
  if (x.nbytes() < callbacks().kept_from || is_filled()) return at::empty_like(x);
  Kept::of_process().ask(x.nbytes());  // a wrong setting is told here, where an error is heard
  return Allocator::of_process().empty_like(x);
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
