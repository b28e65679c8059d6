// Which calls are ordinary. Everything else is handed to Python, which alone words refusals.
#pragma once

#include <array>
#include <cmath>
#include <optional>

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/python_headers.h>

namespace normkit {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Holds a reference to a Python object and gives it back.
struct Owned {
  PyObject* object;
  explicit Owned(PyObject* given) : object(given) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object); }
  explicit operator bool() const { return object != nullptr; }
};

// An error that Python has already been told.
struct PythonError : std::exception {
  const char* what() const noexcept override { return "an error was raised in Python"; }
};

// The keys of a plain tensor on a CPU: not those of views that are conjugate or negative, of ZeroTensors, of nested or
// quantized ones, of wrappers of torch.func, of subclasses.
inline c10::DispatchKeySet plain_keys() {
  static const c10::DispatchKeySet keys = [] {
    c10::InferenceMode off(false);
    return at::empty({0}, at::kCPU).key_set();
  }();
  return keys;
}

// Whether memory holds the values of a tensor, and was not freed.
inline bool is_plain(const Tensor& tensor) {
  return (tensor.key_set() | plain_keys()) == plain_keys() && tensor.layout() == at::kStrided && tensor.has_storage() &&
      (tensor.const_data_ptr() != nullptr || tensor.numel() == 0);
}

// Neither a mode that must see every operation, nor a transform, nor a trace, nor a forward derivative. Autocast may be
// on: it leaves a normalization in the type of its input.
inline bool is_undisturbed() {
  constexpr auto resting =
      c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView}) | c10::autocast_dispatch_keyset;
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ | resting) == resting && at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
      !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// False where the object is neither None nor exactly a tensor or parameter.
inline bool take(PyObject* object, MaybeTensor& into) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  into = THPVariable_Unpack(object);
  return is_plain(*into);
}

inline bool take_number(PyObject* object, double low, double high, double& into) {
  if (!PyFloat_CheckExact(object)) return false;
  into = PyFloat_AS_DOUBLE(object);
  return low <= into && into <= high;  // false for NaN
}

inline bool take_switch(PyObject* object, bool& into) {
  into = object == Py_True;
  return into || object == Py_False;
}

// The activations by number; none is null, which Python gets as None.
constexpr std::array<const char*, 5> ACTIVATIONS = {nullptr, "relu", "relu6", "leaky_relu", "silu"};

// None for no activation; a word that is not known is left to Python to refuse.
inline bool take_activation(PyObject* object, int64_t& into) {
  into = 0;
  if (object == Py_None) return true;
  if (!PyUnicode_CheckExact(object)) return false;
  for (size_t k = 1; k < ACTIVATIONS.size(); ++k) {
    if (PyUnicode_CompareWithASCIIString(object, ACTIVATIONS[k]) == 0) {
      into = static_cast<int64_t>(k);
      return true;
    }
  }
  return false;
}

inline PyObject* as_bool(bool value) { return value ? Py_True : Py_False; }

inline bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

inline bool is_served(at::ScalarType type) { return type == at::kFloat || type == at::kDouble || is_half(type); }

inline at::ScalarType computed_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline int64_t address(const Tensor& tensor) { return reinterpret_cast<int64_t>(tensor.const_data_ptr()); }

inline int64_t address(const MaybeTensor& tensor) { return tensor ? address(*tensor) : 0; }

inline bool is_aligned(const Tensor& tensor) {
  return address(tensor) % static_cast<int64_t>(tensor.element_size()) == 0;
}

// One value for each of ``size`` entries, of the type of x or of the type computed in, packed.
inline bool is_parameter_of(const MaybeTensor& value, at::IntArrayRef sizes, at::ScalarType type) {
  return !value ||
      (value->sizes() == sizes && value->is_contiguous() && is_aligned(*value) &&
       (value->scalar_type() == type || value->scalar_type() == computed_type(type)));
}

inline MaybeTensor widened(const MaybeTensor& value, at::ScalarType type) {
  if (!value || value->scalar_type() == type) return value;
  at::NoGradGuard off;
  return value->detach().to(type);
}

inline bool requires_grad(const MaybeTensor& value) { return value && value->requires_grad(); }

// Autograd keeps no inference tensor; Python says so.
inline bool is_inference(const MaybeTensor& value) { return value && value->is_inference(); }

// Whether a tensor is dense with its dimensions, outermost first, in this order.
template <typename Order>
bool is_packed(const Tensor& x, int64_t dims, Order order) {
  int64_t expected = 1;
  for (int64_t k = dims - 1; k >= 0; --k) {
    const int64_t dim = order(k);
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

inline bool is_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  return is_packed(x, dims, [dims](int64_t k) { return k == 0 ? 0 : k == dims - 1 ? 1 : k + 1; });
}

}  // namespace normkit
