// The Python module `normkit_native`: what `kernels/native/calls.py` calls.
#include "channels.h"
#include "samples.h"

namespace {

template <PyObject* (*serve)(PyObject* const*), Py_ssize_t expected>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == expected, "expected ", expected, " arguments, got ", count);
  try {
    return serve(arguments);
  } catch (normkit::PythonError&) {
    return nullptr;
  }
  END_HANDLE_TH_ERRORS
}

// Take the functions of Python that plan calls, and those that compute gradients which are to be differentiated again.
PyObject* configure(PyObject*, PyObject* arguments) {
  normkit::Callbacks given;
  if (!PyArg_ParseTuple(
          arguments, "OOOO", &given.plan_channels, &given.plan_samples, &given.channels_backward,
          &given.samples_backward)) {
    return nullptr;
  }
  Py_INCREF(arguments);  // keeps the four for as long as the process lives
  normkit::callbacks() = given;
  normkit::watch_for_forks();
  normkit::plain_keys();
  Py_RETURN_NONE;
}

// empty_like(x): an output's memory, kept when it is freed; None where x is not packed as an output is.
PyObject* empty_like(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  normkit::MaybeTensor x;
  if (count != 1 || !normkit::take(arguments[0], x) || !x || !x->is_non_overlapping_and_dense()) Py_RETURN_NONE;
  return THPVariable_Wrap(normkit::output_like(*x));
  END_HANDLE_TH_ERRORS
}

// kept(): the bytes that are kept free; limit(bytes): the most that may be.
PyObject* kept(PyObject*, PyObject*) { return PyLong_FromSize_t(normkit::Keeper::instance().kept()); }

PyObject* limit(PyObject*, PyObject* bytes) {
  const size_t value = PyLong_AsSize_t(bytes);
  if (value == static_cast<size_t>(-1) && PyErr_Occurred()) return nullptr;
  normkit::Keeper::instance().limit(value);
  Py_RETURN_NONE;
}

PyObject* release(PyObject*, PyObject*) {
  normkit::Keeper::instance().release();
  Py_RETURN_NONE;
}

PyCFunction as_function(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"batch_norm", as_function(call<normkit::channels::batch_norm, 12>), METH_FASTCALL, nullptr},
    {"trailing_norm", as_function(call<normkit::samples::trailing_norm, 7>), METH_FASTCALL, nullptr},
    {"group_norm", as_function(call<normkit::samples::group_norm, 6>), METH_FASTCALL, nullptr},
    {"empty_like", as_function(empty_like), METH_FASTCALL, nullptr},
    {"kept", kept, METH_NOARGS, nullptr},
    {"limit", limit, METH_O, nullptr},
    {"release", release, METH_NOARGS, nullptr},
    {"configure", configure, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "normkit_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_normkit_native() { return PyModule_Create(&definition); }
