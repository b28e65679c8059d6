// Where outputs lie.
#pragma once

#include <ATen/ATen.h>

namespace normkit {

// Outputs of this many bytes and more are Python's to make: their memory is kept for the next ones.
constexpr int64_t KEPT_FROM = 4 << 20;

inline at::Tensor output_like(const at::Tensor& x) { return at::empty_like(x); }

}  // namespace normkit
