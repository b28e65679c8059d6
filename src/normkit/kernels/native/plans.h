// Programs by shape and kind, and how they come from Python.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>

#include "arguments.h"
#include "program.h"

namespace normkit {

constexpr int64_t MAX_DIMS = 6;

// What programs are looked up by.
struct Key {
  std::array<int64_t, MAX_DIMS> shape{};
  int64_t dims = 0;
  int64_t kind = 0;    // type, layout, activation, and switches
  int64_t groups = 0;  // of channels, or how many last dimensions are normalized, where that is asked

  bool operator==(const Key& other) const {
    return shape == other.shape && dims == other.dims && kind == other.kind && groups == other.groups;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t value = (key.kind * 8 + key.dims) * 1000003 + key.groups;
    for (int64_t size : key.shape) value = value * 1000003 ^ static_cast<size_t>(size);
    return value;
  }
};

// Shapes that change with every call would fill memory; beyond this many Python serves new ones.
constexpr size_t MOST_CUTS = 8192;

// Functions of Python: those of `programs.py`, `functional/*_gradients.py` and `kernels/memory.py`.
struct Callbacks {
  PyObject* plan_channels = nullptr;
  PyObject* plan_samples = nullptr;
  PyObject* channels_backward = nullptr;
  PyObject* samples_backward = nullptr;
  PyObject* grant = nullptr;  // how many bytes of freed memory may be kept, of those that are wished
  size_t kept_from = 0;       // bytes of the outputs whose memory is kept
};

inline Callbacks& callbacks() {
  static Callbacks value;
  return value;
}

inline int64_t as_integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

// Read a program from (slots, launches, work, tables, elements), as `programs.py` writes it.
inline void read_program(PyObject* given, Program& into) {
  PyObject *slots, *launches;
  long long work, tables, elements;
  if (!PyArg_ParseTuple(given, "O!O!LLL", &PyTuple_Type, &slots, &PyTuple_Type, &launches, &work, &tables, &elements)) {
    throw PythonError();
  }
  TORCH_CHECK(PyTuple_GET_SIZE(slots) <= MAX_SLOTS, "normkit: more slots than the native part has");
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(slots); ++k) into.slots[k] = as_integer(PyTuple_GET_ITEM(slots, k));
  into.launches.reserve(PyTuple_GET_SIZE(launches));
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(launches); ++k) {
    PyObject* changes;
    long long kernel, tasks, grain;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(launches, k), "LLLO!", &kernel, &tasks, &grain, &PyTuple_Type, &changes)) {
      throw PythonError();
    }
    Launch launch{reinterpret_cast<Kernel>(kernel), tasks, grain};
    launch.changes.reserve(PyTuple_GET_SIZE(changes));
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(changes); ++j) {
      long long slot, value;
      if (!PyArg_ParseTuple(PyTuple_GET_ITEM(changes, j), "LL", &slot, &value)) throw PythonError();
      launch.changes.emplace_back(slot, value);
    }
    into.launches.push_back(std::move(launch));
  }
  into.work = work;
  into.tables = tables;
  into.elements = elements;
}

inline Key key_of(const Tensor& x, int64_t kind, int64_t groups = 0) {
  Key key;
  key.dims = x.dim();
  for (int64_t k = 0; k < key.dims; ++k) key.shape[k] = x.size(k);
  key.kind = kind;
  key.groups = groups;
  return key;
}

inline PyObject* shape_of(const Key& key) {
  PyObject* shape = PyTuple_New(key.dims);
  if (shape == nullptr) throw PythonError();
  for (int64_t k = 0; k < key.dims; ++k) PyTuple_SET_ITEM(shape, k, PyLong_FromLongLong(key.shape[k]));
  return shape;
}

inline PyObject* dtype_of(at::ScalarType type) { return reinterpret_cast<PyObject*>(torch::getTHPDtype(type)); }

inline const char* layout_of(bool last) { return last ? "channels_last" : "contiguous"; }

// The strides of a packed tensor of this shape, channels-last or contiguous.
inline PyObject* strides_of(const Key& key, bool last) {
  std::array<int64_t, MAX_DIMS> strides{};
  int64_t expected = 1;
  if (last) strides[1] = 1, expected = key.shape[1];
  for (int64_t k = key.dims - 1; k >= 0; --k) {
    if (last && k == 1) continue;
    strides[k] = expected;
    expected *= key.shape[k];
  }
  PyObject* tuple = PyTuple_New(key.dims);
  if (tuple == nullptr) throw PythonError();
  for (int64_t k = 0; k < key.dims; ++k) PyTuple_SET_ITEM(tuple, k, PyLong_FromLongLong(strides[k]));
  return tuple;
}

// Run under Python's lock from a thread of autograd's, and carry an error of Python's over.
template <typename Work>
auto under_lock(Work work) {
  PyGILState_STATE state = PyGILState_Ensure();
  try {
    auto result = work();
    PyGILState_Release(state);
    return result;
  } catch (PythonError&) {
    python_error error;
    error.persist();
    PyGILState_Release(state);
    throw error;
  } catch (...) {
    PyGILState_Release(state);
    throw;
  }
}

// Tensors of autograd's as a tuple, None for what is not there.
inline PyObject* tuple_of(const std::vector<Tensor>& tensors) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
  if (tuple == nullptr) throw PythonError();
  for (size_t k = 0; k < tensors.size(); ++k) PyTuple_SET_ITEM(tuple, k, THPVariable_Wrap(tensors[k]));
  return tuple;
}

inline std::vector<Tensor> tensors_of(PyObject* tuple) {
  std::vector<Tensor> tensors;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(tuple); ++k) {
    PyObject* item = PyTuple_GET_ITEM(tuple, k);
    tensors.push_back(item == Py_None ? Tensor() : THPVariable_Unpack(item));
  }
  return tensors;
}

// A tensor of the values of one, packed as another.
inline Tensor laid_out(const Tensor& value, const Tensor& like) {
  if (value.strides() == like.strides() && value.sizes() == like.sizes()) return value;
  Tensor copy = at::empty_like(like);
  return copy.copy_(value);
}

inline Tensor typed(const Tensor& gradient, const Tensor& parameter) {
  if (!parameter.defined()) return Tensor();
  return gradient.scalar_type() == parameter.scalar_type() ? gradient : gradient.to(parameter.scalar_type());
}

inline MaybeTensor if_defined(const Tensor& value) { return value.defined() ? MaybeTensor(value) : std::nullopt; }

// Whether a tensor has the shape and type that were saved; a hook may have changed them, and its memory format.
inline bool has_shape(const Tensor& value, const Key& key, at::ScalarType type) {
  if (!is_plain(value) || value.scalar_type() != type || value.dim() != key.dims || !is_aligned(value)) return false;
  for (int64_t k = 0; k < key.dims; ++k) {
    if (value.size(k) != key.shape[k]) return false;
  }
  return true;
}

// A cut that is being planned; its place serves the next one where nothing comes of it.
template <typename Cut>
struct Discard {
  static void*& spare() {
    static void* place = nullptr;
    return place;
  }
  void operator()(Cut* cut) {
    cut->~Cut();
    spare() = cut;
  }
};

template <typename Cut>
using Planned = std::unique_ptr<Cut, Discard<Cut>>;

template <typename Cut>
Planned<Cut> begin_plan() {
  void* place = std::exchange(Discard<Cut>::spare(), nullptr);
  if (place == nullptr) place = Lasting::of_process()->allocate(sizeof(Cut), alignof(Cut));
  return Planned<Cut>(new (place) Cut());
}

// The cut for a key, planned at the first call of its kind; null where `plan` gives none, or too many are kept.
template <typename Cut, typename Plan>
Cut* found_or_planned(const Key& key, Plan plan) {
  static std::pmr::unordered_map<Key, Planned<Cut>, Hash> table{Lasting::of_process()};
  auto found = table.find(key);
  if (found != table.end()) return found->second.get();
  if (table.size() >= MOST_CUTS) return nullptr;
  Planned<Cut> cut = plan();
  if (cut == nullptr) return nullptr;
  // Another thread may have planned the same while Python's lock was given up.
  auto [place, _] = table.try_emplace(key, std::move(cut));
  return place->second.get();
}

}  // namespace normkit
